"""Rows of ``quality.csv``: reading, choosing and adding them up."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MAIN = ("full", "arkvale", "streaming", "snapkv", "h2o")
"""Rules of the main tables."""
MOVING = ("needle", "sequence", "path", "chat")
"""Tasks in which what matters moves."""


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


def rules(rows: list[Row], names: Iterable[str]) -> list[tuple[str, int]]:
    """Name and budget of the rules that are named, in that order."""
    names = list(names)
    found = {(row["name"], row["budget"]) for row in rows if row["name"] in names}
    return sorted(found, key=lambda rule: (names.index(rule[0]), rule[1]))


def of(rows: list[Row], rule: tuple[str, int]) -> list[Row]:
    """Rows of one rule."""
    return [row for row in rows if (row["name"], row["budget"]) == rule]


Variant = tuple[str, int, str]
"""Digest, groups, head reduction."""


def variants(rows: list[Row]) -> list[tuple[Variant, list[Row]]]:
    """Rows by digest, groups and head reduction, the default among them, from the best."""
    found: dict[Variant, list[Row]] = {}
    tasks = {row["task"] for row in rows if row["name"] == "variant"}
    budgets = {row["budget"] for row in rows if row["name"] == "variant"}
    for row in rows:
        same = row["name"] in ("variant", "arkvale") and row["budget"] in budgets
        if same and row["task"] in tasks:
            key = (row["digest"], row["groups"], row["head_reduce"])
            found.setdefault(key, []).append(row)

    def share(item: tuple[Variant, list[Row]]) -> float:
        right, asked = total(item[1], "right", "asked")
        return right / asked

    return sorted(found.items(), key=share, reverse=True)
