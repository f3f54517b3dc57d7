"""Carry SGLang and this plugin to a CUDA machine that has torch and triton but no package index.

    python benchmarks/offline_wheels.py collect DIR [--python 3.12] [--have FILE] [--keep-fa3]
    python benchmarks/offline_wheels.py install DIR --target SITE

``collect`` runs where pip can download: it fetches the wheels of benchmarks/offline.txt, builds
that of this checkout, trims sglang-kernel and packs all in ``part-NN.tar`` of at most 60 MB beside
a ``manifest.json``.  ``install`` runs on the other machine: ``PYTHONPATH=SITE`` then has SGLang and
the policy.  Both need the standard library and pip alone, and both may be repeated.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "benchmarks/offline.txt"
PART_BYTES = 60_000_000
TAR_SLACK = 16_384
"""Most that a tar's end and one member's header and padding add."""
# pip prefers the first platform that has a wheel: the oldest glibc that is common, and only then
# newer ones (SGLang's own wheel needs 2.34).
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)),
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
    "manylinux_2_31_x86_64", "manylinux_2_34_x86_64",
)  # fmt: skip
UNUSED = ("sgl_kernel/flashmla_ops*", "sgl_kernel/infllm_ops*")
"""Of sglang-kernel: attention of models that the policy refuses, imported only by them."""
FA3 = "sgl_kernel/flash_ops*"
"""SGLang's default attention on Hopper, 342 MB; without it stock runs on FlashInfer or Triton."""
OPS = {"sm90": "sgl_kernel/sm100/*", "sm100": "sgl_kernel/sm90/*"}
"""By GPU: the twin that is never loaded there; every GPU other than Hopper loads sm100."""
PROJECT = ("pyproject.toml", "README.md", "LICENSE", "arkvale_sglang", "kernels")


class OfflineError(Exception):
    """What went wrong, in one sentence that says what to do."""


def requirements(text: str, have: str = "") -> list[str]:
    """The pins of ``text`` that a machine with the packages of ``have`` (``pip freeze``) lacks."""
    there = {}
    for line in have.splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)\s*(?:==\s*(\S+))?", line):
            there[_plain(match[1])] = match[2] or ""
    wanted = []
    for line in text.splitlines():
        pin, _, note = (piece.strip() for piece in line.partition("#"))
        if not pin:
            continue
        name, _, version = pin.partition("==")
        found = there.get(_plain(name))
        newer = note == "or newer" and found is not None and _release(found) >= _release(version)
        if found != version and not newer:
            wanted.append(pin)
    return wanted


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def collect(folder: Path, python: str, have: str, arch: str, keep_fa3: bool) -> dict[str, Any]:
    """Fetch, build, trim and pack into ``folder``; returns the manifest."""
    wanted = requirements(REQUIREMENTS.read_text(), have)
    fetched, ready = folder / "downloads", folder / "wheels"
    fetched.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    wheels = fetch(wanted, fetched, python)
    drop = [*UNUSED, OPS[arch], *([] if keep_fa3 else [FA3])]
    for number, wheel in enumerate(wheels, 1):
        if wheel.name.startswith("sglang_kernel-"):
            before, after = wheel.stat().st_size, trim(wheel, ready / wheel.name, drop)
            say(f"[{number}/{len(wheels)}] {wheel.name}: {mega(before)} trimmed to {mega(after)}")
        else:
            os.link(wheel, ready / wheel.name)
    own = build(ready)
    say(f"built {own.name}")
    imports = ["torch", "triton", "sglang", "arkvale_sglang", "arkvale_kernels"]
    facts = {
        "python": python,
        "machine": "x86_64",
        "gpu": arch,
        "fa3": keep_fa3,
        "imports": imports,
    }
    manifest = pack(sorted(ready.iterdir()), folder, facts)
    shutil.rmtree(ready)
    return manifest


def fetch(wanted: Sequence[str], folder: Path, python: str) -> list[Path]:
    """Download the wheels of ``wanted``; what ``folder`` has already is not fetched again."""
    there = {_wheel_key(path): path for path in folder.glob("*.whl") if _fits(path, python)}
    keys = [(_plain(name), version) for name, _, version in (pin.partition("==") for pin in wanted)]
    missing = [pin for pin, key in zip(wanted, keys, strict=True) if key not in there]
    say(f"{len(wanted)} packages wanted, {len(missing)} to download ...")
    if missing:
        command = ["download", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
                   "--python-version", python, "--dest", str(folder)]  # fmt: skip
        for tag in PLATFORMS:
            command += ["--platform", tag]
        pip([*command, *missing], "the download")
        there = {_wheel_key(path): path for path in folder.glob("*.whl") if _fits(path, python)}
    lost = [pin for pin, key in zip(wanted, keys, strict=True) if key not in there]
    if lost:
        raise OfflineError(f"pip brought no wheel of {lost[0]}; correct its pin in offline.txt.")
    return [there[key] for key in keys]


def _wheel_key(path: Path) -> tuple[str, str]:
    name, version = path.name.split("-")[:2]
    return _plain(name), version


def _fits(path: Path, python: str) -> bool:
    """Whether a wheel is for any Python, for the stable ABI, or for this very one."""
    tag, abi = path.name.split("-")[-3:-1]
    return tag.startswith("py") or "abi3" in abi or f"cp{python.replace('.', '')}" in tag


def build(out: Path) -> Path:
    """The wheel of this checkout, built from a copy so that the checkout stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        for name in PROJECT:
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, source / name)
        pip(["wheel", "--no-deps", "--wheel-dir", folder, str(source)], "building this project")
        wheel = next(Path(folder).glob("*.whl"))
        return Path(shutil.copy(wheel, out / wheel.name))


def trim(wheel: Path, out: Path, drop: Sequence[str]) -> int:
    """Copy ``wheel`` without the members that match ``drop``; returns its new size in bytes.

    RECORD is rewritten: pip refuses no file that is missing from it, but it lists what it installs.
    """
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            if any(fnmatch.fnmatchcase(info.filename, pattern) for pattern in drop):
                continue
            if re.fullmatch(r"[^/]+\.dist-info/RECORD", info.filename):
                new.writestr(info, _record(old.read(info).decode(), drop))
                continue
            with old.open(info) as source, new.open(_entry(info), "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return out.stat().st_size


def _entry(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """A fresh header with the name, date and mode of another."""
    fresh = zipfile.ZipInfo(info.filename, info.date_time)
    fresh.compress_type, fresh.external_attr = zipfile.ZIP_DEFLATED, info.external_attr
    fresh.file_size = info.file_size
    return fresh


def _record(text: str, drop: Sequence[str]) -> str:
    out = io.StringIO()
    rows = csv.reader(io.StringIO(text))
    csv.writer(out, lineterminator="\n").writerows(
        row for row in rows if not any(fnmatch.fnmatchcase(row[0], pattern) for pattern in drop)
    )
    return out.getvalue()


def pack(
    wheels: Iterable[Path], folder: Path, facts: dict[str, Any], limit: int = PART_BYTES
) -> dict[str, Any]:
    """Write ``part-NN.tar`` of at most ``limit`` bytes and the manifest; returns the manifest.

    Wheels over the limit are cut into numbered chunks; the same wheels give the same parts.
    """
    for stale in [*folder.glob("part-*.tar"), *folder.glob("manifest.json")]:
        stale.unlink()
    room = limit - TAR_SLACK
    pieces: list[tuple[int, str, Path, int]] = []
    listed: dict[str, Any] = {}
    for wheel in wheels:
        size = wheel.stat().st_size
        starts = range(0, max(size, 1), room)
        names = [f"{wheel.name}.{n:03d}" for n in range(len(starts))]
        names = [wheel.name] if len(names) == 1 else names
        pieces += [
            (min(room, size - at), name, wheel, at) for name, at in zip(names, starts, strict=True)
        ]
        listed[wheel.name] = {"bytes": size, "sha256": sha256(wheel), "pieces": names}
    bins: list[list[tuple[int, str, Path, int]]] = []
    for piece in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        cost = _tar_bytes([piece])
        fitting = [held for held in bins if _tar_bytes(held) + cost <= limit - TAR_SLACK // 2]
        fitting[0].append(piece) if fitting else bins.append([piece])
    parts: dict[str, Any] = {}
    for number, held in enumerate(bins, 1):
        path = folder / f"part-{number:02d}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for size, name, wheel, at in held:
                member = tarfile.TarInfo(name)  # no date, no owner: the same bytes every time
                member.size = size
                with wheel.open("rb") as source:
                    source.seek(at)
                    tar.addfile(member, source)
        parts[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        say(f"{path.name}: {mega(path.stat().st_size)}, {len(held)} wheels or pieces of one")
    manifest = {**facts, "parts": parts, "wheels": listed}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _tar_bytes(pieces: Iterable[tuple[int, str, Path, int]]) -> int:
    # A name over 100 characters costs an extended header and its padding beside the plain one.
    return sum(
        -(-piece[0] // 512) * 512 + 512 * (4 if len(piece[1]) > 99 else 1) for piece in pieces
    )


def install(folder: Path, target: Path) -> None:
    """Check, rejoin and install the wheels of ``folder`` into ``target``, then import from it.

    Raises:
        OfflineError: a part is missing or damaged, pip refuses, or an import fails.
    """
    manifest = read_manifest(folder)
    stamp, wanted = target / ".offline-wheels", sha256(folder / "manifest.json")
    if stamp.exists() and stamp.read_text() == wanted:
        say(f"{target} holds these wheels already")
    else:
        stamp.unlink(missing_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheels = rejoin(folder, manifest, Path(scratch))
            say(f"installing {len(wheels)} wheels into {target} ...")
            options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
            where = ["--target", str(target), *map(str, wheels)]
            pip(["install", *options, *where], "the installation")
        stamp.write_text(wanted)
    verify(manifest["imports"], target)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after a look at whether this Python is the one it was made for."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise OfflineError(
            f"{folder} has no readable manifest.json; give the folder that collect wrote."
        ) from error
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if manifest["python"] != here:
        raise OfflineError(
            f"these wheels are for Python {manifest['python']} and this is {here}; run install "
            f"with the former, or collect with --python {here}."
        )
    if manifest["machine"] != platform.machine():
        raise OfflineError(
            f"these wheels are for {manifest['machine']} and this machine is {platform.machine()}; "
            "nothing here fits it."
        )
    return manifest


def rejoin(folder: Path, manifest: dict[str, Any], out: Path) -> list[Path]:
    """Unpack the parts into ``out`` and join the pieces of cut wheels; all sums are checked."""
    for number, (name, facts) in enumerate(manifest["parts"].items(), 1):
        part = folder / name
        if not part.exists():
            raise OfflineError(f"{name} is missing from {folder}; copy it there again.")
        if sha256(part) != facts["sha256"]:
            raise OfflineError(
                f"{name} is damaged: its sha256 is not the manifest's; copy it again."
            )
        with tarfile.open(part) as tar:
            tar.extractall(out, filter="data")
        say(f"[{number}/{len(manifest['parts'])}] {name} checked")
    wheels = []
    for name, facts in manifest["wheels"].items():
        wheel = out / name
        if facts["pieces"] != [name]:
            with wheel.open("wb") as whole:
                for piece in facts["pieces"]:
                    with (out / piece).open("rb") as source:
                        shutil.copyfileobj(source, whole, 1 << 20)
                    (out / piece).unlink()
        if sha256(wheel) != facts["sha256"]:
            raise OfflineError(f"{name} differs from the manifest after joining; collect again.")
        wheels.append(wheel)
    return wheels


def verify(modules: Sequence[str], target: Path) -> None:
    """Import each module in a process of its own kind: a user's, with ``PYTHONPATH``."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(name)\n"
        '    print(f\'{name} {getattr(module, "__version__", "")}\'.strip())\n'
    )
    if "sglang" in modules:  # on CUDA this reaches sglang-kernel and FlashInfer as a server would
        modules = [*modules, "sglang.srt.entrypoints.http_server"]
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        env={**os.environ, "PYTHONPATH": str(target.resolve())},
        capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout, end="", flush=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word why"])[-1]
        failed = modules[min(len(done.stdout.splitlines()), len(modules) - 1)]
        raise OfflineError(
            f"the wheels are installed but {failed} does not import: {last}; bring what is missing "
            "(add it to benchmarks/offline.txt) and collect again."
        )


def pip(arguments: Sequence[str], what: str) -> None:
    """Run pip; its own last words go into the error."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
        last = (lines or done.stdout.strip().splitlines() or ["it said nothing"])[-1]
        raise OfflineError(f"pip failed at {what}: {last.removeprefix('ERROR: ')}")


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def mega(size: int) -> str:
    """Bytes in MB."""
    return f"{size / 1e6:.1f} MB"


def say(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("collect", help="download, trim and pack")
    step.add_argument("folder", type=Path, metavar="DIR")
    step.add_argument("--python", default="3.12", help="of the other machine (default: 3.12)")
    step.add_argument("--have", type=Path, metavar="FILE", help="pip freeze of the other machine")
    step.add_argument("--gpu", choices=sorted(OPS), default="sm90", help="sm100: any but Hopper")
    step.add_argument("--keep-fa3", action="store_true", help="stock's default on Hopper: 342 MB")
    step = steps.add_parser("install", help="check, rejoin and install")
    step.add_argument("folder", type=Path, metavar="DIR")
    step.add_argument("--target", type=Path, required=True, metavar="SITE")
    options = parser.parse_args()
    try:
        if options.step == "install":
            install(options.folder, options.target)
            say(f"ready: run with PYTHONPATH={options.target}")
        else:
            have = options.have.read_text() if options.have else ""
            made = collect(options.folder, options.python, have, options.gpu, options.keep_fa3)
            total = sum(part["bytes"] for part in made["parts"].values())
            say(f"{len(made['wheels'])} wheels in {len(made['parts'])} parts, {mega(total)}")
    except (OfflineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
