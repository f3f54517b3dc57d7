"""A server that is started is also ended, however its start goes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from arkvale_sglang.cli import launch
from arkvale_sglang.cli.launch import Server, ServerFailed

CHILD = "import os, time; print('child', os.getpid(), flush=True); print('why', flush=True);"
LIVES = f"{CHILD} time.sleep(60)"
LEAVES_A_CHILD = (
    f"import os\nif os.fork() == 0:\n {LIVES}\nimport time; time.sleep(0.3)\nos._exit(3)"
)


def server(tmp_path: Path, program: str) -> Server:
    made = Server("none", log=tmp_path / "log")
    made.command = [sys.executable, "-c", program]
    return made


def ended(log: Path) -> bool:
    """Whether the process that wrote its number is gone, if only to be waited for."""
    pid = next(line.split()[1] for line in log.read_text().splitlines() if "child" in line)
    deadline = time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            if time.monotonic() > deadline:
                return False
    return True


def test_children_of_a_server_that_failed_end_with_it(tmp_path):
    with pytest.raises(ServerFailed, match=r"the server ended with 3: \n(?s:.*)why"):
        server(tmp_path, LEAVES_A_CHILD).start()
    assert ended(tmp_path / "log")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit], ids=lambda kind: kind.__name__)
def test_a_start_that_is_interrupted_leaves_no_server(tmp_path, monkeypatch, raised):
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        sleep(0.02)
        if (tmp_path / "log").read_text().count("\n") == 2:
            raise raised

    monkeypatch.setattr(launch.time, "sleep", interrupted)
    with pytest.raises(raised), server(tmp_path, LIVES):
        pytest.fail("it never answers")
    assert ended(tmp_path / "log")


def test_a_log_of_its_own_holds_no_file_open():
    before = len(os.listdir("/proc/self/fd"))
    made = Server("none")
    assert len(os.listdir("/proc/self/fd")) == before
    made.log.unlink()
