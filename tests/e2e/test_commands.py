"""Every command in README and docs is one that some test runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from textwrap import indent

import pytest
import torch

from arkvale_sglang.cli import main as cli
from bench import report
from quality import results

ROOT = Path(__file__).resolve().parents[2]
RUN_BY = {
    "make demo": "test_the_demo_evicts_recalls_and_answers_right",
    ".venv/bin/python examples/demo.py": "test_without_recall_the_first_turn_is_forgotten",
    "make serve": "test_serve_prints_a_curl_line_that_works",
    "make quality": "test_the_quality_command_fills_its_page_from_its_csv",
    "make needle-model": "test_training_stops_resumes_and_exports",
    "python benchmarks/evaluate.py": "test_lm_eval_runs_on_both_policies",
    "arkvale plan": "tests/tools/test_plan.py",
    "make bench": "test_the_benchmark_fills_its_page_from_its_rows",
    "make bench-smoke": "test_the_benchmark_fills_its_page_from_its_rows",
    "make chaos": "test_chaos_counts_its_events_and_replays_a_world, tests/e2e/test_life.py",
    "make soak": "test_the_soak_samples_every_process_of_a_server",
    "python benchmarks/gpu_check.py": "test_the_gpu_check_is_right_in_the_interpreter",
    "python benchmarks/gpu_e2e.py": "the CPU run in tests/e2e/test_gpu_scripts.py",
    "python benchmarks/offline_wheels.py": "tests/e2e/test_gpu_scripts.py, on small wheels",
    "pip install .": "the set-up of every run installs the package by its own metadata",
    "python -m sglang.launch_server": "every test of tests/e2e",
    "python examples/chat.py": "test_an_example_against_a_server_prints_what_it_says",
    "python examples/documents.py": "test_an_example_against_a_server_prints_what_it_says",
    "python examples/fork.py": "test_an_example_against_a_server_prints_what_it_says",
    "python examples/engine.py": "test_the_engine_example_prints_what_it_says",
    "arkvale report": "test_serve_prints_a_curl_line_that_works",
    "arkvale doctor": "tests/tools/test_doctor.py",
    "python -m sglang_router.launch_router": "tests/e2e/test_tensor_parallel.py",
    "pip install sglang-router": "the set-up of every run, by requirements/dev.txt",
    "git clone": "every run of .ci/run is one of a fresh clone",
    ".venv/bin/arkvale top": "test_serve_prints_a_curl_line_that_works",
    "arkvale top": "test_serve_prints_a_curl_line_that_works",
    "arkvale record": "the recorder of tests/e2e/test_watching.py",
    "arkvale plot": "tests/e2e/test_watching.py and tests/cli/test_watching.py",
}


DOCUMENTS = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def commands_in(text: str) -> list[str]:
    """Indented or fenced lines that look like a command, without the variables set before it."""
    text = re.sub(r"(?ms)^```\w*\n(.*?)^```", lambda found: indent(found[1], "    "), text)
    text = text.replace("\\\n", "")  # lines that go on
    lines = (line.strip() for line in text.splitlines() if line.startswith("    "))
    bare = (re.sub(r'^([A-Z_]+=("[^"]*"|\S*) )+', "", line) for line in lines)
    known = r"(git|make|pip|(\.venv/bin/)?(python3?|arkvale)|curl) "
    return [line for line in bare if re.match(known, line)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_only_commands_that_are_run(document):
    for command in commands_in((ROOT / document).read_text()):
        assert any(command.startswith(known) for known in RUN_BY), command


def parsed(line: str, monkeypatch) -> str | None:
    """The subcommand of a line of ``arkvale`` that its own parser takes; ``None`` of others."""
    program, *words = shlex.split(line, comments=True)
    if program not in ("arkvale", ".venv/bin/arkvale"):
        return None
    for command in (cli.top, cli.record, cli.plot, cli.plan, cli.doctor):
        monkeypatch.setattr(command, "run", lambda options: "")
    monkeypatch.setattr(cli, "_report", lambda options: "")
    assert cli.main(words) == 0
    return words[0]


def test_documented_arkvale_commands_are_what_the_parsers_take(monkeypatch):
    lines = [line for name in DOCUMENTS for line in commands_in((ROOT / name).read_text())]
    found = {parsed(line, monkeypatch) for line in lines}
    assert found == {None, "top", "record", "plot", "plan", "doctor", "report"}


@pytest.mark.parametrize(
    "text",
    ["    arkvale plan X \\\n        --tp 2\n", "```sh\n.venv/bin/arkvale top X --twice\n```\n"],
)
def test_a_documented_command_with_a_wrong_or_missing_flag_is_found(monkeypatch, text):
    [line] = commands_in(text)
    with pytest.raises(SystemExit):
        parsed(line, monkeypatch)


def test_tests_that_run_commands_exist():
    others = ("test_gpu_scripts.py", "test_examples.py")
    files = {Path(__file__), *map(Path(__file__).with_name, others)}
    tests = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    named = {name for by in RUN_BY.values() for name in re.findall(r"\btest_\w+\b(?!\.py)", by)}
    assert named and named <= tests


def run(*command: str, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
    )


def test_the_demo_evicts_recalls_and_answers_right():
    done = run("make", "demo", f"PYTHON={sys.executable}", seconds=280)
    assert done.returncode == 0, done.stdout[-3000:]
    for word in ("--kv-policy arkvale", "pages recalled", "hit rate", "8 of 8 codes of the first"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "flags", [("--arkvale-recall-cap", "0"), ("--arkvale-selection", "streaming")]
)
def test_without_recall_the_first_turn_is_forgotten(flags):
    done = run(sys.executable, "examples/demo.py", *flags, seconds=280)
    assert done.returncode == 1, done.stdout[-3000:]
    assert "an answer is wrong" in done.stdout
    assert "0 of 8 codes of the first turn" in " ".join(done.stdout.split())


def test_the_quality_command_fills_its_page_from_its_csv(tmp_path):
    (tmp_path / "quality.md").write_text((ROOT / "docs/quality.md").read_text())
    done = run(
        "make", "quality", f"PYTHON={sys.executable}",
        f"ARGS=--small --out {tmp_path} --docs {tmp_path}", seconds=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    shares = {
        (row["task"], row["name"]): row["right"] / row["asked"]
        for row in results.read(tmp_path / "quality.csv")
    }
    assert shares["lengths", "full"] >= 0.98
    assert shares["path", "arkvale"] == shares["path", "full"] == 1
    assert shares["path", "streaming"] < 0.8
    page = (tmp_path / "quality.md").read_text()
    assert "| arkvale | 1024 | 100 % " in page
    assert {path.name for path in tmp_path.glob("images/*.png")} == {
        f"quality_{name}.png" for name in ("lengths", "passkey", "moving", "overlap")
    }


def test_the_benchmark_fills_its_page_from_its_rows(tmp_path):
    done = run(
        "make", "bench-smoke", f"PYTHON={sys.executable}",
        f"ARGS=--quick --only decode --only under_budget --out {tmp_path} --docs {tmp_path}",
        seconds=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    steps = report.of(rows, "step", context=8192)
    assert [(row["context"], row["batch"]) for row in report.of(rows, "decode")] == [
        (512, 1), (8192, 1), (8192, 4),
    ]  # fmt: skip
    under_budget = [row for row in rows if row["case"].startswith("under_budget")]
    assert [row["case"] for row in under_budget] == [
        "under_budget_decode", "under_budget_prefill",
    ]  # fmt: skip
    parts = {row["part"]: row["arkvale"] for row in steps}
    assert min(parts[part] for part in ("append", "score", "select", "resolve", "attend")) > 0
    assert 0 < parts["rest"] < sum(parts.values())
    page = (tmp_path / "performance.md").read_text()
    for row in under_budget:
        assert f"| {row['stock']:,.2f} | {row['arkvale']:,.2f} |" in page
    assert "Not measured in this run." in page
    assert {path.name for path in tmp_path.glob("images/*.png")} == {
        f"performance_{name}.png" for name in ("batches", "decode", "steps")
    }  # fmt: skip


def test_chaos_counts_its_events_and_replays_a_world():
    chaos = ("make", "chaos", f"PYTHON={sys.executable}")
    done = run(*chaos, "ARGS=--seed 3 --events 480 --storms 0", seconds=300)
    assert done.returncode == 0, done.stdout[-3000:]
    told = done.stdout[done.stdout.index("seed ") :]  # a make within a make says where it is
    assert told.startswith('seed 3; all events again by  make chaos ARGS="--seed 3"')
    kinds = re.findall(r"^  ([a-z ]+\S) +([\d,]+)$", told, re.MULTILINE)
    total = sum(int(count.replace(",", "")) for _, count in kinds)
    assert total >= 480 and f"{total:,} events in" in told and "no law broken" in told
    again = run(*chaos, "ARGS=--world 3000000", seconds=300)
    assert again.returncode == 0 and "\n159: " in again.stdout and "is sound" in again.stdout


def test_the_soak_samples_every_process_of_a_server(tmp_path):
    done = run(
        "make", "soak", f"PYTHON={sys.executable}",
        f"ARGS=--minutes 0.2 --every 2 --out {tmp_path}", seconds=400,
    )  # fmt: skip
    assert done.returncode == 2 and "no verdict" in done.stdout, done.stdout[-3000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["requests"] > 0 == found["failed"] and found["pages_recalled"] > 0
    assert found["commit"] and found["machine"]["cores"] and found["versions"]["sglang"]
    header, *rows = (tmp_path / "soak.csv").read_text().splitlines()
    assert len(rows) == 6 and (tmp_path / "soak.png").stat().st_size > 10000
    for column in ("scheduler rss_mib", "detokenizer files", "python threads", "ms_per_token"):
        assert column in header.split(",")


def test_training_stops_resumes_and_exports(tmp_path):
    training = ("make", "needle-model", f"PYTHON={sys.executable}")
    places = f"--state {tmp_path / 'state'} --out {tmp_path / 'model'}"
    first = run(*training, f"ARGS={places} --steps 50", seconds=120)
    again = run(*training, f"ARGS={places} --steps 100", seconds=120)
    assert first.returncode == again.returncode == 0, first.stdout[-2000:] + again.stdout[-2000:]
    assert "resuming at step 50" in again.stdout
    curve = results.read(tmp_path / "model/curve.csv")
    assert [row["step"] for row in curve] == [50, 100]
    assert curve[1]["loss"] < 0.7 * curve[0]["loss"]  # which the first 50 steps alone do not reach
    other = run(*training, f"ARGS={places} --seed 1", seconds=120)
    assert other.returncode != 0 and "was trained with another seed" in other.stdout
    assert (tmp_path / "model/model.safetensors").stat().st_size < 10 * 2**20


@pytest.mark.parametrize("selection", ["recall", "streaming"])
def test_lm_eval_runs_on_both_policies(tmp_path, selection):
    """The rule that drops must be seen to forget, else the second column means nothing."""
    out = tmp_path / "results.json"
    model = "examples/needle_model/model"
    done = run(
        sys.executable, "benchmarks/evaluate.py", "--model-path", model, "--tasks", "needle",
        "--lengths", "4096", "--limit", "10", "--chat", "--out", str(out), "--dtype", "float32",
        "--arkvale-budget", "512", "--arkvale-device-tokens", "1024", "--arkvale-dense-layers", "0",
        "--arkvale-host-memory", "0.25", "--arkvale-selection", selection, seconds=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("needle ")]
    assert [line[1:3] for line in lines] == [["found", "10"], ["4096", "10"]]
    answers = json.loads(out.read_text())["results"]
    full, ours = (answers[side]["needle"]["found,none"] for side in ("full", "arkvale"))
    assert full == 1.0 and (ours == 1.0 if selection == "recall" else ours < 0.8)


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
        assert "the code of the blue door is 4821." in answer.stdout, answer
        report = run(str(Path(sys.executable).parent / "arkvale"), "report", url, seconds=60)
        assert report.returncode == 0 and "pages backed up" in report.stdout
        top = next(line for line in serving.stdout if "arkvale top" in line).split("#")[0].split()
        assert top[0] == ".venv/bin/arkvale"
        view = run(str(Path(sys.executable).parent / "arkvale"), *top[1:], "--once", seconds=60)
        assert view.returncode == 0 and "hit rate" in view.stdout and url in view.stdout
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


def test_the_torchvision_patch_is_known_to_be_applied_or_not_needed():
    done = run(sys.executable, "patches/torchvision_cpu.py", "verify", seconds=120)
    assert done.returncode == 0 and "imports" in done.stdout
