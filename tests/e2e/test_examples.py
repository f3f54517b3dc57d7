"""Examples print what their first lines say; those that need a server share one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serve import MODEL, SMALL

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ("chat", "documents", "engine", "fork")


def source(name: str) -> str:
    return (ROOT / f"examples/{name}.py").read_text()


def expected(name: str) -> list[str]:
    """The indented lines of the docstring after the words that announce them."""
    words = ast.get_docstring(ast.parse(source(name)))
    shown = words.split("Expected output", 1)[1].split(":\n\n", 1)[1]
    return [line.removeprefix("    ") for line in shown.splitlines() if line]


def without_page_counts(lines: list[str]) -> list[str]:
    """They depend on which requests meet in a batch; none may be 0."""
    return [re.sub(r"\b[1-9]\d*(?= (pages|recalled)|$)", "N", line) for line in lines]


def run(name: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments],
        cwd=ROOT, text=True, capture_output=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def url(serve) -> str:
    """The server of ``make serve``."""
    return serve(MODEL, "--kv-policy", "arkvale", *SMALL[2:]).url


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_under_60_lines(name):
    assert len(source(name).splitlines()) < 60


@pytest.mark.parametrize("name", ["chat", "documents", "fork"])
def test_an_example_against_a_server_prints_what_it_says(name, url):
    printed = run(name, url)
    assert without_page_counts(printed) == without_page_counts(expected(name))
    if name == "fork":
        document, branches = map(int, re.findall(r"\d+", printed[-1]))
        assert 0 < branches < document / 8, "what branches share is digested once"


def test_the_engine_example_prints_what_it_says():
    printed = [line for line in run("engine") if not line.startswith(("[", "Multi-thread"))]
    assert without_page_counts(printed) == without_page_counts(expected("engine"))
