"""Create the virtual environment that make works in: Python 3.11+ and pip are all it needs.

    python3 setup_env.py                    .venv with SGLang, for CUDA if a GPU is there, else CPU
    python3 setup_env.py --release 0.5.17   .venv-0.5.17: another SGLang over the libraries of .venv
    python3 setup_env.py --release all      one of these for every requirements/sglang-*.txt

An environment that is complete and up to date is left alone, so a second run takes no time.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "requirements"


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def steps(release: str | None, gpu: bool) -> list[tuple[str, list[str]]]:
    """What to run inside the environment, in order, with a word for each."""
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-warn-conflicts"]

    def listed(name: str) -> list[str]:
        return ["-r", str(REQUIREMENTS / name)]

    if release is not None:
        return [
            (
                f"SGLang {release}",
                [*pip, "--no-deps", "--ignore-installed", *listed(f"sglang-{release}.txt")],
            )
        ]
    if gpu:
        return [
            (
                "SGLang for CUDA, arkvale and tools",
                [*pip, "-e", f"{ROOT}[cuda]", *listed("dev.txt")],
            )
        ]
    return [
        ("PyTorch", [*pip, *listed("cpu-torch.txt")]),
        ("libraries", [*pip, *listed("cpu-libraries.txt"), *listed("dev.txt")]),
        ("SGLang and torchvision", [*pip, "--no-deps", *listed("cpu-engine.txt")]),
        ("torchvision patch", [str(ROOT / "patches/torchvision_cpu.py"), "apply"]),
        ("arkvale", [*pip, "--no-deps", "-e", str(ROOT)]),
    ]


def fingerprint(release: str | None, gpu: bool) -> str:
    """Changes when the environment must be made anew."""
    digest = hashlib.sha256(f"{sys.version} {release} {gpu} {ROOT}".encode())
    for path in sorted(
        [
            *REQUIREMENTS.glob("*.txt"),
            *ROOT.glob("patches/*.py"),
            Path(__file__),
            ROOT / "pyproject.toml",
        ]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def site_packages(path: Path) -> Path | None:
    """Where an environment keeps its libraries; ``None`` if there is none."""
    return next(path.glob("lib/python*/site-packages"), None)


def overlay(path: Path) -> None:
    """Let the environment see the libraries of .venv behind its own."""
    base, site = site_packages(ROOT / ".venv"), site_packages(path)
    assert base is not None and site is not None
    (site / "00-base.pth").write_text(f"{base}\n")  # first: the finders below import from it
    for finder in base.glob("__editable__*arkvale*.pth"):
        shutil.copy(finder, site / finder.name)


def releases() -> list[str]:
    """Every other release that there are requirements for."""
    return sorted(path.stem.removeprefix("sglang-") for path in REQUIREMENTS.glob("sglang-*.txt"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--release",
        choices=(*releases(), "all"),
        help="another SGLang release, over the libraries of .venv",
    )
    named = parser.parse_args().release
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything is checked
        print("error: Python 3.11 or newer is needed; point PYTHON at one.", file=sys.stderr)
        return 2
    if named is not None and site_packages(ROOT / ".venv") is None:
        print(
            "error: another release needs the libraries of .venv, which is not there; run "
            "python3 setup_env.py first.",
            file=sys.stderr,
        )
        return 2
    gpu = has_gpu()
    return max(prepare(release, gpu) for release in (releases() if named == "all" else [named]))


def prepare(release: str | None, gpu: bool) -> int:
    """Make one environment, if it is not ready; returns the exit status."""
    path = ROOT / (".venv" if release is None else f".venv-{release}")
    stamp, wanted = path / ".ready", fingerprint(release, gpu)
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    stamp.unlink(missing_ok=True)  # what was complete is not while it is made anew
    begin = time.monotonic()
    print(f"setting up {path.name} ({'CUDA' if gpu else 'CPU'} profile)", flush=True)
    if not (path / "bin/python").exists():
        # An overlay has the pip of .venv.
        venv.create(path, with_pip=release is None, clear=path.exists())
    if release is not None:
        overlay(path)
    todo = steps(release, gpu)
    for number, (what, command) in enumerate(todo, 1):
        print(f"  [{number}/{len(todo)}] {what} ...", flush=True)
        done = subprocess.run([str(path / "bin/python"), *command])
        if done.returncode:
            print(f"error: set-up stopped at {what!r}; see the lines above.", file=sys.stderr)
            return 1
    stamp.write_text(wanted)
    print(f"  ready in {time.monotonic() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
