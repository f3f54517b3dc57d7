"""Latency: time per token, follow-up turns, cost while nothing is evicted, prefill, watching."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import zmq

from arkvale_sglang.cli.launch import Server
from arkvale_sglang.runtime.publish import STATS
from bench import steps
from bench.sides import (
    ARKVALE,
    Log,
    Row,
    Sides,
    body,
    first_token,
    peak_bytes,
    per_token,
    prompt,
    row,
    sides,
    windows,
)

DECODED = 32
POOL = 300_000
"""Tokens that stock's pool holds: all that is asked of it, so that it never evicts."""
DEVICE_TOKENS = 32_768
"""Tokens that the policy's frames hold: eight rows of the largest budget."""
FOLLOW_UP = 16
"""Tokens of a follow-up message."""
WATCHED = 320
"""Tokens of a window in which several messages are sent."""
EXPORTED = 960
"""Tokens of an answer during which Prometheus is told several times."""


def decoding(
    case: str,
    model: Path,
    contexts: dict[int, tuple[int, ...]],
    budgets: Sequence[int],
    rounds: int,
    log: Log,
    dense_layers: int = 0,
    profiled: Sequence[int] = (),
) -> Iterator[Row]:
    """Time per output token over context, batch and budget, and where it goes.

    Args:
        contexts: batch sizes of each context length.
        profiled: contexts at which the parts of a step are told, of one request at a budget of
            1,024.
        dense_layers: layers that the policy leaves alone.
    """
    pool = ["--max-total-tokens", str(POOL)]
    budget = min(1024, max(budgets))
    arkvale = [
        *ARKVALE, *pool, "--arkvale-budget", str(max(budgets)), "--arkvale-device-tokens",
        str(DEVICE_TOKENS), "--arkvale-host-memory", "3",
        "--arkvale-dense-layers", str(dense_layers),
    ]  # fmt: skip
    with sides(model, pool, arkvale) as both:
        for context, batches in contexts.items():
            for batch in batches:
                prompts = [prompt(context, (context, index)) for index in range(batch)]
                yield from _grid(case, both, prompts, budgets, rounds, log)
                if context in profiled and batch == 1:
                    with both.alone("arkvale") as server:
                        yield from steps.parts(server, prompts[0], budget, log)
        if len(profiled) > 1:
            with both.alone("arkvale") as server:
                yield growth(server, min(profiled), max(profiled), budget, 4 * rounds, log)
        asked = sum(context * max(batches) for context, batches in contexts.items())
        if asked > DEVICE_TOKENS:
            must_have_evicted(both.arkvale)


def _grid(
    case: str,
    both: Sides,
    prompts: list[list[int]],
    budgets: Sequence[int],
    rounds: int,
    log: Log,
) -> Iterator[Row]:
    context, batch = len(prompts[0]), len(prompts)
    stock: list[float] = []
    ours: dict[int, list[float]] = {budget: [] for budget in budgets}
    with both.alone("arkvale") as server:
        for tokens in prompts:  # one by one: prefill is not what is measured here
            first_token(server, tokens)
    # Stock computes a prefix again whether it has it or not, so one request serves all rounds.
    with windows(both.stock, prompts, DECODED, rounds) as window:
        for _ in range(rounds):
            with both.arkvale.paused():
                stock.append(window())
            with both.alone("arkvale") as server:
                for budget, times in ours.items():
                    times.append(per_token(server, prompts, DECODED, {"budget": budget}))
    for budget, times in ours.items():
        where = {"context": context, "batch": batch, "budget": budget}
        yield row(case, {"stock": stock, "arkvale": times}, log, "ms", **where)


def growth(server: Server, short: int, long: int, budget: int, rounds: int, log: Log) -> Row:
    """A token over a long cached context beside one over a short one, in turn, since a shared
    machine is slower in some minutes: in this row ``stock`` is the short context."""
    settings, times = {"budget": budget}, {"stock": [], "arkvale": []}
    both = [[prompt(context, (context, 0))] for context in (short, long)]
    for turn in range(-1, rounds):
        for side, prompts in zip(times, both, strict=True):
            elapsed = per_token(server, prompts, 2 * DECODED, settings)
            if turn >= 0:
                times[side].append(elapsed)
    return {**row("growth", times, log, "ms", context=long, budget=budget), "short": short}


def follow_ups(model: Path, contexts: Sequence[int], rounds: int, log: Log) -> Iterator[Row]:
    """Time to the first token of a short message over a cached context."""
    pool = ["--max-total-tokens", str(POOL)]
    arkvale = [
        *ARKVALE, *pool, "--arkvale-budget", "1024", "--arkvale-device-tokens", "8192",
        "--arkvale-host-memory", "3", "--arkvale-dense-layers", "0",
    ]  # fmt: skip
    with sides(model, pool, arkvale) as both:
        for context in contexts:
            history = prompt(context, context)
            times: dict[str, list[float]] = {"stock": [], "arkvale": []}
            for _, server in both.each():
                first_token(server, history)
            for turn in range(rounds):
                message = prompt(FOLLOW_UP, (context, turn))
                for side, server in both.each():
                    times[side].append(first_token(server, [*history, *message]))
            yield row("follow_up", times, log, "ms", context=context, budget=1024)


def under_budget(model: Path, rounds: int, log: Log) -> Iterator[Row]:
    """Decode and prefill where everything fits and nothing is evicted."""
    roomy = ["--max-total-tokens", "16384"]
    arkvale = [
        *ARKVALE, *roomy, "--arkvale-budget", "4096", "--arkvale-host-memory", "1",
        "--arkvale-dense-layers", "0",
    ]  # fmt: skip
    with sides(model, roomy, arkvale) as both:
        for case, context in (("under_budget_decode", 512), ("under_budget_prefill", 2048)):
            times: dict[str, list[float]] = {"stock": [], "arkvale": []}
            # First prompts fill the pool once: memory that was never touched is slow on any side.
            for turn in range(-10, rounds):
                for side, server in both.each():
                    if case == "under_budget_decode":
                        elapsed = per_token(server, [prompt(context, 0)], 64)
                    else:
                        elapsed = first_token(server, prompt(context, f"fresh {turn}"))
                    if turn >= 0:
                        times[side].append(elapsed)
            found = row(case, times, log, "ms", context=context, budget=4096)
            yield {**found, "dense_layers": 0}
        evicted = both.arkvale.arkvale()["pages_evicted"]
        if evicted:
            raise RuntimeError(f"{evicted} pages were evicted, so the measurement is void.")


def prefilling(
    model: Path, device_tokens: int, factors: Sequence[int], rounds: int, log: Log
) -> Iterator[Row]:
    """Prefill of prompts of several times the device's frames, against frames for all of them:
    in these rows ``stock`` is the policy itself with room for everything."""
    most = device_tokens * max(factors)
    shared = [
        *ARKVALE, "--max-total-tokens", str(2 * most), "--arkvale-budget", "1024",
        "--arkvale-host-memory", "1", "--arkvale-dense-layers", "0",
    ]  # fmt: skip
    large = [*shared, "--arkvale-device-tokens", str(2 * most)]
    small = [*shared, "--arkvale-device-tokens", str(device_tokens)]
    with sides(model, large, small) as both:
        for _, server in both.each():  # memory that was never touched is slow on any side
            first_token(server, prompt(most, "first"))
        for factor in factors:
            context = device_tokens * factor
            times: dict[str, list[float]] = {"stock": [], "arkvale": []}
            for turn in range(rounds):
                for side, server in both.each():
                    # With a timeout: an answer is read before its request is retired.
                    server.post("/flush_cache?timeout=60", {})
                    times[side].append(first_token(server, prompt(context, f"{factor} {turn}")))
            found = row("prefill", times, log, "ms", context=context, budget=1024)
            peaks = {side: peak_bytes(server) for side, server in vars(both).items()}
            yield {**found, "device_tokens": device_tokens, "peak_bytes": peaks}
        if max(factors) > 1:
            must_have_evicted(both.arkvale)


def watching(model: Path, rounds: int, log: Log) -> Iterator[Row]:
    """Decode of a server that has a subscriber, beside one that has no stream: in this row
    ``stock`` is the policy itself, unwatched.  Both export metrics, so that what SGLang's own cost
    is on either side; what the policy does after passes to be seen is told by the server itself.
    """
    watched = [
        *ARKVALE, "--max-total-tokens", "32768", "--arkvale-budget", "1024",
        "--arkvale-device-tokens", "4096", "--arkvale-host-memory", "1",
        "--arkvale-dense-layers", "0", "--enable-metrics",
    ]  # fmt: skip
    where = {"context": 8192, "budget": 1024}
    tokens = prompt(where["context"], 0)
    with (
        sides(model, [*watched, "--arkvale-stream", "off"], watched) as both,
        listening(both.arkvale) as heard,
    ):
        times = _watched_in_turn(both, tokens, rounds, heard)
        must_have_evicted(both.arkvale)
        yield row("watching", times, log, "ms", **where)
        with both.alone("arkvale") as server:
            shares = [_share_of_watching(server, tokens) for _ in range(3)]
        share = statistics.median(shares)
        log(f"watching takes {100 * share:.2f} % of a step")
        yield {
            "case": "watching_share",
            **where,
            "batch": 1,
            "arkvale": round(share, 5),
            "spread": [round(edge(shares), 5) for edge in (min, max)],
            "unit": "of a step",
        }


def _share_of_watching(server: Server, tokens: list[int]) -> float:
    before, begin = server.arkvale()["watching_seconds"], time.perf_counter()
    server.post("/generate", body(tokens, EXPORTED))
    elapsed = time.perf_counter() - begin
    return (server.arkvale()["watching_seconds"] - before) / elapsed


def _watched_in_turn(
    both: Sides, tokens: list[int], rounds: int, heard: list[float]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"stock": [], "arkvale": []}
    with (
        # By the mean: what a message costs falls on one token of many.
        windows(both.stock, [tokens], WATCHED, rounds + 1, average=statistics.mean) as without,
        windows(both.arkvale, [tokens], WATCHED, rounds + 1, average=statistics.mean) as seen,
    ):
        for turn in range(-1, rounds):
            with both.arkvale.paused():
                unwatched = without()
            with both.stock.paused():
                before = len(heard)
                watched = seen()
            # One comes as the server wakes, in the gaps that are left out.
            if len(heard) < before + 2:
                raise RuntimeError(f"{len(heard) - before} messages came: the window is void.")
            if turn >= 0:
                times["stock"].append(unwatched)
                times["arkvale"].append(watched)
    return times


@contextlib.contextmanager
def listening(server: Server) -> Iterator[list[float]]:
    """Subscribe to a server's ``stats`` inside the block; gives the moments at which some came."""
    heard: list[float] = []
    over = threading.Event()

    def listen() -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt_string(zmq.SUBSCRIBE, STATS)
            socket.connect(endpoint)
            while not over.is_set():
                if socket.poll(200):
                    socket.recv_multipart()
                    heard.append(time.monotonic())

    endpoint = server.arkvale()["stream"]
    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield heard
    finally:
        over.set()
        thread.join()


def must_have_evicted(server: Server, before: int = 0) -> None:
    """Raise ``RuntimeError`` if a measurement that needs evictions saw no more than before it."""
    if server.arkvale()["pages_evicted"] <= before:
        raise RuntimeError("nothing was evicted, so the measurement is void.")
