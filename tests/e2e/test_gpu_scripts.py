"""Scripts for CUDA machines, as far as they run without one."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


offline = load("offline_wheels")
e2e_cases = load("e2e_cases")
gpu_e2e = load("gpu_e2e")


def run(*command: str, seconds: float, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        env={**os.environ, **env},
    )


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A pure wheel of version 1.0 with a correct RECORD."""
    info = f"{name}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as out:
        for path, content in {**files, **meta}.items():
            out.writestr(path, content)
            digest = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append(f"{path},sha256={digest},{len(content)}")
        out.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]) + "\n")
    return wheel


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Two wheels in parts of 64 KiB: a large one, trimmed and cut, and a small one."""
    source, ready, out = tmp_path / "source", tmp_path / "ready", tmp_path / "parts"
    for folder in (source, ready, out):
        folder.mkdir()
    large = make_wheel(
        source,
        "toy_large",
        {
            "toy_large/__init__.py": b"from toy_large import kept\n__version__ = '1.0'\n",
            "toy_large/kept.py": b"",
            "toy_large/data.bin": os.urandom(150_000),
            "toy_large/unused_ops.so": os.urandom(90_000),
        },
    )
    offline.trim(large, ready / large.name, ["toy_large/unused*"])
    make_wheel(ready, "toy_small", {"toy_small.py": b"import toy_large\n"})
    facts = {"python": HERE, "machine": os.uname().machine, "imports": ["toy_small", "toy_large"]}
    offline.pack(sorted(ready.iterdir()), out, facts, limit=65536)
    return out


def test_a_trimmed_wheel_lists_what_it_holds(packed, tmp_path):
    with zipfile.ZipFile(next((tmp_path / "ready").glob("toy_large*"))) as wheel:
        names = set(wheel.namelist())
        record = wheel.read("toy_large-1.0.dist-info/RECORD").decode()
        assert wheel.testzip() is None
    assert {line.split(",")[0] for line in record.splitlines()} == names
    assert "toy_large/unused_ops.so" not in names and "toy_large/data.bin" in names


def test_parts_are_small_and_the_same_every_time(packed, tmp_path):
    parts = sorted(packed.glob("part-*.tar"))
    assert len(parts) >= 3 and all(part.stat().st_size <= 65536 for part in parts)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    manifest = json.loads(before["manifest.json"])
    facts = {key: manifest[key] for key in ("python", "machine", "imports")}
    offline.pack(sorted((tmp_path / "ready").iterdir()), packed, facts, limit=65536)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


def test_install_rejoins_installs_and_imports(packed, tmp_path):
    command = ("benchmarks/offline_wheels.py", "install", str(packed), "--target")
    site = tmp_path / "site"
    first = run(*command, str(site), seconds=120)
    assert first.returncode == 0, first.stdout
    assert "toy_large 1.0" in first.stdout and "ready: " in first.stdout
    assert (site / "toy_large/data.bin").stat().st_size == 150_000
    again = run(*command, str(site), seconds=60)
    assert again.returncode == 0 and "already" in again.stdout and "installing" not in again.stdout


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: damage(folder / "part-02.tar"), ("part-02.tar is damaged", "copy it")),
        (lambda folder: (folder / "part-01.tar").unlink(), ("part-01.tar is missing", "copy it")),
        (lambda folder: (folder / "manifest.json").unlink(), ("no readable manifest.json",)),
        (lambda folder: amend(folder, python="2.7"), ("for Python 2.7", f"--python {HERE}")),
        (lambda folder: amend(folder, imports=["toy_lost"]), ("toy_lost does not import",)),
    ],
)
def test_what_cannot_be_installed_is_refused_in_a_sentence(packed, tmp_path, harm, words):
    harm(packed)
    command = ("benchmarks/offline_wheels.py", "install", str(packed), "--target")
    done = run(*command, str(tmp_path / "site"), seconds=120)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and last.endswith("."), done.stdout
    assert all(word in last for word in words), last


def damage(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def amend(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_packages_that_are_there_are_left_out():
    text = "# why\nexact==1.2\nlib_a==2.0  # or newer\nlib-b==2.0  # or newer\n"
    assert offline.requirements(text) == ["exact==1.2", "lib_a==2.0", "lib-b==2.0"]
    have = "exact==1.3\nlib-a==2.10\nlib_b==1.9\n"
    assert offline.requirements(text, have) == ["exact==1.2", "lib-b==2.0"]
    assert offline.requirements(text, "exact==1.2\nlib_b\n") == ["lib_a==2.0", "lib-b==2.0"]


def test_the_pins_are_those_of_the_release_profile():
    pins = offline.requirements((ROOT / "benchmarks/offline.txt").read_text())
    assert {"sglang==0.5.17", "sglang-kernel==0.4.5", "transformers==5.12.1"} <= set(pins)
    assert not any(pin.startswith(("torch==", "triton==")) for pin in pins)


def test_decode_rate_counts_requests_that_decode_together():
    begun = [(1.0, 0, 1), (2.0, 1, 1), (4.0, 0, 21), (4.0, 1, 21), (6.0, 0, 41), (6.1, 1, 41)]
    late = [(7.0, 2, 1), (9.0, 2, 41)]
    found = e2e_cases.steady([*begun, *late], 41)
    assert found["together"] == 2
    assert found["value"] == pytest.approx(20 / 2 + 20 / 2)
    with pytest.raises(e2e_cases.Refused, match="before the others began"):
        e2e_cases.steady([(1.0, 0, 41), (2.0, 1, 1), (3.0, 1, 41)], 41)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ("no CUDA device", "--device cpu --scale tiny")),
        (("--only", "speed"), ("--only speed is unknown", "throughput")),
    ],
)
def test_the_gpu_benchmark_refuses_what_it_cannot_run(flags, words):
    done = run("benchmarks/gpu_e2e.py", *flags, seconds=120, CUDA_VISIBLE_DEVICES="")
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and last.endswith("."), done.stdout
    assert all(word in last for word in words), last


def test_both_sides_hold_the_same_bytes_at_full_scale():
    options = argparse.Namespace(
        budget=2048, attention=None, stock_attention="triton", device="cuda", host_memory=100
    )
    bench = gpu_e2e.Bench(options, e2e_cases.SCALES["full"], Path("model"), 0.0)
    sizes = gpu_e2e.equal_memory(bench)
    assert sizes["stock_tokens"] == 40 * 10**9 // 131072
    assert 0.99 * sizes["stock_bytes"] < sizes["arkvale_bytes"] <= sizes["stock_bytes"]
    flags = bench.side_flags("arkvale", equal=True)
    assert int(flags[flags.index("--max-total-tokens") + 1]) > 2 * sizes["stock_tokens"]
    assert {"--arkvale-device-tokens", "--skip-tokenizer-init", "dummy"} <= set(flags)
    free = bench.side_flags("arkvale", equal=False)
    assert not {"--arkvale-device-tokens", "--max-total-tokens"} & set(free)
    assert "--kv-policy" not in bench.side_flags("stock", equal=True)


def test_the_gpu_benchmark_runs_at_tiny_scale(tmp_path):
    out = tmp_path / "e2e.json"
    flags = ("--device", "cpu", "--scale", "tiny", "--time-limit", "8", "--out", str(out))
    done = run("benchmarks/gpu_e2e.py", *flags, seconds=560)  # about 2 minutes on an idle machine
    assert done.returncode == 0, done.stdout[-3000:]
    result = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "flags", "equal_memory"} <= set(result)
    sections = [row["section"] for row in result["rows"]]
    assert sections == ["tpot", "tpot", "throughput", "throughput", "under-budget", "prefill"]
    for row in result["rows"]:
        void = [row[side].get("refused", "") for side in ("stock", "arkvale")]
        assert (row["ratio"] or 0) > 0 or any("too busy" in reason for reason in void), row
        assert row["case"] in done.stdout
    sizes = result["equal_memory"]
    assert 0.9 * sizes["stock_bytes"] < sizes["arkvale_bytes"] <= sizes["stock_bytes"]
    assert result["counters"]["equal memory"]["pages_evicted"] > 0
