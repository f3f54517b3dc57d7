"""Throughput at equal device memory for the KV cache: stock queues and recomputes, ours recalls."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arkvale_sglang.cli.launch import Server
from bench.latency import must_have_evicted
from bench.sides import ARKVALE, Log, Row, row, sides

DEVICE_TOKENS = 8192
"""On either side: stock's whole pool, and the frames of the policy."""
BUDGET = 256


@dataclasses.dataclass(frozen=True)
class Load:
    """Chats that arrive at once, as ``sglang.bench_serving`` makes them."""

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

    def options(self) -> list[str]:
        """Of ``sglang.bench_serving``."""
        if not self.shared:
            return [
                "--dataset-name", "random-ids", "--num-prompts", str(self.chats),
                "--random-input-len", str(self.message), "--random-output-len", str(self.new),
                "--random-range-ratio", "1",
            ]  # fmt: skip
        groups, members = (1, self.chats) if self.turns == 1 else (self.chats, 1)
        return [
            "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(groups),
            "--gsp-prompts-per-group", str(members), "--gsp-system-prompt-len", str(self.shared),
            "--gsp-question-len", str(self.message), "--gsp-output-len", str(self.new),
            "--gsp-num-turns", str(self.turns), "--gsp-range-ratio", "1", "--gsp-fast-prepare",
        ]  # fmt: skip


LOADS = (
    Load("long_prompts", chats=32, shared=0, message=4000, new=512),
    Load("shared_prefix", chats=25, shared=6000, message=200, new=128),
    Load("returning_chats", chats=16, shared=4000, message=100, new=64, turns=3),
)


def throughput(model: Path, loads: Sequence[Load], rounds: int, log: Log) -> Iterator[Row]:
    """Seconds for each load, with tokens per second and latencies."""
    stock = ["--max-total-tokens", str(DEVICE_TOKENS)]
    arkvale = [
        *ARKVALE, "--max-total-tokens", "262144", "--arkvale-budget", str(BUDGET),
        "--arkvale-device-tokens", str(DEVICE_TOKENS), "--arkvale-host-memory", "3",
        "--arkvale-dense-layers", "0",
    ]  # fmt: skip
    with sides(model, stock, arkvale) as both:
        for load in loads:
            held: dict[str, list[dict[str, Any]]] = {"stock": [], "arkvale": []}
            for number in range(rounds):
                for side, server in both.each():
                    held[side].append(hold(server, model, load, number))
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
            }
        must_have_evicted(both.arkvale)


def hold(server: Server, model: Path, load: Load, seed: int) -> dict[str, Any]:
    """What ``sglang.bench_serving`` found on one load."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.jsonl"
        command = [
            sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang",
            "--base-url", server.url, "--model", str(model), "--tokenizer", str(model),
            "--seed", str(seed), "--flush-cache", "--warmup-requests", "0", "--disable-tqdm",
            "--output-file", str(out), *load.options(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode or not out.exists():
            raise RuntimeError(f"sglang.bench_serving failed: {(done.stdout + done.stderr)[-2000:]}")
        found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    asked = load.chats * load.turns
    if found["completed"] != asked:
        raise RuntimeError(f"only {found['completed']} of {asked} requests were answered.")
    return found
