"""Speed and capacity, side by side with stock SGLang in one run.

    make bench                  under half an hour, writes docs/performance.md
    make bench ARGS=--quick     about 5 minutes, writes under build/bench

Writes ``bench.json``: a row for every case, with the medians of both sides, the median ratio of the
rounds and its spread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arkvale_sglang.cli.launch import leave_blocks_on_sigterm
from bench import latency, report, throughput
from bench.sides import Log, Row
from conditions import conditions
from tiny_model import make_model

ROOT = Path(__file__).resolve().parents[2]
K = 1024
LAYERS = 4
MODELS = {
    "mha": "Llama of 4 layers, 8 query and 8 KV heads of 64, as the paper's model has one KV head "
    "for each query head",
    "gqa": "the same with 2 KV heads",
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured."""

    contexts: dict[int, tuple[int, ...]]
    """Context lengths and the batch sizes of each."""
    budgets: tuple[int, ...]
    others: int
    """Context at which the GQA model and dense layers are measured."""
    profiled: tuple[int, ...]
    """Contexts of which a step's parts are told."""
    follow_ups: tuple[int, ...]
    loads: tuple[throughput.Load, ...]
    prefill_factors: tuple[int, ...]
    rounds: int
    sections: tuple[str, ...]


SECTIONS = (
    "under_budget", "decode", "others", "follow_up", "prefill", "throughput", "watching",
)  # fmt: skip
DEFAULT = Scale(
    contexts={
        512: (1, 4, 8), 2 * K: (1, 4, 8), 4 * K: (1,), 8 * K: (1, 4, 8), 16 * K: (1,),
        32 * K: (1,), 64 * K: (1,),
    },
    budgets=(512, 1024, 2048, 4096), others=16 * K, profiled=(4 * K, 32 * K, 64 * K),
    follow_ups=(K, 4 * K, 16 * K, 32 * K),
    loads=throughput.LOADS, prefill_factors=(1, 2, 4, 8), rounds=3, sections=SECTIONS,
)  # fmt: skip
QUICK = Scale(
    contexts={512: (1,), 8 * K: (1, 4)}, budgets=(1024,), others=8 * K, profiled=(8 * K,),
    follow_ups=(8 * K,),
    loads=(dataclasses.replace(throughput.LOADS[1], chats=12, new=32),),
    prefill_factors=(1, 4), rounds=1,
    sections=("under_budget", "decode", "follow_up", "throughput"),
)  # fmt: skip
FULL = dataclasses.replace(
    DEFAULT,
    contexts={n * K // 2: (1, 4, 8) if n <= 32 else (1, 4) for n in (1, 4, 8, 16, 32, 64, 128)},
    rounds=5,
)


def measure(scale: Scale, chosen: tuple[str, ...], folder: Path, log: Log) -> Iterator[Row]:
    """Rows of the result, as they come."""
    mha = make_model(folder / "mha", layers=LAYERS, kv_heads=8)
    one = {scale.others: (1,)}
    repeats = min(2, scale.rounds)  # of what takes minutes
    for number, name in enumerate(chosen, 1):
        log(f"section {number} of {len(chosen)}: {name}")
        match name:
            case "under_budget":
                yield from latency.under_budget(mha, 4 * scale.rounds, log)
            case "decode":
                yield from latency.decoding(
                    "decode", mha, scale.contexts, scale.budgets, scale.rounds, log,
                    profiled=scale.profiled,
                )  # fmt: skip
            case "others":
                gqa = make_model(folder / "gqa", layers=LAYERS, kv_heads=2)
                yield from latency.decoding("decode_gqa", gqa, one, (1024,), scale.rounds, log)
                yield from latency.decoding(
                    "decode_dense_2", mha, one, (1024,), scale.rounds, log, dense_layers=2
                )
            case "follow_up":
                yield from latency.follow_ups(mha, scale.follow_ups, repeats, log)
            case "prefill":
                yield from latency.prefilling(mha, 2 * K, scale.prefill_factors, repeats, log)
            case "throughput":
                yield from throughput.throughput(mha, scale.loads, repeats, log)
            case "watching":
                yield from latency.watching(mha, 3 * scale.rounds, log)


def options() -> argparse.Namespace:
    """What was asked for; a part of the whole does not go where the whole is kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="scale", action="store_const", const=QUICK)
    size.add_argument("--full", dest="scale", action="store_const", const=FULL)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="repeatable")
    parser.add_argument("--out", type=Path, help="folder of bench.json")
    parser.add_argument("--docs", type=Path, help="folder of performance.md and its images")
    parser.set_defaults(scale=DEFAULT)
    chosen = parser.parse_args()
    part = bool(chosen.only) or chosen.scale is QUICK
    chosen.out = chosen.out or ROOT / ("build/bench" if part else "benchmarks/results")
    chosen.docs = chosen.docs or ROOT / ("build/bench" if part else "docs")
    return chosen


def main() -> int:
    chosen = options()
    leave_blocks_on_sigterm()
    begin, about = time.monotonic(), conditions()

    def log(line: str) -> None:
        print(f"  {(time.monotonic() - begin) / 60:5.1f} min  {line}", flush=True)

    sections: tuple[str, ...] = tuple(chosen.only or chosen.scale.sections)
    chosen.out.mkdir(parents=True, exist_ok=True)
    chosen.docs.mkdir(parents=True, exist_ok=True)
    if chosen.docs.resolve() != ROOT / "docs":
        shutil.copy(ROOT / "docs" / report.PAGE, chosen.docs)
    rows: list[Row] = []

    def save(name: str) -> None:
        minutes = round((time.monotonic() - begin) / 60, 1)
        found: dict[str, Any] = {**about, "minutes": minutes, "models": MODELS, "rows": rows}
        found["rounds"] = chosen.scale.rounds
        (chosen.out / name).write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        for row in measure(chosen.scale, sections, Path(folder), log):
            rows.append(row)
            save("bench.json.part")
    save("bench.json")
    (chosen.out / "bench.json.part").unlink()
    print(f"\n{chosen.out / 'bench.json'}\n{report.write(chosen.out, chosen.docs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
