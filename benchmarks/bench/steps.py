"""Where the time of a decode step goes, by SGLang's own profiler on a running server."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arkvale_sglang.cli.launch import Server
from bench.sides import COMMON, body, per_token, prompt

PARTS = ("append", "score", "select", "resolve", "recall", "attend")
STEPS = 16


def breakdown(model: Path, log: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Milliseconds of every part of a step at 32K tokens and a budget of 1024, and of the rest."""
    flags = [
        *COMMON, "--kv-policy", "arkvale", "--max-total-tokens", "131072",
        "--arkvale-budget", "1024", "--arkvale-device-tokens", "8192",
        "--arkvale-host-memory", "1", "--arkvale-dense-layers", "0",
    ]  # fmt: skip
    tokens = prompt(32_768, "steps")
    with Server(model, flags) as server, tempfile.TemporaryDirectory() as folder:
        whole = per_token(server, [tokens], 2 * STEPS, None)
        server.post("/start_profile", {"output_dir": folder, "activities": ["CPU"]})
        server.post("/generate", body(tokens, STEPS))
        server.post("/stop_profile", {})
        spent = _spent(_trace(Path(folder)))
    parts = {name: spent.get(name, 0.0) / (STEPS - 1) for name in PARTS}
    parts["rest"] = max(0.0, whole - sum(parts.values()))
    for name, elapsed in parts.items():
        log(f"step  {name:8s} {elapsed:7.3f} ms")
        yield {
            "case": "step",
            "part": name,
            "milliseconds": round(elapsed, 4),
            "context": 32_768,
            "batch": 1,
            "budget": 1024,
        }


def _trace(folder: Path, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Events of the profile, which is written after the server has answered."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for file in folder.rglob("*.json.gz"):
            try:
                with gzip.open(file, "rt") as text:
                    return json.load(text)["traceEvents"]
            except (EOFError, ValueError):
                break  # still being written
        time.sleep(0.5)
    raise RuntimeError(f"the server wrote no profile in {seconds:.0f} s.")


def _spent(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds in each named part."""
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("ph") == "X" and name.startswith("arkvale."):
            spent[name.removeprefix("arkvale.")] += event["dur"] / 1e3
    return spent
