"""The plots of ``docs/quality.md``."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import figures
from quality import results

Row = results.Row


def draw(rows: list[Row], overlaps: list[Row], docs: Path) -> None:
    """Write a plot per experiment that was held under ``docs/images``."""
    tasks, names = ({row[column] for row in rows} for column in ("task", "name"))
    for name, plot, own, held in (
        ("lengths", _lengths, rows, "lengths" in tasks),
        ("passkey", _passkey, rows, "passkey" in tasks),
        ("moving", _moving, rows, tasks & set(results.MOVING)),
        ("variants", _variants, rows, "variant" in names),
        ("recalls", _recalls, rows, "top-k" in names),
        ("overlap", _overlap, overlaps, overlaps),
    ):
        if held:
            figures.save(plot(own), docs / f"images/quality_{name}.png", [rows, overlaps])


def _shares(rows: list[Row]) -> tuple[float, float, float]:
    """Per cent right, and how far the confidence interval reaches below and above."""
    right, asked = results.total(rows, "right", "asked")
    low, high = results.wilson(right, asked)
    share = right / max(1, asked)
    return 100 * share, 100 * max(0.0, share - low), 100 * max(0.0, high - share)


def _lengths(rows: list[Row]) -> Figure:
    rows = [row for row in rows if row["task"] == "lengths"]
    lengths = sorted({row["length"] for row in rows})
    own = [_shares([row for row in rows if row["length"] == length]) for length in lengths]
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.errorbar(
        lengths,
        [share for share, _, _ in own],
        yerr=[[low for _, low, _ in own], [high for _, _, high in own]],
        marker=".",
        capsize=3,
    )
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 105)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("right answers of full attention, %")
    return figure


def _moving(rows: list[Row]) -> Figure:
    rules = results.rules([r for r in rows if r["task"] in results.MOVING], results.MAIN)
    figure, axes = plt.subplots(figsize=(10, 4))
    width = 0.8 / max(1, len(rules))
    colors = plt.get_cmap("tab20").colors
    for number, rule in enumerate(rules):
        own = [
            _shares([r for r in results.of(rows, rule) if r["task"] == t]) for t in results.MOVING
        ]
        axes.bar(
            [place + number * width for place in range(len(own))],
            [share for share, _, _ in own],
            width,
            color=colors[number % len(colors)],
            yerr=[[low for _, low, _ in own], [high for _, _, high in own]],
            label=f"{rule[0]} {rule[1] or ''}",
        )
    axes.set_xticks([place + 0.4 for place in range(len(results.MOVING))], results.MOVING)
    axes.set_ylabel("right answers, %")
    axes.legend(fontsize=7, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _variants(rows: list[Row]) -> Figure:
    found = results.variants(rows)[::-1]
    figure, axes = plt.subplots(figsize=(8, 5))
    for place, (variant, own) in enumerate(found):
        share, below, above = _shares(own)
        axes.barh(place, share, xerr=[[below], [above]], color=f"C{variant[1] - 1}")
    names = [f"{d}, {g} group{'s' * (g > 1)}, {reduce}" for (d, g, reduce), _ in found]
    axes.set_yticks(range(len(found)), names, fontsize=7)
    axes.set_xlabel("right answers at a budget of 512, %")
    return figure


def _passkey(rows: list[Row]) -> Figure:
    rows = [row for row in rows if row["task"] == "passkey"]
    lengths = sorted({row["length"] for row in rows})
    figure, panels = plt.subplots(1, len(lengths), figsize=(12, 3.5), sharey=True, squeeze=False)
    for axes, length in zip(panels[0], lengths, strict=True):
        for rule in results.rules(rows, results.MAIN):
            own = [row for row in results.of(rows, rule) if row["length"] == length]
            depths = sorted({row["depth"] for row in own})
            shares = [_shares([r for r in own if r["depth"] == depth])[0] for depth in depths]
            axes.plot(
                [100 * depth for depth in depths], shares, marker=".",
                label=f"{rule[0]} {rule[1] or ''}",
            )  # fmt: skip
        axes.set_title(f"{length:,} tokens")
        axes.set_xlabel("depth of the passkey, %")
    panels[0][0].set_ylabel("right answers, %")
    panels[0][-1].legend(fontsize=6)
    return figure


def _recalls(rows: list[Row]) -> Figure:
    rows = [row for row in rows if row["name"] == "top-k"]
    figure, axes = plt.subplots(figsize=(6, 4))
    for budget in sorted({row["budget"] for row in rows}):
        own = sorted((r for r in rows if r["budget"] == budget), key=lambda row: row["top_k"])
        axes.plot(
            [row["top_k"] for row in own],
            [row["recalled"] / max(1, row["steps"]) for row in own],
            marker=".",
            label=f"capacity {budget}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("guaranteed top-k, tokens")
    axes.set_ylabel("pages recalled per step, all layers")
    axes.legend()
    return figure


def _overlap(rows: list[Row]) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 4))
    for digest in dict.fromkeys(row["digest"] for row in rows):
        own = [row for row in rows if (row["digest"], row["head_reduce"]) == (digest, "mean")]
        points = sorted({row["k"] for row in own})
        means = []
        for k in points:
            values = [row["overlap"] for row in own if row["k"] == k]
            means.append(sum(values) / len(values))
        axes.plot(points, means, label=digest)
    axes.set_xlabel("k, pages")
    axes.set_ylabel("overlap of true and estimated top-k pages")
    axes.legend()
    return figure
