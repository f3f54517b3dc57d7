"""Tables of ``docs/performance.md``, from the ``bench.json`` that the command wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench import plots, throughput
from bench.sides import Row
from pages import fill, machine_line, table

PAGE = "performance.md"
ABSENT = "Not measured in this run."


class Found(NamedTuple):
    """A figure of this run: the median of its rounds."""

    value: float
    low: float
    """Smallest round."""
    high: float
    likely: tuple[float, float]
    """Where the median lies with 95 % confidence; all of the spread where rounds are few."""


TARGETS: tuple[tuple[str, str, Callable[[list[Row]], Found | None], float, bool], ...] = (
    ("decode at 32K, budget 1K, batch 1", "times stock's speed",
     lambda rows: _ratio(rows, "decode", 32_768, 1024), 6, True),
    ("cost of a token at budget 1K, 64K over 4K", "times",
     lambda rows: _cost(rows, "growth", 65_536), 1.3, False),
    ("follow-up turn on 16K cached", "times stock's speed",
     lambda rows: _ratio(rows, "follow_up", 16_384), 20, True),
    ("follow-up turn on 32K cached", "times stock's speed",
     lambda rows: _ratio(rows, "follow_up", 32_768), 40, True),
    ("throughput, long prompts", "times stock's",
     lambda rows: _of_load(rows, "long_prompts"), 4.6, True),
    ("throughput, shared prefix", "times stock's",
     lambda rows: _of_load(rows, "shared_prefix"), 6, True),
    ("decode under the budget", "of stock's time",
     lambda rows: _cost(rows, "under_budget_decode"), 1.02, False),
    ("prefill under the budget", "of stock's time",
     lambda rows: _cost(rows, "under_budget_prefill"), 1.03, False),
    ("prefill at 8 times the frames", "of its time where it fits",
     lambda rows: _cost(_of_factor(rows, 8), "prefill"), 1.25, False),
    ("decode while watched", "of its time unwatched",
     lambda rows: _cost(rows, "watching"), 1.01, False),
    ("export and stream, time of the scheduler", "of a step's time",
     lambda rows: _share(rows), 0.01, False),
)  # fmt: skip
"""What is measured, its unit, where it stands, the target, and whether more is better."""


def of(rows: Iterable[Row], case: str, **where: Any) -> list[Row]:
    """Rows of a case in which every named column has the value."""
    return [
        row
        for row in rows
        if row["case"] == case and all(row.get(name) == value for name, value in where.items())
    ]


def _ratio(
    rows: list[Row],
    case: str,
    context: int | None = None,
    budget: int | None = None,
    batch: int = 1,
) -> Found | None:
    where = {"context": context, "budget": budget, "batch": batch}
    own = of(rows, case, **{name: value for name, value in where.items() if value is not None})
    return Found(own[0]["ratio"], *own[0]["spread"], _likely(own[0])) if own else None


def _likely(row: Row) -> tuple[float, float]:
    """Order statistics of the rounds' ratios that hold the median with 95 % confidence."""
    stock, ours = row["rounds"]["stock"], row["rounds"]["arkvale"]
    ratios = sorted(theirs / own for theirs, own in zip(stock, ours, strict=True))
    beyond, tail = 0, 1 / 2 ** len(ratios)
    while tail <= 0.025:
        beyond += 1
        tail += math.comb(len(ratios), beyond) / 2 ** len(ratios)
    outer = max(0, beyond - 1)
    return ratios[outer], ratios[-1 - outer]


def _of_load(rows: list[Row], case: str) -> Found | None:
    """Of the load as it is by default: a smaller one proves nothing."""
    load = next(load for load in throughput.LOADS if load.case == case)
    return _ratio(rows, case, load.context, batch=load.chats)


def _of_factor(rows: list[Row], factor: int) -> list[Row]:
    """Of prompts so many times as long as what the frames hold."""
    return [row for row in rows if row["context"] == factor * row.get("device_tokens", 0)]


def _cost(rows: list[Row], case: str, context: int | None = None) -> Found | None:
    ratio = _ratio(rows, case, context)
    if ratio is None:
        return None
    least, most = ratio.likely
    return Found(1 / ratio.value, 1 / ratio.high, 1 / ratio.low, (1 / most, 1 / least))


def _share(rows: list[Row]) -> Found | None:
    own = of(rows, "watching_share")
    return Found(own[0]["arkvale"], *own[0]["spread"], own[0]["spread"]) if own else None


def _verdict(found: Found, target: float, more: bool) -> str:
    met = "yes" if (found.value >= target if more else found.value <= target) else "**no**"
    least, most = found.likely
    return f"{met}, within the noise" if least < target < most else met


def targets_table(rows: list[Row]) -> str:
    """What the project set itself, and what this run found."""
    lines = []
    for name, unit, find, target, more in TARGETS:
        found = find(rows)
        shown, met = "-", "-"
        if found is not None:
            digits = 2 if target >= 1 else 4
            value, low, high = (f"{figure:.{digits}f}" for figure in found[:3])
            shown = f"{value} ({low} to {high}) {unit}"
            met = _verdict(found, target, more)
        bound = f"{'at least' if more else 'at most'} {target} {unit}"
        lines.append([name, shown, bound, met])
    return table(["", "found (smallest and largest round)", "target", "met"], lines)


def _cells(row: Row) -> list[str]:
    low, high = row["spread"]
    return [
        f"{row['stock']:,.2f}",
        f"{row['arkvale']:,.2f}",
        f"{row['ratio']:.2f}x",
        f"{low:.2f} to {high:.2f}",
    ]


def decode_table(rows: list[Row]) -> str:
    """Time per token of every context and batch: stock, and ours at each budget."""
    own = of(rows, "decode")
    budgets = sorted({row["budget"] for row in own})
    lines = []
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in own):
        by_budget = {row["budget"]: row for row in of(own, "decode", context=context, batch=batch)}
        cells = []
        for row in (by_budget[budget] for budget in budgets):
            low, high = row["spread"]
            cells.append(f"{row['arkvale']:.2f} ({row['ratio']:.2f}x, {low:.2f} to {high:.2f})")
        lines.append([f"{context:,}", batch, f"{by_budget[budgets[0]]['stock']:.2f}", *cells])
    return table(["context", "batch", "stock, ms", *(f"budget {b:,}, ms" for b in budgets)], lines)


def cases_table(rows: list[Row], *cases: str) -> str:
    """One line per row of these cases."""
    own = [row for case in cases for row in of(rows, case)]
    return table(
        ["case", "context", "batch", "stock", "arkvale", "ratio", "spread"],
        (
            [f"{row['case']}, {row['unit']}", f"{row['context']:,}", row["batch"], *_cells(row)]
            for row in own
        ),
    )


def throughput_table(rows: list[Row]) -> str:
    """Loads at equal device memory."""
    lines = []
    for row in rows:
        if "load" not in row:
            continue
        pairs = [row[name] for name in ("tokens_per_second", "first_token_ms", "token_ms")]
        shown = [f"{pair['stock']:,.0f} / {pair['arkvale']:,.0f}" for pair in pairs]
        stock, ours = (row["peak_bytes"][side] / 2**30 for side in ("stock", "arkvale"))
        shown.append(f"{stock:.2f} / {ours:.2f}")
        lines.append([row["case"], row["batch"], f"{row['context']:,}", *_cells(row), *shown])
    head = ["load", "chats", "prompt", "stock, s", "arkvale, s", "ratio", "spread"]
    head += ["tokens per second", "first token, ms", "next token, ms", "peak so far, GiB"]
    return table(head, lines)


def device_bytes(rows: list[Row]) -> str:
    """What the policy's tokens take on the device beside their frames."""
    held = next((row["bytes"] for row in rows if "bytes" in row), None)
    if held is None:
        return "What digests and staging take beside them was not noted in this run."
    frames, digests, staging = (held[part] / 2**20 for part in ("frame", "digest", "staging"))
    return (
        f"Stock's pool and the policy's frames take {frames:.0f} MiB each; the policy's digests of "
        f"the whole capacity take {digests:.0f} MiB more, and prefill stages {staging:.0f} MiB."
    )


def prefill_table(rows: list[Row]) -> str:
    """Prompts of several times the frames, beside frames for all of the prompt."""
    lines = []
    for row in of(rows, "prefill"):
        low, high = row["spread"]
        peaks = [f"{row['peak_bytes'][side] / 2**30:.2f}" for side in ("stock", "arkvale")]
        lines.append(
            [
                f"{row['context'] // row['device_tokens']}x",
                f"{row['context']:,}",
                f"{row['stock']:,.0f}",
                f"{row['arkvale']:,.0f}",
                f"{1 / row['ratio']:.2f} ({1 / high:.2f} to {1 / low:.2f})",
                *peaks,
            ]
        )
    head = ["prompt / frames", "tokens", "all fits, ms", "few frames, ms", "cost"]
    return table([*head, "all fits, peak GiB", "few frames, peak GiB"], lines)


def steps_table(rows: list[Row]) -> str:
    """Parts of a decode step."""
    own = of(rows, "step")
    contexts = sorted({row["context"] for row in own})
    whole = {n: sum(row["arkvale"] for row in own if row["context"] == n) for n in contexts}
    lines = []
    for part in dict.fromkeys(row["part"] for row in own):
        spent = {row["context"]: row["arkvale"] for row in own if row["part"] == part}
        cells = (f"{spent[n]:.2f} ({100 * spent[n] / whole[n]:.0f} %)" for n in contexts)
        lines.append([part, *cells])
    lines.append(["all", *(f"{whole[n]:.2f}" for n in contexts)])
    return table(["part", *(f"{n:,} tokens, ms" for n in contexts)], lines)


def watching_table(rows: list[Row]) -> str:
    """A token of a server that is watched, beside one that is not."""
    lines = []
    for row in of(rows, "watching"):
        low, high = row["spread"]
        cells = [f"{row[side]:.2f}" for side in ("stock", "arkvale")]
        cost = [f"{1 / row['ratio']:.3f}", f"{1 / high:.3f} to {1 / low:.3f}"]
        share = [f"{100 * own['arkvale']:.2f} %" for own in of(rows, "watching_share")] or ["-"]
        lines.append([f"{row['context']:,}", f"{row['budget']:,}", *cells, *cost, *share])
    head = ["context", "budget", "unwatched, ms", "watched, ms", "cost", "spread"]
    return table([*head, "share of a step"], lines)


def loads(rows: list[Row]) -> str:
    """What arrived, of the loads that were held."""
    lines = []
    for row in rows:
        load = row.get("load")
        if load is None:
            continue
        what = f"{load['chats']} prompts of {load['message']:,} tokens"
        if load["shared"]:
            what = f"{load['chats']} questions on one document of {load['shared']:,} tokens"
        if load["turns"] > 1:
            what = (
                f"{load['chats']} chats of {load['shared']:,} tokens and {load['turns']} messages, "
                "each after the others"
            )
        lines.append(
            f"- {row['case']}: {what}, answers of {load['new']} tokens, budget {row['budget']}"
        )
    return "\n".join(lines)


def rounds(rows: list[Row]) -> str:
    """How often each case was measured."""
    counts = {row["case"]: len(row["rounds"]["stock"]) for row in rows if "rounds" in row}
    return f"Rounds: {', '.join(f'{case} {count}' for case, count in counts.items())}."


def dense(rows: list[Row]) -> str:
    """How many layers the policy left alone under the budget."""
    layers = of(rows, "under_budget_decode")[0].get("dense_layers", 2)
    return f"The policy left {layers or 'none'} of the 4 layers alone."


EVIDENCE = (
    ("decode at 32K context, 1K budget, no dense layers, ms per token",
     {"case": "decode", "context": 32_768, "batch": 1, "budget": 1024}),
    ("likewise at {context:,} tokens, 2 of the 4 layers dense", {"case": "decode_dense_2"}),
    ("likewise at {context:,} tokens, 2 KV heads for 8 query heads, no dense layers",
     {"case": "decode_gqa"}),
    ("16 new tokens on a cached 32K prefix, ms to the first token",
     {"case": "follow_up", "context": 32_768}),
    ("16 prompts of 4K at once, 8K tokens on the device, budget {budget}, seconds",
     {"case": "long_prompts"}),
    ("25 questions on one document of 6K, likewise", {"case": "shared_prefix"}),
    ("{batch} chats of 4K that return, likewise", {"case": "returning_chats"}),
    ("decode at 512 tokens, nothing evicted, ms per token", {"case": "under_budget_decode"}),
    ("prefill of 2K tokens, nothing evicted, ms", {"case": "under_budget_prefill"}),
)  # fmt: skip


def evidence(rows: list[Row]) -> str:
    """The rows of README."""
    lines = []
    for name, where in EVIDENCE:
        row = of(rows, **where)[0]
        stock, ours, ratio, spread = _cells(row)
        lines.append(f"| {name.format(**row)} | {stock} | {ours} | {ratio} ({spread}) |")
    return "\n".join(lines)


def write(results: Path, docs: Path) -> Path:
    """Make the plots and fill the page; returns its path."""
    about = json.loads((results / "bench.json").read_text())
    rows: list[Row] = about["rows"]
    plots.draw(rows, docs)

    def held(make: Callable[[], str], *cases: str) -> Callable[[], str]:
        return lambda: make() if any(of(rows, case) for case in cases) else ABSENT

    held_loads = [load.case for load in throughput.LOADS]
    page = docs / PAGE
    page.write_text(
        fill(
            page.read_text(),
            {
                "conditions": lambda: machine_line(about, "bfloat16"),
                "targets": lambda: targets_table(rows),
                "rounds": lambda: rounds(rows),
                "decode": held(lambda: decode_table(rows), "decode"),
                "others": held(
                    lambda: cases_table(rows, "decode_gqa", "decode_dense_2"), "decode_gqa"
                ),
                "follow up": held(lambda: cases_table(rows, "follow_up"), "follow_up"),
                "throughput": held(lambda: throughput_table(rows), *held_loads),
                "loads": held(lambda: loads(rows), *held_loads),
                "device bytes": held(lambda: device_bytes(rows), *held_loads),
                "dense": held(lambda: dense(rows), "under_budget_decode"),
                "under budget": held(
                    lambda: cases_table(rows, "under_budget_decode", "under_budget_prefill"),
                    "under_budget_decode",
                ),
                "prefill": held(lambda: prefill_table(rows), "prefill"),
                "steps": held(lambda: steps_table(rows), "step"),
                "watching": held(lambda: watching_table(rows), "watching"),
            },
        )
    )
    return page
