"""Stock SGLang and the policy on one machine, measured in turn on the same requests."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from arkvale_sglang.cli.launch import Server

Row = dict[str, Any]
Log = Callable[[str], None]
Average = Callable[[list[float]], float]
Item = TypeVar("Item")

COMMON = ["--random-seed", "1", "--log-level", "warning", "--context-length", "131072"]
STOCK = ["--chunked-prefill-size", "-1", "--mem-fraction-static", "0.8"]
"""Stock attends to a cached prefix as if it were new, so chunks would cost it their number."""
ARKVALE = ["--kv-policy", "arkvale", "--chunked-prefill-size", "4096"]
VOCABULARY = (2, 258)
WARM = 3
"""First gaps between tokens, which are left out."""
SETTLING = 4
"""Likewise, of a window."""


@dataclasses.dataclass
class Sides:
    """Two running servers; while one is measured the other's processes are suspended."""

    stock: Server
    arkvale: Server

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[Server]:
        """The server of one side, alone on the machine and awake inside the block."""
        server, other = self.stock, self.arkvale
        if name == "arkvale":
            server, other = other, server
        with other.paused():
            first_token(server, [VOCABULARY[0]])
            yield server

    def each(self) -> Iterator[tuple[str, Server]]:
        """Name and server of one side after the other, each alone."""
        for name in ("stock", "arkvale"):
            with self.alone(name) as server:
                yield name, server


@contextlib.contextmanager
def sides(model: Path, stock: Sequence[str], arkvale: Sequence[str]) -> Iterator[Sides]:
    """Start both, one after the other, for the length of the block.

    ``stock`` may be the policy too, where two of its settings are compared.
    """
    plain = [] if "--kv-policy" in stock else STOCK
    servers = [Server(model, [*COMMON, *plain, *stock])]
    try:
        servers[0].start()
        servers.append(Server(model, [*COMMON, *arkvale]))
        with servers[0].paused():
            servers[1].start()
        yield Sides(*servers)
    finally:
        together(Server.stop, servers)


def prompt(length: int, seed: object) -> list[int]:
    """Random tokens; the same seed gives the same ones."""
    rng = random.Random(str(seed))
    return [rng.randrange(*VOCABULARY) for _ in range(length)]


def body(
    tokens: Sequence[int] | Sequence[list[int]], new: int, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A request of ``/generate``, or several as one, that decodes exactly ``new`` tokens each."""
    sampling: dict[str, Any] = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    if settings:
        sampling["custom_params"] = {"arkvale": settings}
    return {"input_ids": tokens, "sampling_params": sampling}


def first_token(server: Server, tokens: list[int]) -> float:
    """Milliseconds from the request to its only token."""
    begin = time.perf_counter()
    server.post("/generate", body(tokens, 1))
    return (time.perf_counter() - begin) * 1e3


def per_token(
    server: Server,
    prompts: Sequence[list[int]],
    new: int,
    settings: dict[str, Any] | None = None,
) -> float:
    """Median milliseconds between tokens while all requests decode together."""
    # As one request: clients of their own would have to get through to a server that is busy.
    return _gap(_arrivals(server.stream(body(prompts, new, settings)), len(prompts)), WARM)


@contextlib.contextmanager
def windows(
    server: Server,
    prompts: Sequence[list[int]],
    new: int,
    most: int,
    average: Average = statistics.median,
) -> Iterator[Callable[[], float]]:
    """Requests that decode together while the block lasts, for up to ``most`` windows of ``new``
    tokens: each call waits for one and returns its average milliseconds between tokens.

    Between calls the server may be suspended.  What it sends before that is in the next window's
    first gaps, which are left out, as is what it computes when it wakes.
    """
    answers = server.stream(body(prompts, most * (new + 2 * SETTLING)))

    def window() -> float:
        return _gap(_arrivals(answers, len(prompts), new + SETTLING), SETTLING, average)

    with contextlib.closing(answers):
        yield window


def _arrivals(
    answers: Iterator[dict[str, Any]], requests: int, most: float = math.inf
) -> list[list[tuple[float, int]]]:
    """Seconds and tokens so far of every answer, until each request has had so many tokens more."""
    seen: list[list[tuple[float, int]]] = [[] for _ in range(requests)]
    for part in answers:
        if "error" in part:
            raise RuntimeError(part["error"]["message"])
        own = seen[part.get("index", 0)]
        own.append((time.perf_counter(), part["meta_info"]["completion_tokens"]))
        if all(own and own[-1][1] - own[0][1] >= most for own in seen):
            break
    return seen


def _gap(
    seen: list[list[tuple[float, int]]], settling: int, average: Average = statistics.median
) -> float:
    """Milliseconds between tokens of requests, from when all have begun until one ends; a busy
    server may send several tokens in one answer."""
    gaps = []
    if all(seen):
        start, end = max(own[0][0] for own in seen), min(own[-1][0] for own in seen)
        gaps = [
            (later - earlier) / (tokens - before)
            for own in seen
            for (earlier, before), (later, tokens) in itertools.pairwise(own[settling:])
            if earlier >= start and later <= end
            for _ in range(before, tokens)
        ]
    if len(gaps) < len(seen):
        raise RuntimeError(
            "the requests never decoded together, so nothing was measured; decode more tokens."
        )
    return average(gaps) * 1e3


def together(work: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Run ``work`` for every item at once; the first failure is raised."""
    failures: list[BaseException] = []

    def run(item: Item) -> None:
        try:
            work(item)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def peak_bytes(server: Server) -> int:
    """Most resident memory that any process of the server has had: its scheduler's."""
    root = psutil.Process(server.pid)
    peaks = []
    for process in (root, *root.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text()
        line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
        if line:
            peaks.append(int(line.split()[1]) * 1024)
    return max(peaks)


def row(case: str, times: dict[str, list[float]], log: Log, unit: str, **where: Any) -> Row:
    """A line of the result: medians, the median ratio of the rounds, its spread, and every round.

    A round holds both sides, one after the other, so that a ratio compares neighbours in time.
    """
    ratios = sorted(
        theirs / ours for theirs, ours in zip(times["stock"], times["arkvale"], strict=True)
    )
    found = {
        "case": case,
        **{"context": None, "batch": 1, "budget": None, **where},
        "stock": round(statistics.median(times["stock"]), 3),
        "arkvale": round(statistics.median(times["arkvale"]), 3),
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
        "rounds": {side: [round(time, 3) for time in own] for side, own in times.items()},
        "unit": unit,
    }
    log(
        f"{case:22s} {found['context']:6d} x {found['batch']:<3d} budget {found['budget']:5d}  "
        f"{found['stock']:10.2f} -> {found['arkvale']:9.2f} {unit:2s} {found['ratio']:7.2f}x"
    )
    return found
