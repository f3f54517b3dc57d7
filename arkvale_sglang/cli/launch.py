"""Run an SGLang server as a child process, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 180.0


class ServerFailed(RuntimeError):
    """The server ended, or did not answer in time; the message carries the end of its log."""


class Server:
    """``python -m sglang.launch_server`` on a free local port.

    Use as a context manager: the server answers inside the block and is gone after it.
    """

    def __init__(
        self,
        model: Path | str,
        flags: Sequence[str] = (),
        python: str = sys.executable,
        log: Path | None = None,
        env: dict[str, str] | None = None,
        port: int | None = None,
    ):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or _new_log()
        self.command = [
            python, "-m", "sglang.launch_server", "--model-path", str(model),
            "--host", "127.0.0.1", "--port", str(self.port), *flags,
        ]  # fmt: skip
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the server answers; it is ended if that is left by an exception.

        Raises:
            ServerFailed: it ended before it answered, or took too long.
        """
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    self.command, stdout=log, stderr=log, env=self._env, start_new_session=True
                )
            self._wait_for_an_answer(self._process)
        except BaseException:
            self.stop()  # a session of its own, which nothing else would end
            raise

    def _wait_for_an_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerFailed(f"the server ended with {process.returncode}: {self.tail()}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/health", timeout=10).close()
                return
            time.sleep(0.25)
        raise ServerFailed(f"the server did not answer in {START_SECONDS:.0f} s: {self.tail()}")

    @property
    def pid(self) -> int:
        """Of the process that leads all others of the server."""
        assert self._process is not None
        return self._process.pid

    def wait(self, seconds: float | None = None) -> int:
        """Wait until the process ends; returns its exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self) -> None:
        """End the server and everything it started."""
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the server's processes from running inside the block; an idle server spins."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def tail(self, lines: int = 30) -> str:
        """The end of the server's log."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join(["", *text[-lines:]])

    def get(self, path: str, timeout: float = 60.0) -> Any:
        """GET a JSON document."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any, timeout: float = 600.0) -> Any:
        """POST JSON and return the JSON answer (or its text, if it is none)."""
        with self.open(path, body, timeout) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def open(self, path: str, body: Any, timeout: float = 600.0) -> Any:
        """POST JSON and return the open response."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=timeout)

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Answers of ``/generate`` as they come."""
        with self.open("/generate", {**body, "stream": True}) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    def arkvale(self) -> dict[str, Any]:
        """The policy's part of ``/server_info``."""
        return self.get("/server_info")["internal_states"][0]["arkvale"]


def leave_blocks_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does: a server is a session of its own, so it
    ends when its block is left, not with the process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _new_log() -> Path:
    handle, path = tempfile.mkstemp(prefix="arkvale-server-", suffix=".log")
    os.close(handle)
    return Path(path)


def free_port(preferred: int | None = None) -> int:
    """A local port that nobody listens on, the preferred one if it is free; SGLang derives others
    from it, so stay well inside."""
    if preferred is not None:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", preferred))
            return preferred
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port < 50000:
            return port
        with socket.socket() as probe:
            port = 20000 + port % 20000
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
