"""Real servers: started once per configuration, kept while tests of the module use them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arkvale_sglang.cli.launch import Server
from tiny_model import make_model

COMMON = [
    "--random-seed", "1", "--log-level", "info", "--max-running-requests", "16", "--sleep-on-idle",
    "--dtype", "float32",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once) a small model: ``tiny("llama", dtype="float32", ...)``."""
    folder = tmp_path_factory.mktemp("models")

    def make(arch: str, **options: object) -> Path:
        name = "-".join([arch, *(f"{key}{value}" for key, value in sorted(options.items()))])
        return make_model(folder / name, arch=arch, **options)

    return make


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start servers that live until the module is done; prints a server's log if it fails."""
    with contextlib.ExitStack() as stack:

        def start(model: Path, *flags: str, **options: object) -> Server:
            log = tmp_path_factory.mktemp("server") / "log"
            return stack.enter_context(Server(model, [*COMMON, *flags], log=log, **options))

        yield start
