"""Speed and capacity, side by side with stock SGLang in one run.

    PYTHONPATH=examples:benchmarks python -m bench [--quick | --full] [--only SECTION]

Writes ``bench.json`` under ``--out``: a row for every case, with the medians of both sides, the
median ratio of the rounds and its spread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import latency, throughput
from conditions import conditions
from tiny_model import make_model

ROOT = Path(__file__).resolve().parents[2]
K = 1024


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured."""

    contexts: dict[int, tuple[int, ...]]
    """Context lengths and the batch sizes of each."""
    budgets: tuple[int, ...]
    follow_ups: tuple[int, ...]
    loads: tuple[throughput.Load, ...]
    prefill_factors: tuple[int, ...]
    rounds: int


DEFAULT = Scale(
    contexts={512: (1, 4, 8), 2 * K: (1, 4, 8), 8 * K: (1, 4, 8), 16 * K: (1, 4), 32 * K: (1,),
              64 * K: (1,)},
    budgets=(512, 1024, 2048, 4096), follow_ups=(K, 4 * K, 16 * K, 32 * K),
    loads=throughput.LOADS, prefill_factors=(1, 2, 4, 8), rounds=2,
)  # fmt: skip
QUICK = Scale(
    contexts={512: (1,), 8 * K: (1, 4)}, budgets=(1024,), follow_ups=(4 * K,),
    loads=tuple(dataclasses.replace(load, chats=6, new=16) for load in throughput.LOADS[1:2]),
    prefill_factors=(1, 4), rounds=1,
)  # fmt: skip
FULL = dataclasses.replace(
    DEFAULT, contexts={n * K // 2: (1, 4, 8) for n in (1, 4, 16, 32, 64, 128)}, rounds=5
)
SECTIONS = ("under_budget", "decode", "follow_up", "prefill", "throughput")


def measure(
    scale: Scale, chosen: tuple[str, ...], model: Path, log: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Rows of the result, as they come."""
    sections: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "under_budget": lambda: latency.under_budget(model, 3 * scale.rounds, log),
        "decode": lambda: latency.decoding(model, scale.contexts, scale.budgets, scale.rounds, log),
        "follow_up": lambda: latency.follow_ups(model, scale.follow_ups, scale.rounds, log),
        "prefill": lambda: latency.prefilling(
            model, 4 * K, scale.prefill_factors, scale.rounds, log
        ),
        "throughput": lambda: throughput.throughput(model, scale.loads, scale.rounds, log),
    }
    for number, name in enumerate(chosen, 1):
        log(f"section {number} of {len(chosen)}: {name}")
        yield from sections[name]()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="scale", action="store_const", const=QUICK)
    size.add_argument("--full", dest="scale", action="store_const", const=FULL)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.set_defaults(scale=DEFAULT)
    options = parser.parse_args()
    if (options.only or options.scale is QUICK) and options.out == parser.get_default("out"):
        parser.error(
            "--quick and --only measure a part, which would replace the whole in bench.json; name "
            "another folder with --out"
        )
    begin, about = time.monotonic(), conditions()

    def log(line: str) -> None:
        print(f"  {(time.monotonic() - begin) / 60:5.1f} min  {line}", flush=True)

    chosen = tuple(options.only or SECTIONS)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "bench_model")
        rows = list(measure(options.scale, chosen, model, log))
    about["minutes"] = round((time.monotonic() - begin) / 60, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"\n{options.out / 'bench.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
