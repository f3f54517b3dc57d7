"""The scripts around the package: set-up, examples, benchmarks."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from arkvale_sglang.integration import compat

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("failing", [True, False])
def test_a_set_up_that_stops_midway_is_not_taken_for_a_complete_one(monkeypatch, tmp_path, failing):
    """An environment that was ready, must be made anew, and may fail at that."""
    setup = load("setup_env.py")
    stamp = tmp_path / ".venv/.ready"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    stamp.write_text("an older state")

    def run(command, **options):
        assert not stamp.exists()
        return SimpleNamespace(returncode=int(failing))

    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "has_gpu", lambda: False)
    monkeypatch.setattr(setup, "fingerprint", lambda release, gpu: "wanted")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["setup_env.py"])
    assert setup.main() == int(failing)
    assert stamp.exists() != failing


def test_every_other_release_that_the_suite_runs_on_can_be_set_up(monkeypatch):
    """The default one is in .venv; all others are made in one go, and one that fails is told."""
    setup = load("setup_env.py")
    default = re.search(r"sglang==(\S+)", (ROOT / "requirements/cpu-engine.txt").read_text())[1]
    assert setup.releases() == [release for release in compat.SUPPORTED if release != default]
    for release in setup.releases():
        listed = (ROOT / f"requirements/sglang-{release}.txt").read_text()
        assert listed == f"sglang=={release}\n"
    made = []
    monkeypatch.setattr(setup, "site_packages", lambda path: path)
    monkeypatch.setattr(
        setup, "prepare", lambda release, gpu: made.append(release) or int(release == "0.5.18")
    )
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--release", "all"])
    assert setup.main() == 1
    assert made == setup.releases()


@pytest.mark.parametrize("release", ["0.5.17", "all"])
def test_another_release_without_the_first_environment_is_one_sentence(
    monkeypatch, tmp_path, capsys, release
):
    setup = load("setup_env.py")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--release", release])
    assert setup.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [["--model-path", "X", "--port", "81"], ["--model-path=X", "--port=81"],
     ["--model", "X", "--port", "81"], ["--model=X", "--port=81", "--dtype", "half"]],
    ids=" ".join,
)  # fmt: skip
def test_the_example_server_takes_model_and_port_in_every_form(monkeypatch, capsys, flags):
    serve = load("examples/serve.py")
    commands = []
    monkeypatch.setattr(serve, "free_port", lambda _: pytest.fail("a port was named"))
    monkeypatch.setattr(serve, "leave_blocks_on_sigterm", lambda: None)
    monkeypatch.setattr(
        subprocess, "run",
        lambda command: commands.append(command) or SimpleNamespace(returncode=0),
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
    assert serve.main() == 0
    assert commands[0][-len(flags) :] == flags
    assert "--arkvale-budget" not in commands[0]  # what is set for the needle model
    assert "http://127.0.0.1:81/" in capsys.readouterr().out


def test_the_example_server_brings_its_own_model_and_port(monkeypatch):
    serve = load("examples/serve.py")
    commands = []
    monkeypatch.setattr(serve, "free_port", lambda preferred: preferred + 1)
    monkeypatch.setattr(serve, "leave_blocks_on_sigterm", lambda: None)
    monkeypatch.setattr(
        subprocess, "run",
        lambda command: commands.append(command) or SimpleNamespace(returncode=0),
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["serve.py", "--arkvale-budget", "777"])
    assert serve.main() == 0
    assert "--model-path" in commands[0] and commands[0][-2:] == ["--port", "30001"]
    budgets = [i for i, word in enumerate(commands[0]) if word == "--arkvale-budget"]
    assert commands[0][budgets[-1] + 1] == "777"  # the last one counts


def test_a_sigterm_to_the_example_server_ends_what_it_started(tmp_path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").touch()
    (tmp_path / "sglang/launch_server.py").write_text(
        "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
    )
    serving = subprocess.Popen(
        [sys.executable, "examples/serve.py", "--port", "81", "--model-path", "none"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    server = int(next(line for line in serving.stdout if line.startswith("pid ")).split()[1])
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(10) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    serving.stdout.close()
