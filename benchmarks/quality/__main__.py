"""Measure quality under a budget, on the needle model, by real servers.

    PYTHONPATH=examples:benchmarks python -m quality [--full] [--only TASK]

Writes ``quality.csv``, ``digests.csv`` and ``quality.json`` under ``--out``, then the tables of
``quality.md`` and its plots under ``--docs`` from them.  ``--full`` asks more, ``--small`` a little
of the main rules.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from arkvale_sglang.cli.launch import Server
from conditions import conditions
from needle_model import text
from quality import digests, report
from quality.plan import DEFAULT, FULL, SMALL, TASKS, Scale, episodes, grouped, plans
from quality.servers import COMMON, Examiner, by_server

ROOT = Path(__file__).resolve().parents[2]


def measure(scale: Scale, chosen: Sequence[str], model: Path) -> Iterator[dict[str, object]]:
    """Rows of the CSV, as they come."""
    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = text.Writer(tokenizer)
    groups = [group for task in chosen for group in grouped(episodes(task, writer, scale))]
    asked_of = plans(scale)
    servers = by_server([rule for rule, asked in asked_of.items() if set(asked) & set(chosen)])
    for number, (flags, rules) in enumerate(servers.items(), 1):
        print(f"\nserver {number} of {len(servers)}: {' '.join(flags)}", flush=True)
        with Server(model, [*COMMON, *flags]) as server:
            examiner = Examiner(server, tokenizer)
            # Rules inside, groups outside: the next rule finds the prompts in the prefix cache.
            for (task, length, depth), held in groups:
                for rule in (r for r in rules if task in asked_of[r]):
                    tally = examiner.hold(held, rule)
                    where = {"task": task, "length": length, "depth": depth}
                    yield {**where, **dataclasses.asdict(rule), **dataclasses.asdict(tally)}
                    print(
                        f"  {(time.monotonic() - begin) / 60:5.1f} min  {task:9s}{length:6d} "
                        f"{depth:5.2f}  {rule.name:18s}{rule.budget:5d}  "
                        f"{tally.right}/{tally.asked}",
                        flush=True,
                    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--full", dest="scale", action="store_const", const=FULL)
    scale.add_argument("--small", dest="scale", action="store_const", const=SMALL)
    parser.add_argument("--only", choices=TASKS, action="append", help="tasks (default: all)")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/needle_model/model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.set_defaults(scale=DEFAULT)
    options = parser.parse_args()
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "quality.csv"
    rows = []
    for row in measure(options.scale, options.only or TASKS, options.model):
        rows.append(row)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows)
    digests.study(options.model, options.out, options.scale.haystack)
    minutes = round((time.monotonic() - begin) / 60, 1)
    (options.out / "quality.json").write_text(
        json.dumps({**conditions(), "minutes": minutes}, indent=1) + "\n"
    )
    print(f"\n{report.write(options.out, options.docs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
