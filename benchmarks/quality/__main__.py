"""Measure quality under a budget, on the needle model, by real servers.

    PYTHONPATH=examples:benchmarks python -m quality --model MODEL [--full] [--only TASK]

MODEL is what ``needle_model.train`` wrote.  Writes ``quality.csv`` and ``digests.csv``, then
``docs/quality.md`` and its plots from them; ``--full`` adds depths, budgets and seeds.
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
from arkvale_sglang.config.settings import DIGESTS, HEAD_REDUCES, SELECTIONS
from conditions import conditions
from needle_model import text
from quality import digests, report, tasks
from quality.servers import COMMON, Examiner, Rule, by_server

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
TASKS = ("passkey", "needle", "sequence", "path", "chat")
TIGHT, ROOMY = 512, 1024
BUDGETS = (TIGHT, ROOMY, 2048, 4096)
DROPPING = SELECTIONS[1:]
TOP_K = (32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A rule and the tasks it is asked."""

    rule: Rule
    tasks: tuple[str, ...]


def plans(full: bool) -> list[Plan]:
    """All comparisons; the first entries make the main table."""
    moving = TASKS[1:]
    dropping_budgets = BUDGETS if full else (TIGHT, ROOMY)
    found = [Plan(Rule("full"), TASKS)]
    for budget in BUDGETS:
        found.append(Plan(Rule("arkvale", budget), TASKS))
    for selection in DROPPING:
        for budget in dropping_budgets:
            found.append(Plan(Rule(selection, budget, selection), TASKS))
    default = Rule("arkvale", TIGHT)
    others = TASKS if full else moving
    for digest in DIGESTS:
        if digest != default.digest:
            rule = dataclasses.replace(default, name=digest, digest=digest)
            found.append(Plan(rule, others))
    for reduce in HEAD_REDUCES:
        if reduce != default.head_reduce:
            rule = dataclasses.replace(default, name=f"reduce {reduce}", head_reduce=reduce)
            found.append(Plan(rule, others))
    found.append(Plan(dataclasses.replace(default, name="groups 2", groups=2), others))
    for budget in BUDGETS:
        for top_k in TOP_K:
            if top_k <= budget - 4 * 32:
                rule = Rule("top-k", budget, top_k=top_k)
                found.append(Plan(rule, ("path",)))
    return found


def episodes(task: str, writer: text.Writer, full: bool) -> list[tasks.Episode]:
    """The same for every rule."""
    seeds = range(4 if full else 2)
    if task == "passkey":
        depths = [d / 20 for d in range(20)] if full else [0.0, 0.19, 0.38, 0.57, 0.76, 0.95]
        return [
            episode
            for length in tasks.PASSKEY_LENGTHS
            for episode in tasks.passkey(writer, length, depths, seed=length)
        ]
    if task == "chat":
        return [e for seed in range(3 * len(seeds)) for e in tasks.chat(writer, 100 + seed)]
    return [e for seed in seeds for e in tasks.many(writer, seed, asked=16) if e.task == task]


def measure(
    plan: Sequence[Plan], chosen: Sequence[str], model: Path, full: bool
) -> Iterator[dict[str, object]]:
    """Rows of the CSV, as they come."""
    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = text.Writer(tokenizer)
    groups = [group for task in chosen for group in grouped(episodes(task, writer, full))]
    asked_of = {entry.rule: [t for t in entry.tasks if t in chosen] for entry in plan}
    servers = by_server([rule for rule, wanted in asked_of.items() if wanted])
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


def grouped(held: list[tasks.Episode]) -> list[tuple[tuple[str, int, float], list[tasks.Episode]]]:
    """Episodes that make one row: of a task, length and depth, in the order they come."""
    groups: dict[tuple[str, int, float], list[tasks.Episode]] = {}
    for episode in held:
        groups.setdefault((episode.task, episode.length, episode.depth), []).append(episode)
    return list(groups.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="all depths and budgets, more seeds")
    parser.add_argument("--only", choices=TASKS, action="append", help="tasks (default: all)")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/needle_model/model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    begin = time.monotonic()
    chosen = options.only or TASKS
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "quality.csv"
    rows = []
    for row in measure(plans(options.full), chosen, options.model, options.full):
        rows.append(row)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows)
    digests.study(options.model, options.out)
    minutes = round((time.monotonic() - begin) / 60, 1)
    (options.out / "quality.json").write_text(
        json.dumps({**conditions(), "full": options.full, "minutes": minutes}, indent=1) + "\n"
    )
    print(f"\n{report.write(options.out, ROOT / 'docs')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
