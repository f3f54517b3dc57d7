"""Where the time of a decode step goes, by SGLang's own profiler on a running server."""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arkvale_sglang.cli.launch import Server
from bench.latency import DEVICE_TOKENS
from bench.sides import ARKVALE, COMMON, Log, Row, body, per_token, prompt

PARTS = ("append", "score", "select", "resolve", "recall", "attend")
STEPS = 24


def breakdown(model: Path, contexts: Sequence[int], layers: int, log: Log) -> Iterator[Row]:
    """Milliseconds of every part of a decode step at a budget of 1024, and of all else.

    The profiler slows ops down, so its shares are applied to the time without it.
    """
    flags = [
        *COMMON, *ARKVALE, "--max-total-tokens", str(2 * sum(contexts)), "--arkvale-budget",
        "1024", "--arkvale-device-tokens", str(DEVICE_TOKENS), "--arkvale-host-memory", "3",
        "--arkvale-dense-layers", "0",
    ]  # fmt: skip
    with Server(model, flags) as server:
        for context in contexts:
            yield from _parts(server, context, layers, log)


def _parts(server: Server, context: int, layers: int, log: Log) -> Iterator[Row]:
    tokens = prompt(context, "steps")
    whole = statistics.median(per_token(server, [tokens], 2 * STEPS) for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        server.post("/start_profile", {"output_dir": folder, "activities": ["CPU"]})
        server.post("/generate", body(tokens, STEPS))
        server.post("/stop_profile", {})
        shares = shares_of(_trace(Path(folder)), layers)
    for name, share in shares.items():
        log(f"step at {context:6d}  {name:8s} {share * whole:7.3f} ms  {100 * share:5.1f} %")
        yield {
            "case": "step",
            "part": name,
            "context": context,
            "batch": 1,
            "budget": 1024,
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
