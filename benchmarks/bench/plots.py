"""The plots of ``docs/performance.md``."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import figures
from bench import throughput
from bench.sides import Row

LOADS = tuple(load.case for load in throughput.LOADS)


def draw(rows: list[Row], docs: Path) -> None:
    """Write a plot per experiment that was held under ``docs/images``."""
    for name, plot, cases in (
        ("decode", _decode, ("decode",)),
        ("batches", _batches, ("decode",)),
        ("follow_up", _follow_up, ("follow_up",)),
        ("throughput", _throughput, LOADS),
        ("steps", _steps, ("step",)),
    ):
        own = [row for row in rows if row["case"] in cases]
        if own:
            figures.save(plot(own), docs / f"images/performance_{name}.png", rows)


def _lines(rows: list[Row], label: str) -> Figure:
    """Milliseconds over context: stock, and ours at each budget."""
    figure, axes = plt.subplots(figsize=(6, 4))
    budgets = sorted({row["budget"] for row in rows})
    first = [row for row in rows if row["budget"] == budgets[0]]
    axes.plot(
        [row["context"] for row in first], [row["stock"] for row in first],
        marker="o", color="black", label="stock",
    )  # fmt: skip
    for budget in budgets:
        own = [row for row in rows if row["budget"] == budget]
        axes.plot(
            [row["context"] for row in own], [row["arkvale"] for row in own],
            marker=".", label=f"arkvale, budget {budget:,}",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def _decode(rows: list[Row]) -> Figure:
    return _lines([row for row in rows if row["batch"] == 1], "ms per token, batch 1")


def _follow_up(rows: list[Row]) -> Figure:
    return _lines(rows, "ms to the first token of a follow-up")


def _batches(rows: list[Row]) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 4))
    for batch in sorted({row["batch"] for row in rows}):
        own = [row for row in rows if row["batch"] == batch and row["budget"] == 1024]
        axes.plot(
            [row["context"] for row in own], [row["ratio"] for row in own],
            marker="o", label=f"batch {batch}",
        )  # fmt: skip
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("times stock's speed, budget 1,024")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def _throughput(rows: list[Row]) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for offset, side in enumerate(("stock", "arkvale")):
        axes.bar(
            [place + 0.4 * offset for place in range(len(rows))],
            [row["tokens_per_second"][side] for row in rows],
            0.4,
            label=side,
            color=("black", "C0")[offset],
        )
    axes.set_xticks([place + 0.2 for place in range(len(rows))], [row["case"] for row in rows])
    axes.set_ylabel("tokens per second")
    axes.legend()
    return figure


def _steps(rows: list[Row]) -> Figure:
    contexts = sorted({row["context"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.6 * len(contexts)))
    left = dict.fromkeys(contexts, 0.0)
    for part in dict.fromkeys(row["part"] for row in rows):
        spent = {row["context"]: row["arkvale"] for row in rows if row["part"] == part}
        axes.barh(
            range(len(contexts)), [spent[context] for context in contexts],
            left=list(left.values()), label=part,
        )  # fmt: skip
        left = {context: left[context] + spent[context] for context in contexts}
    axes.set_yticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axes.set_ylabel("context, tokens")
    axes.set_xlabel("ms of a decode step")
    axes.legend(fontsize=7, ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
