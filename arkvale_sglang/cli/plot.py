"""Drawings of a recording: ``arkvale plot``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from arkvale_sglang.cli.record import Recording, read
from arkvale_sglang.config.settings import ArkValeError
from arkvale_sglang.runtime.watch import STATES

COLOURS = ("#f4f4f2", "#c9dcec", "#3b78b0", "#d1495b")
"""Of ``STATES``."""
MOST_LAYERS = 4
"""Drawn unless one is named: spread over those the recording holds."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("plot", help="draw a recording: pages over steps, hit rate")
    parser.add_argument("file", type=Path, help="written by arkvale record")
    parser.add_argument("out", type=Path, help="for example plot.png")
    parser.add_argument("--request", help="its rid, or how that begins (default: the longest)")
    parser.add_argument("--layer", type=int, help=f"one layer (default: {MOST_LAYERS} of them)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """Draw; returns what was drawn."""
    try:
        import matplotlib
    except ImportError:
        raise ArkValeError(
            "arkvale plot needs matplotlib; install it with: pip install matplotlib."
        ) from None
    matplotlib.use("Agg")
    recording = read(options.file)
    if not recording.stats and not recording.pages:
        raise ArkValeError(
            f"{options.file} holds no message yet; record while the server answers requests."
        )
    steps = _steps_of(recording, options.request)
    layers = _layers_of(steps, options.layer)
    try:
        _draw(recording, steps, layers, options.out)
    except (OSError, ValueError) as error:
        raise ArkValeError(f"{options.out} cannot be written ({error}); name another.") from None
    said = f"{len(recording.stats)} stats"
    if steps:
        said += f", {len(steps)} steps of request {steps[0]['rid']}, layers {layers}"
    return f"{options.out}: {said}"


def _steps_of(recording: Recording, rid: str | None) -> list[dict[str, Any]]:
    """Steps of one request in their order; none if the recording holds no pages."""
    by_request: dict[str, list[dict[str, Any]]] = {}
    for step in recording.pages:
        by_request.setdefault(step["rid"], []).append(step)
    if rid is None:
        return max(by_request.values(), key=len, default=[])
    for name, steps in by_request.items():
        if name.startswith(rid):
            return steps
    known = ", ".join(list(by_request)[:5]) or "of no request"
    raise ArkValeError(f"no step of request {rid!r} was recorded; there are those {known}.")


def _layers_of(steps: list[dict[str, Any]], layer: int | None) -> list[int]:
    if not steps:
        if layer is not None:
            raise ArkValeError(
                "the recording holds no pages of a request; record with --topics stats pages."
            )
        return []
    known: list[int] = steps[0]["layers"]
    if layer is None:
        chosen = np.linspace(0, len(known) - 1, min(MOST_LAYERS, len(known))).round().astype(int)
        return [known[index] for index in chosen]
    if layer not in known:
        raise ArkValeError(
            f"layer {layer} is not in the recording; choose one of {known[0]} to {known[-1]}."
        )
    return [layer]


def grid(steps: list[dict[str, Any]], layer: int) -> np.ndarray:
    """``[pages, steps]`` uint8 states, the most that any lane of the layer did; 255 for pages
    that did not exist yet."""
    table = np.full((max(step["shape"][2] for step in steps), len(steps)), 255, np.uint8)
    for column, step in enumerate(steps):
        states = step["states"][step["layers"].index(layer)].max(axis=0)
        table[: len(states), column] = states
    return table


def _draw(recording: Recording, steps: list[dict[str, Any]], layers: list[int], out: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    heights = [1.0, *[1.6] * len(layers)]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(10, 1.0 + 1.7 * sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    _draw_rates(axes[0, 0], recording.stats)
    colours = ListedColormap(COLOURS).with_extremes(over="white")
    for panel, layer in zip(axes[1:, 0], layers, strict=True):
        first, last = steps[0]["tokens"], steps[-1]["tokens"]
        table = grid(steps, layer)
        panel.imshow(
            table, aspect="auto", cmap=colours, vmin=-0.5, vmax=3.5, interpolation="nearest",
            origin="lower", extent=(first - 0.5, max(last, first) + 0.5, -0.5, len(table) - 0.5),
        )  # fmt: skip
        panel.set_ylabel(f"layer {layer}\npage")
    if layers:
        axes[1, 0].set_title(f"pages of request {steps[0]['rid']}", loc="left", fontsize=10)
        axes[-1, 0].set_xlabel("tokens of the request")
        axes[1, 0].legend(
            handles=[
                Patch(facecolor=colour, edgecolor="#888888", label=name)
                for colour, name in zip(COLOURS, STATES, strict=True)
            ],
            ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9,
        )  # fmt: skip
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def _draw_rates(panel: Any, stats: list[dict[str, Any]]) -> None:
    """Hit rate and recall over time; intervals in which nothing was wanted have no hit rate."""
    panel.set_title("hit rate and recall over time", loc="left", fontsize=10)
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("hit rate", color=COLOURS[2])
    panel.set_xlabel("seconds")
    if not stats:
        panel.text(0.5, 0.5, "no stats were recorded", transform=panel.transAxes, ha="center")
        return
    times = np.array([one["time"] for one in stats]) - stats[0]["time"]
    rates = np.array([np.nan if (r := one["hit_rate"]) is None else r for one in stats])
    known = ~np.isnan(rates)
    panel.plot(times[known], rates[known], ".-", color=COLOURS[2], linewidth=1.5)
    recalled = panel.twinx()
    speed = [one["per_second"]["bytes_recalled"] / 1e6 for one in stats]
    recalled.fill_between(times, speed, step="pre", color=COLOURS[3], alpha=0.25, linewidth=0)
    recalled.set_ylim(bottom=0)
    recalled.set_ylabel("recall, MB/s", color=COLOURS[3])
