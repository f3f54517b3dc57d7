"""Every command in README and docs is one that some test runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RUN_BY = {
    "make demo": "test_the_demo_evicts_recalls_and_agrees_with_stock",
    "make serve": "test_serve_prints_a_curl_line_that_works",
    "make bench-smoke": "test_the_smoke_benchmark_writes_its_result",
    "python benchmarks/gpu_check.py": "test_the_gpu_check_is_right_in_the_interpreter",
    "python benchmarks/gpu_e2e.py": "the CPU run in tests/e2e/test_gpu_scripts.py",
    "python benchmarks/offline_wheels.py": "tests/e2e/test_gpu_scripts.py, on small wheels",
    "pip install .": "the set-up of every run installs the package by its own metadata",
    "python -m sglang.launch_server": "every test of tests/e2e",
    "arkvale report": "test_serve_prints_a_curl_line_that_works",
}


def commands_in(text: str) -> list[str]:
    """Indented or fenced lines that look like a command."""
    lines = (line.strip() for line in text.splitlines() if line.startswith("    "))
    return [line for line in lines if re.match(r"(make|pip|python3?|arkvale|curl) ", line)]


@pytest.mark.parametrize("document", ["README.md", "docs/design.md"])
def test_documents_name_only_commands_that_are_run(document):
    for command in commands_in((ROOT / document).read_text()):
        assert any(command.startswith(known) for known in RUN_BY), command


def run(*command: str, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
    )


def test_the_demo_evicts_recalls_and_agrees_with_stock():
    done = run("make", "demo", f"PYTHON={sys.executable}", seconds=280)
    assert done.returncode == 0, done.stdout[-3000:]
    for word in ("--kv-policy arkvale", "pages recalled", "hit rate", "answers are the same"):
        assert word in done.stdout


def test_the_gpu_check_is_right_in_the_interpreter(tmp_path):
    out = tmp_path / "check.json"
    script = [sys.executable, "benchmarks/gpu_check.py", "--out", str(out)]
    done = run(*script, "--device", "cpu", seconds=280)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "broken: nothing" in done.stdout
    result = json.loads(out.read_text())
    assert {row["op"] for row in result["rows"]} >= {"score", "select", "resolve", "move", "attend"}
    assert result["machine"]["commit"] and result["not_run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run the check")
def test_the_gpu_check_says_what_it_needs():
    done = run(sys.executable, "benchmarks/gpu_check.py", seconds=60)
    assert done.returncode == 2 and "no CUDA GPU here" in done.stdout


def test_serve_prints_a_curl_line_that_works():
    serving = subprocess.Popen(
        ["make", "serve", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        curl = next(line for line in serving.stdout if "curl" in line).strip()
        url = re.search(r"http://[^/]+", curl)[0]
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health").close()
                break
            time.sleep(0.5)
        answer = subprocess.run(curl, shell=True, capture_output=True, text=True)
        assert '"finish_reason"' in answer.stdout, answer
        report = run(str(Path(sys.executable).parent / "arkvale"), "report", url, seconds=60)
        assert report.returncode == 0 and "pages backed up" in report.stdout
    finally:
        os.killpg(serving.pid, signal.SIGTERM)
        time.sleep(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(serving.pid, signal.SIGKILL)


def test_the_report_of_a_server_that_is_not_there_says_so():
    command = (sys.executable, "-m", "arkvale_sglang.cli.main", "report", "http://127.0.0.1:9")
    done = run(*command, seconds=60)
    assert done.returncode == 1
    assert done.stdout.startswith("error: ") and "does not answer" in done.stdout


def test_the_smoke_benchmark_writes_its_result(tmp_path):
    import json

    out = tmp_path / "smoke.json"
    done = run(
        sys.executable, "benchmarks/smoke.py", "--rounds", "1", "--out", str(out), seconds=580
    )
    assert done.returncode == 0, done.stdout[-3000:]
    result = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "rows"} <= set(result)
    assert [row["case"] for row in result["rows"]] == [
        "decode_16k", "extend_cached_16k", "under_budget_512",
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["ratio"] > 0 and {"stock_ms", "arkvale_ms"} <= set(row)


def test_the_torchvision_patch_is_known_to_be_applied_or_not_needed():
    done = run(sys.executable, "patches/torchvision_cpu.py", "verify", seconds=120)
    assert done.returncode == 0 and "imports" in done.stdout
