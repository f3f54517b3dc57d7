"""Where the time of a decode step goes, by SGLang's own profiler on a running server."""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arkvale_sglang.cli.launch import Server
from bench.sides import Log, Row, body, per_token

PARTS = ("append", "score", "select", "resolve", "recall", "attend")
STEPS = 24


def parts(server: Server, tokens: list[int], budget: int, log: Log) -> Iterator[Row]:
    """Milliseconds of every part of a decode step of a cached prompt, and of all else.

    The profiler slows ops down, so its shares are applied to the time without it.
    """
    context, settings = len(tokens), {"budget": budget}
    layers = len(server.arkvale()["layers"])
    whole = statistics.median(per_token(server, [tokens], 2 * STEPS, settings) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        what = {"output_dir": folder, "activities": ["CPU"], "with_stack": False}
        server.post("/start_profile", what)
        server.post("/generate", body(tokens, STEPS, settings))
        server.post("/stop_profile", {})
        shares = shares_of(_trace(Path(folder)), layers)
    for name, share in shares.items():
        log(f"step at {context:6d}  {name:8s} {share * whole:7.3f} ms  {100 * share:5.1f} %")
        yield {
            "case": "step",
            "part": name,
            "context": context,
            "batch": 1,
            "budget": budget,
            "arkvale": round(share * whole, 4),
            "unit": "ms",
        }


def _trace(folder: Path, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Events of the profile, which is written after the server has answered."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for file in folder.rglob("*.json.gz"):
            try:
                with gzip.open(file, "rt") as text:
                    events: list[dict[str, Any]] = json.load(text)["traceEvents"]
                    return events
            except (EOFError, ValueError):
                break  # still being written
        time.sleep(0.5)
    raise RuntimeError(f"the server wrote no profile in {seconds:.0f} s.")


def shares_of(events: list[dict[str, Any]], layers: int) -> dict[str, float]:
    """Share of each named part in a decode step, the rest last; the first steps are left out."""
    named = sorted(
        (event["ts"], event["name"].removeprefix("arkvale."), event["dur"])
        for event in events
        if event.get("ph") == "X" and str(event.get("name", "")).startswith("arkvale.")
    )
    starts = [begin for begin, name, _ in named if name == "attend"][::layers][2:]
    whole = (starts[-1] - starts[0]) / (len(starts) - 1)
    spent: dict[str, float] = defaultdict(float)
    for begin, name, elapsed in named:
        if starts[0] <= begin < starts[-1]:
            spent[name] += elapsed / (len(starts) - 1)
    shares = {name: spent[name] / whole for name in PARTS}
    return {**shares, "rest": 1 - sum(shares.values())}
