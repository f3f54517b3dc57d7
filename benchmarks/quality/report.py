"""Tables and plots of ``docs/quality.md``, from the CSV files that the command wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arkvale_sglang.config.settings import ArkValeConfig
from pages import fill, machine_line, table
from quality import plots
from quality.results import MAIN, MOVING, Row, of, read, rules, total, variants, wilson
from quality.servers import Rule


def score(rows: Iterable[Row]) -> str:
    """``97 % (91 to 99)``: share of right answers with its confidence interval."""
    right, asked = total(rows, "right", "asked")
    if not asked:
        return "-"
    low, high = wilson(right, asked)
    return f"{100 * right / asked:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def lengths_table(rows: list[Row]) -> str:
    """Full attention by context length."""
    rows = [row for row in rows if row["task"] == "lengths"]
    lengths = sorted({row["length"] for row in rows})
    return table(
        ["full attention at", *(f"{length:,} tokens" for length in lengths)],
        [["right answers", *(score(r for r in rows if r["length"] == n) for n in lengths)]],
    )


def passkey_table(rows: list[Row]) -> str:
    """Rules by context length, over all depths (ArkVale, Table 1), with what recall did."""
    rows = [row for row in rows if row["task"] == "passkey"]
    lengths = sorted({row["length"] for row in rows})

    def line(rule: tuple[str, int]) -> list[Any]:
        own = of(rows, rule)
        scores = (score(row for row in own if row["length"] == n) for n in lengths)
        return [rule[0], rule[1] or "all", *scores, *_traffic(own)]

    return table(
        ["rule", "budget", *(f"{length:,} tokens" for length in lengths), *TRAFFIC],
        map(line, rules(rows, MAIN)),
    )


def moving_table(rows: list[Row]) -> str:
    """Rules by task."""
    rows = [row for row in rows if row["task"] in MOVING]
    return table(
        ["rule", "budget", *MOVING],
        ([rule[0], rule[1] or "all", *_by_task(of(rows, rule))] for rule in rules(rows, MAIN)),
    )


def evidence(rows: list[Row], budget: int = 1024) -> str:
    """The rows of README: shares alone, every rule at one budget."""
    lines = []
    for rule in [("full", 0), *((name, budget) for name in MAIN[1:])]:
        own = of([row for row in rows if row["task"] in MOVING], rule)
        shares = [total([r for r in own if r["task"] == t], "right", "asked") for t in MOVING]
        cells = [rule[0], *(f"{100 * right / asked:.0f} %" for right, asked in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def traffic_table(rows: list[Row]) -> str:
    """What recall did for each task."""
    rows = [row for row in rows if row["task"] in MOVING and row["name"] == "arkvale"]
    found = [(rule, task) for rule in rules(rows, MAIN) for task in MOVING]
    return table(
        ["budget", "frames hold", "task", *TRAFFIC],
        (
            [
                rule[1],
                Rule(*rule).device_tokens,
                task,
                *_traffic([row for row in of(rows, rule) if row["task"] == task]),
            ]
            for rule, task in found
        ),
    )


def variants_table(rows: list[Row]) -> str:
    """Digests, groups and head reductions by task, with what recall did."""
    found = variants(rows)
    tasks = list(dict.fromkeys(row["task"] for _, own in found for row in own))
    return table(
        ["digest", "groups", "head reduction", "all", *tasks, *TRAFFIC],
        ([*variant, score(own), *_by_task(own, tasks), *_traffic(own)] for variant, own in found),
    )


def defaults_table() -> str:
    """The settings that these results decide."""
    config = ArkValeConfig(budget=1024)
    return table(
        ["setting", "default"],
        [
            ["digest", config.digest],
            ["head groups", config.head_groups],
            ["head reduction", config.head_reduce],
            ["top-k", f"{config.must_pages * config.page_size} of {config.budget} tokens"],
        ],
    )


TRAFFIC = ("pages recalled per step", "KiB per step", "hit rate")


def _traffic(own: list[Row]) -> list[str]:
    names = ("steps", "recalled", "bytes_recalled", "hits", "misses")
    steps, pages, moved, hits, misses = total(own, *names)
    return [
        f"{pages / max(1, steps):.2f}",
        f"{moved / max(1, steps) / 1024:.1f}",
        f"{100 * hits / max(1, hits + misses):.1f} %",
    ]


def _by_task(own: list[Row], tasks: Iterable[str] = MOVING) -> list[str]:
    return [score(row for row in own if row["task"] == task) for task in tasks]


def recall_table(rows: list[Row]) -> str:
    """Pages recalled per step over the guaranteed top-k and the capacity (Figure 4b)."""
    rows = [row for row in rows if row["name"] == "top-k"]
    shares = sorted({row["top_k"] for row in rows})
    budgets = sorted({row["budget"] for row in rows})

    def cell(budget: int, top_k: int) -> str:
        own = [r for r in rows if (r["budget"], r["top_k"]) == (budget, top_k)]
        steps, pages = total(own, "steps", "recalled")
        return f"{pages / steps:.2f}; {score(own)}" if steps else "-"

    return table(
        ["capacity in tokens", *(f"top-k {share}" for share in shares)],
        ([budget, *(cell(budget, share) for share in shares)] for budget in budgets),
    )


def digest_table(rows: list[Row], column: str) -> str:
    """Overlap or kept attention of estimated top-k pages, mean over layers."""
    wanted = (1, 5, 10, 20, 40)
    pairs = list(dict.fromkeys((row["digest"], row["head_reduce"]) for row in rows))

    def mean(pair: tuple[str, str], k: int) -> float:
        own = [r[column] for r in rows if (r["digest"], r["head_reduce"], r["k"]) == (*pair, k)]
        return sum(own) / len(own)

    pairs.sort(key=lambda pair: mean(pair, wanted[2]), reverse=True)
    return table(
        ["digest", "head reduction", *(f"k = {k}" for k in wanted)],
        ([*pair, *(f"{mean(pair, k):.3f}" for k in wanted)] for pair in pairs),
    )


def write(results: Path, docs: Path) -> Path:
    """Make the plots and fill the page; returns its path."""
    rows, overlaps = read(results / "quality.csv"), read(results / "digests.csv")
    about = json.loads((results / "quality.json").read_text())
    plots.draw(rows, overlaps, docs)
    page = docs / "quality.md"
    page.write_text(
        fill(
            page.read_text(),
            {
                "conditions": lambda: machine_line(about, "float32"),
                "lengths": lambda: lengths_table(rows),
                "passkey": lambda: passkey_table(rows),
                "moving": lambda: moving_table(rows),
                "variants": lambda: variants_table(rows),
                "recalls": lambda: recall_table(rows),
                "overlap": lambda: digest_table(overlaps, "overlap"),
                "kept": lambda: digest_table(overlaps, "kept"),
                "traffic": lambda: traffic_table(rows),
                "defaults": defaults_table,
            },
        )
    )
    return page
