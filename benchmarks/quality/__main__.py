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

from arkvale_sglang.cli.launch import Server, leave_blocks_on_sigterm
from conditions import conditions
from needle_model import text
from quality import digests, report
from quality.plan import DEFAULT, FULL, SMALL, TASKS, Scale, episodes, grouped, plans
from quality.servers import COMMON, Examiner, Tally, by_server

ROOT = Path(__file__).resolve().parents[2]


def measure(scale: Scale, chosen: Sequence[str], model: Path) -> Iterator[dict[str, object]]:
    """Rows of the CSV, as they come: a rule's score on the questions about one text."""
    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = text.Writer(tokenizer)
    groups = {
        place: held
        for task in chosen
        for place, held in grouped(episodes(task, writer, scale)).items()
    }
    asked_of = plans(scale)
    servers = by_server([rule for rule, asked in asked_of.items() if set(asked) & set(chosen)])
    rows = sum(place[0] in asked for place in groups for asked in asked_of.values())
    row = 0
    for number, (flags, rules) in enumerate(servers.items(), 1):
        print(f"\nserver {number} of {len(servers)}: {' '.join(flags)}", flush=True)
        with Server(model, [*COMMON, *flags]) as server:
            examiner = Examiner(server, tokenizer)
            # Rules inside, texts outside: the next rule finds the prompts in the prefix cache.
            for place, held in groups.items():
                for rule in (r for r in rules if place[0] in asked_of[r]):
                    tally = Tally()
                    for episode in held:
                        tally += examiner.hold(episode, rule)
                    row += 1
                    yield {
                        **dict(zip(("task", "length", "context", "depth"), place, strict=True)),
                        **dataclasses.asdict(rule),
                        **dataclasses.asdict(tally),
                    }
                    print(
                        f"  {(time.monotonic() - begin) / 60:5.1f} min  {row:4d} of {rows}  "
                        f"{place[0]:9s}{place[1]:6d}  {rule.name:10s}{rule.budget:5d}  "
                        f"{tally.right}/{tally.asked}",
                        flush=True,
                    )


def options() -> argparse.Namespace:
    """What was asked for.

    A part of the whole does not go where the whole is kept.
    """
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
    chosen = parser.parse_args()
    kept = (parser.get_default("out"), parser.get_default("docs"))
    if (chosen.only or chosen.scale is SMALL) and (chosen.out in kept or chosen.docs in kept):
        parser.error(
            "--small and --only measure a part, which would replace the whole in docs/quality.md; "
            "name other folders with --out and --docs (with a copy of quality.md in it)"
        )
    return chosen


def main() -> int:
    chosen = options()
    leave_blocks_on_sigterm()
    begin, about = time.monotonic(), conditions()
    chosen.out.mkdir(parents=True, exist_ok=True)
    part = chosen.out / "quality.csv.part"
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        rows = measure(chosen.scale, chosen.only or TASKS, chosen.model)
        for number, row in enumerate(rows):
            if number == 0:
                writer.writerow(row)  # the names
            writer.writerow(row.values())
            file.flush()
    digests.study(chosen.model, chosen.out, chosen.scale.haystack, chosen.scale.seeds)
    part.replace(chosen.out / "quality.csv")
    minutes = round((time.monotonic() - begin) / 60, 1)
    (chosen.out / "quality.json").write_text(
        json.dumps({**about, "minutes": minutes}, indent=1) + "\n"
    )
    print(f"\n{report.write(chosen.out, chosen.docs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
