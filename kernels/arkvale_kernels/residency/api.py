"""Public face of the residency op.

One number per frame decides who leaves: its *heat*.  ``FREE`` (-1) < every used frame
``(clock << 32) | score`` < ``PINNED``; claiming takes the coldest frames, so free frames go
first, then the least recently used, the lower score first, and never a pinned one.
Sealed pages have a backup, so eviction copies nothing: it edits two table entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from arkvale_kernels.checks import check_shape
from arkvale_kernels.residency import reference
from arkvale_kernels.residency.reference import FREE, PINNED

__all__ = [
    "FREE",
    "PINNED",
    "Residency",
    "Resolution",
    "claim_frames",
    "release_pages",
    "resolve_pages",
]


class Residency(NamedTuple):
    """The tables of one layer, or of all layers with a leading layer dimension."""

    frame_of: torch.Tensor
    """``[lane pages]`` int32: lane frame of a lane page, -1 if not resident."""
    page_in: torch.Tensor
    """``[lane frames + 1]`` int32: the inverse, -1 if free; the last entry is the scratch row."""
    heat: torch.Tensor
    """``[lane frames + 1]`` int64, see the module docstring; the scratch row stays ``PINNED``."""


class Resolution(NamedTuple):
    """What :func:`resolve_pages` decided; valid until the tables change again."""

    lane_frames: torch.Tensor
    """``[rows, pages]`` int32: frame of every wanted page, -1 for padding and refused pages."""
    recall_pages: torch.Tensor
    """``[recalls]`` int64 lane pages that took a frame; the caller must fill it from the host."""
    recall_frames: torch.Tensor
    """``[recalls]`` int64 lane frames, beside ``recall_pages``."""
    counts: torch.Tensor
    """``[5]`` int64: page hits, page misses, pages recalled, pages evicted, pages refused."""


def resolve_pages(
    residency: Residency,
    lane_pages: torch.Tensor,
    scores: torch.Tensor | None,
    clock: torch.Tensor,
    *,
    groups: int,
) -> Resolution:
    """Give every wanted page of one layer a frame; hits become the warmest frames.

    A page missed by several rows claims one frame.  No page wanted in this step is a victim;
    when a lane runs out of victims the least important misses are refused, never corrupted.

    Args:
        residency: tables of one layer, changed in place.
        lane_pages: ``[rows, pages]`` int lane pages, 0 for padding.
        scores: ``[rows, pages]`` float32 importance, or ``None`` where all are alike.
        clock: ``[]`` int64, larger in every forward pass.
        groups: lanes of the layer; they share nothing.
    """
    check_shape("frame_of", residency.frame_of, (None,))
    if scores is not None:
        check_shape("scores", scores, tuple(lane_pages.shape))
    return Resolution(*reference.resolve_pages(*residency, lane_pages, scores, clock, groups))


def claim_frames(
    residency: Residency,
    pages: torch.Tensor,
    heat: torch.Tensor,
    *,
    groups: int,
    evicting: int,
) -> torch.Tensor:
    """Give new pages a frame in every lane of every layer, the first in the list first.

    Args:
        residency: tables of all layers, changed in place.
        pages: ``[pages]`` int64 logical pages that are not resident anywhere.
        heat: ``[pages]`` int64 heat of the frames they get (``PINNED`` for open pages).
        groups: lanes of a layer.
        evicting: only the first ``evicting`` pages may take the frame of another page.

    Returns:
        ``[layers]`` int64: pages evicted per layer.
    """
    check_shape("frame_of", residency.frame_of, (None, None))
    check_shape("heat", heat, tuple(pages.shape))
    return reference.claim_frames(*residency, pages, heat, groups, evicting)


def release_pages(residency: Residency, pages: torch.Tensor, *, groups: int) -> None:
    """Drop dead logical pages ``[pages]`` int64 from the tables of all layers; frames go free."""
    check_shape("frame_of", residency.frame_of, (None, None))
    reference.release_pages(*residency, pages, groups)
