"""Tables and plots of ``docs/quality.md``, from the CSV files that the command wrote.

The page is prose with marked places; between ``<!-- name -->`` and ``<!-- end -->`` stands what is
made here, so that no number on the page is typed.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MAIN = ("full", "arkvale", "streaming", "snapkv", "h2o")
MOVING = ("needle", "sequence", "path", "chat")


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson score)."""
    if not asked:
        return 0.0, 1.0
    share, square = right / asked, z * z
    middle = (share + square / (2 * asked)) / (1 + square / asked)
    half = (
        z
        / (1 + square / asked)
        * math.sqrt(share * (1 - share) / asked + square / (4 * asked * asked))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def read(path: Path) -> list[Row]:
    """Rows of a CSV with numbers as numbers."""

    def value(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    with path.open(newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def total(rows: Iterable[Row], *names: str) -> list[int]:
    """Sums of columns."""
    rows = list(rows)
    return [sum(row[name] for row in rows) for name in names]


def score(rows: Iterable[Row]) -> str:
    """``97 % (91 to 99)``: share of right answers with its confidence interval."""
    right, asked = total(rows, "right", "asked")
    if not asked:
        return "-"
    low, high = wilson(right, asked)
    return f"{100 * right / asked:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def table(head: Iterable[str], body: Iterable[Iterable[Any]]) -> str:
    """Markdown."""
    lines = [list(head), *(list(map(str, row)) for row in body)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rules(rows: list[Row], names: Iterable[str]) -> list[tuple[str, int]]:
    names = list(names)
    found = {(row["name"], row["budget"]) for row in rows if row["name"] in names}
    return sorted(found, key=lambda rule: (names.index(rule[0]), rule[1]))


def of(rows: list[Row], rule: tuple[str, int]) -> list[Row]:
    return [row for row in rows if (row["name"], row["budget"]) == rule]


def lengths_table(rows: list[Row]) -> str:
    """Full attention by context length."""
    rows = [row for row in rows if row["task"] == "lengths"]
    return table(
        ["full attention at", *(f"{row['length']:,} tokens" for row in rows)],
        [["right answers", *(score([row]) for row in rows)]],
    )


def passkey_table(rows: list[Row]) -> str:
    """Rules by context length, over all depths (ArkVale, Table 1)."""
    rows = [row for row in rows if row["task"] == "passkey"]
    lengths = sorted({row["length"] for row in rows})
    return table(
        ["rule", "budget", *(f"{length:,} tokens" for length in lengths)],
        (
            [
                rule[0],
                rule[1] or "all",
                *(score(r for r in of(rows, rule) if r["length"] == n) for n in lengths),
            ]
            for rule in rules(rows, MAIN)
        ),
    )


def moving_table(rows: list[Row]) -> str:
    """Rules by task, with what recall did."""
    rows = [row for row in rows if row["task"] in MOVING]
    return table(
        ["rule", "budget", *MOVING, *TRAFFIC],
        (
            [rule[0], rule[1] or "all", *_scores_and_traffic(of(rows, rule), MOVING)]
            for rule in rules(rows, MAIN)
        ),
    )


Variant = tuple[str, int, str]
"""Digest, groups, head reduction."""


def variants(rows: list[Row]) -> list[tuple[Variant, list[Row]]]:
    """Rows by digest, groups and head reduction, from the best."""
    found: dict[Variant, list[Row]] = {}
    for row in rows:
        if row["name"] == "variant":
            key = (row["digest"], row["groups"], row["head_reduce"])
            found.setdefault(key, []).append(row)

    def share(item: tuple[Variant, list[Row]]) -> float:
        right, asked = total(item[1], "right", "asked")
        return right / asked

    return sorted(found.items(), key=share, reverse=True)


def variants_table(rows: list[Row]) -> str:
    """Digests, groups and head reductions by task, with what recall did."""
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["name"] == "variant"))
    return table(
        ["digest", "groups", "head reduction", "all", *tasks, *TRAFFIC],
        (
            [*variant, score(own), *_scores_and_traffic(own, tasks)]
            for variant, own in variants(rows)
        ),
    )


TRAFFIC = ("pages recalled per step", "KiB per step", "hit rate")


def _scores_and_traffic(own: list[Row], tasks: Iterable[str]) -> list[str]:
    steps, pages, moved, hits, misses = total(
        own, "steps", "recalled", "bytes_recalled", "hits", "misses"
    )
    return [
        *(score(row for row in own if row["task"] == task) for task in tasks),
        f"{pages / max(1, steps):.2f}",
        f"{moved / max(1, steps) / 1024:.1f}",
        f"{100 * hits / max(1, hits + misses):.1f} %",
    ]


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


def digest_table(rows: list[Row]) -> str:
    """Mean overlap of true and estimated top-k pages over layers."""
    wanted = (1, 5, 10, 20, 40)
    pairs = list(dict.fromkeys((row["digest"], row["head_reduce"]) for row in rows))

    def cell(pair: tuple[str, str], k: int) -> str:
        own = [r["overlap"] for r in rows if (r["digest"], r["head_reduce"], r["k"]) == (*pair, k)]
        return f"{sum(own) / len(own):.3f}"

    return table(
        ["digest", "head reduction", *(f"k = {k}" for k in wanted)],
        ([*pair, *(cell(pair, k) for k in wanted)] for pair in pairs),
    )


def machine_line(about: Row) -> str:
    """Conditions of the run in one sentence."""
    machine, versions = about["machine"], about["versions"]
    return (
        f"Measured in one run of {about['minutes']} minutes on {machine['cores']} cores of "
        f"{machine['cpu']}, float32, SGLang {versions['sglang']}, torch {versions['torch']}, "
        f"commit `{about['commit']}`."
    )


def fill(page: str, places: dict[str, Callable[[], str]]) -> str:
    """The page with every marked place made anew.

    Raises:
        ValueError: a place of the page is unknown, or missing.
    """

    def made(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in places:
            raise ValueError(f"the page marks {name!r}, which nothing fills; remove the mark")
        seen.add(name)
        return f"<!-- {name} -->\n{places[name]()}\n<!-- end -->"

    seen: set[str] = set()
    text = re.sub(r"<!-- ([a-z ]+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)
    missing = sorted(set(places) - seen)
    if missing:
        raise ValueError(f"the page has no place for {missing[0]!r}; mark one")
    return text


def write(results: Path, docs: Path) -> Path:
    """Make the plots and fill the page; returns its path."""
    rows, overlaps = read(results / "quality.csv"), read(results / "digests.csv")
    about = json.loads((results / "quality.json").read_text())
    from quality import plots

    plots.draw(rows, overlaps, docs)
    page = docs / "quality.md"
    page.write_text(
        fill(
            page.read_text(),
            {
                "conditions": lambda: machine_line(about),
                "lengths": lambda: lengths_table(rows),
                "passkey": lambda: passkey_table(rows),
                "moving": lambda: moving_table(rows),
                "variants": lambda: variants_table(rows),
                "recalls": lambda: recall_table(rows),
                "overlap": lambda: digest_table(overlaps),
            },
        )
    )
    return page
