"""Which rules are compared on which tasks, and how much is asked."""

from __future__ import annotations

import dataclasses
import itertools

from arkvale_sglang.config.settings import DIGESTS, HEAD_REDUCES, SELECTIONS
from needle_model import text
from quality import tasks
from quality.results import MOVING
from quality.servers import Rule

COMPARED = ("passkey", *MOVING)
TASKS = ("lengths", *COMPARED)
TIGHT, ROOMY = 512, 1024
BUDGETS = (TIGHT, ROOMY, 2048, 4096)
TOP_K = (32, 64, 128, 256, 512, 1024)
DROPPING = SELECTIONS[1:]
FORCED_TOKENS = 4 * 32
"""Sinks and window, which a budget holds beside its top-k."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is asked."""

    lengths: tuple[int, ...] = (1_000, 4_000, 16_000, 32_000)
    passkeys: tuple[int, ...] = (10_000, 20_000, 30_000)
    depths: tuple[float, ...] = (0.0, 0.19, 0.38, 0.57, 0.76, 0.95)
    passkey_seeds: int = 2
    haystack: int = 16_000
    seeds: int = 3
    asked: int = 16
    chats: int = 6
    dropping_budgets: tuple[int, ...] = (TIGHT, ROOMY)
    variants: tuple[str, ...] = ("needle", "path")
    """Tasks that digests, groups and head reductions are compared on; none: no comparison."""
    grid: bool = False
    """Whether every head reduction is combined with groups of heads, too."""


DEFAULT = Scale()
FULL = Scale(
    depths=tuple(d / 20 for d in range(20)), passkey_seeds=4, seeds=6, chats=12,
    dropping_budgets=BUDGETS, variants=COMPARED, grid=True,
)  # fmt: skip
SMALL = Scale(
    lengths=(1_000,), passkeys=(4_000,), depths=(0.0, 0.95), haystack=4_000, seeds=1, asked=4,
    chats=1, dropping_budgets=(ROOMY,), variants=(),
)  # fmt: skip


def plans(scale: Scale) -> dict[Rule, tuple[str, ...]]:
    """Rules and the tasks that each is asked; what makes the main tables comes first."""
    found = {Rule("full"): TASKS}
    budgets = BUDGETS if scale.variants else (ROOMY,)
    for budget in budgets:
        found[Rule("arkvale", budget)] = COMPARED
    for selection in DROPPING:
        for budget in scale.dropping_budgets:
            found[Rule(selection, budget, selection)] = COMPARED
    if not scale.variants:
        return found
    for digest, groups, reduce in itertools.product(DIGESTS, (1, 2), HEAD_REDUCES):
        rule = Rule("variant", TIGHT, digest=digest, groups=groups, head_reduce=reduce)
        if dataclasses.replace(rule, name="arkvale") in found:
            continue
        if scale.grid or groups == 1 or reduce == HEAD_REDUCES[0]:
            found[rule] = scale.variants
    for budget in BUDGETS:
        for top_k in TOP_K:
            if top_k <= budget - FORCED_TOKENS:
                found[Rule("top-k", budget, top_k=top_k)] = ("path",)
    return found


def episodes(task: str, writer: text.Writer, scale: Scale) -> list[tasks.Episode]:
    """What is asked of a task: the same for every rule."""
    if task == "lengths":
        return [
            episode
            for length in scale.lengths
            for seed in range(3)
            for episode in tasks.lengths(writer, length, seed, asked=40)
        ]
    if task == "passkey":
        return [
            episode
            for length in scale.passkeys
            for seed in range(scale.passkey_seeds)
            for episode in tasks.passkey(writer, length, scale.depths, seed)
        ]
    if task == "chat":
        return [e for seed in range(scale.chats) for e in tasks.chat(writer, seed)]
    return [
        episode
        for seed in range(scale.seeds)
        for episode in tasks.many(writer, scale.haystack, seed, scale.asked)
        if episode.task == task
    ]


Place = tuple[str, int, int, float | None]
"""Task, length, context and depth."""


def grouped(held: list[tasks.Episode]) -> dict[Place, list[tasks.Episode]]:
    """Episodes that make one row, in the order they come."""
    groups: dict[Place, list[tasks.Episode]] = {}
    for one in held:
        groups.setdefault((one.task, one.length, one.context, one.depth), []).append(one)
    return groups
