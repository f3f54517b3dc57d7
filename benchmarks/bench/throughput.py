"""Throughput at equal device memory for the KV cache: stock queues and recomputes, ours recalls."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arkvale_sglang.cli.launch import Server
from bench.latency import must_have_evicted
from bench.sides import ARKVALE, Log, Row, body, peak_bytes, prompt, row, sides, together

DEVICE_TOKENS = 8192
"""On either side: stock's whole pool, and the frames of the policy."""
BUDGET = 512
PAGE = 64
"""Room for the page that each chat leaves unfilled."""


@dataclasses.dataclass(frozen=True)
class Load:
    """Chats that arrive at once."""

    case: str
    chats: int
    shared: int
    """Tokens of a document: one for all chats, or each its own where they take turns."""
    message: int
    """Tokens of each message."""
    new: int
    """Tokens of each answer."""
    turns: int = 1

    @property
    def context(self) -> int:
        """Tokens of a chat's first prompt."""
        return self.shared + self.message

    @property
    def tokens(self) -> int:
        """All that the chats come to hold, shared documents once."""
        documents = 1 if self.turns == 1 else self.chats
        return documents * self.shared + self.chats * self.turns * (self.message + self.new)


LOADS = (
    Load("long_prompts", chats=16, shared=0, message=4000, new=256),
    Load("shared_prefix", chats=25, shared=6000, message=200, new=64),
    Load("returning_chats", chats=10, shared=4000, message=100, new=64, turns=2),
)


def throughput(model: Path, loads: Sequence[Load], rounds: int, log: Log) -> Iterator[Row]:
    """Seconds for each load, with tokens per second and latencies."""
    stock = ["--max-total-tokens", str(DEVICE_TOKENS)]
    most = max(load.tokens + load.chats * PAGE for load in loads)
    arkvale = [
        *ARKVALE, "--max-total-tokens", str(most), "--arkvale-budget", str(BUDGET),
        "--arkvale-device-tokens", str(DEVICE_TOKENS), "--arkvale-host-memory", "3",
        "--arkvale-dense-layers", "0",
    ]  # fmt: skip
    with sides(model, stock, arkvale) as both:
        for load in loads:
            held: dict[str, list[dict[str, Any]]] = {"stock": [], "arkvale": []}
            evicted = both.arkvale.arkvale()["pages_evicted"]
            for number in range(rounds):
                for side, server in both.each():
                    held[side].append(hold(server, model, load, number))
            must_have_evicted(both.arkvale, evicted)
            seconds = {side: [run["duration"] for run in runs] for side, runs in held.items()}
            where = {"context": load.context, "batch": load.chats, "budget": BUDGET}
            yield {
                **row(load.case, seconds, log, "s", **where),
                **{
                    name: {
                        side: round(statistics.median(run[key] for run in runs), 3)
                        for side, runs in held.items()
                    }
                    for name, key in (
                        ("tokens_per_second", "output_throughput"),
                        ("first_token_ms", "median_ttft_ms"),
                        ("token_ms", "median_itl_ms"),
                    )
                },
                "load": dataclasses.asdict(load),
                "bytes": both.arkvale.arkvale()["bytes"],
                "peak_bytes": {side: peak_bytes(server) for side, server in vars(both).items()},
            }


def hold(server: Server, model: Path, load: Load, seed: int) -> dict[str, Any]:
    """Seconds for the load and latencies, by ``sglang.bench_serving`` where it knows such a load:
    its shared prefixes are text, whose tokens it cannot count exactly."""
    # With a timeout: an answer is read before its request is retired.
    server.post("/flush_cache?timeout=60", {})
    if load.shared:
        return _talk(server, load, seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.jsonl"
        command = [
            sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang",
            "--base-url", server.url, "--model", str(model), "--tokenizer", str(model),
            "--seed", str(seed), "--warmup-requests", "0", "--disable-tqdm",
            "--dataset-name", "random-ids", "--tokenize-prompt", "--num-prompts", str(load.chats),
            "--random-input-len", str(load.message), "--random-output-len", str(load.new),
            "--random-range-ratio", "1", "--output-file", str(out),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode or not out.exists():
            said = (done.stdout + done.stderr)[-2000:]
            raise RuntimeError(f"sglang.bench_serving failed: {said}")
        found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    if found["total_output_tokens"] != load.chats * load.new:
        raise RuntimeError(f"only {found['total_output_tokens']} tokens were answered.")
    return found


def _talk(server: Server, load: Load, seed: int) -> dict[str, Any]:
    """The same figures for chats on one document, or on a document each where they take turns."""
    first: list[float] = []
    gaps: list[float] = []

    def chat(number: int) -> None:
        document = (seed, "all" if load.turns == 1 else number)
        history = prompt(load.shared, document)
        for turn in range(load.turns):
            history += prompt(load.message, (seed, number, turn))
            stamps = [time.perf_counter()]
            answer: list[int] = []
            for part in server.stream(body(history, load.new)):
                stamps.append(time.perf_counter())
                answer = part["output_ids"]
            if len(answer) != load.new:
                raise RuntimeError(f"only {len(answer)} of {load.new} tokens were answered.")
            history += answer
            first.append(stamps[1] - stamps[0])
            gaps.extend(after - before for before, after in itertools.pairwise(stamps[1:]))

    begin = time.perf_counter()
    together(chat, range(load.chats))
    duration = time.perf_counter() - begin
    return {
        "duration": duration,
        "output_throughput": load.chats * load.turns * load.new / duration,
        "median_ttft_ms": 1e3 * statistics.median(first),
        "median_itl_ms": 1e3 * statistics.median(gaps),
    }
