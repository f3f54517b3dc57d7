"""Stock SGLang and the arkvale policy in turn: same machine, same model, same requests.

    python benchmarks/smoke.py [--rounds 5] [--out benchmarks/results/smoke.json]

Both servers run at once, and each is suspended while the other is measured, so that every ratio
compares neighbours in time.  Cases: decode at 16K context with a 1K budget, 16 new tokens on a
cached 16K prefix, and decode at 512 tokens, where nothing is evicted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from arkvale_sglang.cli.launch import Server
from conditions import conditions

ROOT = Path(__file__).resolve().parent.parent
LONG, SHORT, NEW, DECODED = 16384, 512, 16, 48
COMMON = ["--max-total-tokens", "65536", "--random-seed", "1", "--log-level", "warning"]
ARKVALE = [
    *COMMON,
    "--kv-policy", "arkvale",
    "--arkvale-budget", "1024",
    "--arkvale-device-tokens", "8192",
    "--arkvale-host-memory", "1",
]  # fmt: skip
CASES = ("decode_16k", "extend_cached_16k", "under_budget_512")


class Probe:
    """Requests of one run: both servers get the same tokens."""

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self._tail = rng.getrandbits(32)
        self._long = [rng.randrange(2, 258) for _ in range(LONG)]
        self._short = [rng.randrange(2, 258) for _ in range(SHORT)]

    def run(self, server: Server, case: str, turn: int) -> float:
        """Milliseconds of one case: per token for decode, to the first token for the extend."""
        if case == "decode_16k":
            return _per_token(server, self._long)
        if case == "under_budget_512":
            return _per_token(server, self._short)
        rng = random.Random(self._tail + turn)
        tail = [rng.randrange(2, 258) for _ in range(NEW)]
        start = time.perf_counter()
        answer = server.post("/generate", _request([*self._long, *tail], 1))
        elapsed = time.perf_counter() - start
        cached = answer["meta_info"]["cached_tokens"]
        if cached < LONG - 64:
            raise SystemExit(f"error: only {cached} tokens were cached; the measurement is void.")
        return elapsed * 1e3


def _request(tokens: list[int], new: int) -> dict:
    return {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
    }


def _per_token(server: Server, tokens: list[int]) -> float:
    """Median gap between tokens, the first ones left out."""
    stamps = [time.perf_counter() for _ in server.stream(_request(tokens, DECODED))]
    gaps = [later - earlier for earlier, later in itertools.pairwise(stamps[4:])]
    return statistics.median(gaps) * 1e3


def measure(stock: Server, ours: Server, rounds: int) -> list[dict]:
    """Rows of the result: medians over rounds, and the median of the rounds' ratios."""
    probe = Probe(seed=7)
    sides = {"stock": (stock, ours), "arkvale": (ours, stock)}
    times: dict[str, dict[str, list[float]]] = {case: {s: [] for s in sides} for case in CASES}
    for turn in range(-1, rounds):
        for case in CASES:
            for side, (server, other) in sides.items():
                with other.paused():
                    elapsed = (
                        probe.run(server, case, turn) if turn >= 0 or case != CASES[1] else 0.0
                    )
                if turn >= 0:
                    times[case][side].append(elapsed)
            if turn >= 0:
                now = {side: times[case][side][-1] for side in sides}
                print(
                    f"round {turn + 1}/{rounds}  {case:20s} stock {now['stock']:9.2f} ms"
                    f"  arkvale {now['arkvale']:9.2f} ms",
                    flush=True,
                )
    rows = []
    for case in CASES:
        pairs = zip(times[case]["stock"], times[case]["arkvale"], strict=True)
        ratios = sorted(theirs / mine for theirs, mine in pairs)
        rows.append(
            {
                "case": case,
                "stock_ms": round(statistics.median(times[case]["stock"]), 3),
                "arkvale_ms": round(statistics.median(times[case]["arkvale"]), 3),
                "ratio": round(statistics.median(ratios), 3),
                "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
        )
    return rows


def record(rounds: int, rows: list[dict]) -> dict:
    """What is written: the figures and all that they belong to."""
    return {
        **conditions(),
        "model": "llama, 4 layers (2 dense under arkvale), 8 heads, 2 KV heads of 64, bfloat16",
        "flags": {"stock": " ".join(COMMON), "arkvale": " ".join(ARKVALE)},
        "rounds": rounds,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/smoke.json")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    from tiny_model import make_model

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "bench_model")
        print("starting both servers ...", flush=True)
        with Server(model, COMMON) as stock, Server(model, ARKVALE) as ours:
            rows = measure(stock, ours, options.rounds)
            counters = ours.arkvale()
    if not counters["pages_evicted"] or not counters["pages_recalled"]:
        raise SystemExit("error: nothing was evicted and recalled; the measurement is void.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record(options.rounds, rows), indent=1) + "\n")
    print(f"\n{'case':20s} {'stock ms':>10s} {'arkvale ms':>11s} {'ratio':>7s}   spread")
    for row in rows:
        print(
            f"{row['case']:20s} {row['stock_ms']:10.2f} {row['arkvale_ms']:11.2f} "
            f"{row['ratio']:7.2f}   {row['spread'][0]:.2f} to {row['spread'][1]:.2f}"
        )
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
