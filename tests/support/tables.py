"""Residency tables from what each lane is said to hold, and the laws that all tables obey.

Imports nothing of the implementation but the types of its arguments.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from arkvale_kernels.layout import FREE, PINNED, SCORE_BITS, Residency

CLOCK = 50
"""Of the step under test; what was used before is colder."""


@dataclasses.dataclass
class Held:
    """One lane: what its frames hold, ``{frame: (page, heat)}``."""

    frames: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)


def build(lanes: list[Held], *, pages: int, frames: int) -> Residency:
    """Tables of one layer in which lane ``g`` holds what ``lanes[g]`` says."""
    stride, groups = pages + 1, len(lanes)
    tables = Residency(
        frame_of=torch.full((groups * stride,), -1, dtype=torch.int32),
        page_in=torch.full((groups * frames + 1,), -1, dtype=torch.int32),
        heat=torch.full((groups * frames + 1,), FREE, dtype=torch.int64),
    )
    tables.heat[-1] = PINNED
    for group, lane in enumerate(lanes):
        for frame, (page, heat) in lane.frames.items():
            tables.frame_of[group * stride + page] = group * frames + frame
            tables.page_in[group * frames + frame] = group * stride + page
            tables.heat[group * frames + frame] = heat
    return tables


def copy(tables: Residency) -> Residency:
    """Tables that may change while the others stay."""
    return Residency(*(table.clone() for table in tables))


def same(tables: Residency, others: Residency) -> bool:
    """Whether all entries agree."""
    return all(torch.equal(*pair) for pair in zip(tables, others, strict=True))


def stacked(layers: list[Residency]) -> Residency:
    """Tables of all layers."""
    return Residency(*(torch.stack(tables) for tables in zip(*layers, strict=True)))


def assert_paired(tables: Residency, groups: int) -> None:
    """Both tables tell the same story, lane by lane, no mark of a step is left in them, and the
    scratch row stays out of it."""
    frame_of, page_in, heat = (table.tolist() for table in tables)
    stride, frames = len(frame_of) // groups, (len(page_in) - 1) // groups
    assert min(frame_of) >= -1 and min(page_in) >= -1
    held = {page: frame for page, frame in enumerate(frame_of) if frame >= 0}
    assert {frame: page for page, frame in held.items()} == {
        frame: page for frame, page in enumerate(page_in) if page >= 0
    }
    assert all(page // stride == frame // frames for page, frame in held.items())
    assert all(page % stride for page in held), "padding never holds a frame"
    assert all((page < 0) == (h == FREE) for page, h in zip(page_in[:-1], heat, strict=False))
    assert page_in[-1] == -1 and heat[-1] == PINNED


def random_lane(draw: np.random.Generator, pages: int, frames: int) -> Held:
    """Some frames free, some pinned, the others of distinct heat below the clock."""
    heats = draw.permutation(CLOCK * 4)
    lane = Held()
    for frame, page in enumerate(1 + draw.permutation(pages)[:frames]):
        kind = draw.choice(["free", "pinned", "used"], p=[0.25, 0.15, 0.6])
        if kind != "free":
            clock, score = divmod(int(heats[frame]), 4)
            heat = (clock << SCORE_BITS) + score * 0x3FFFFF if kind == "used" else PINNED
            lane.frames[frame] = (int(page), heat)
    return lane
