"""Public face of the residency op.

One number per frame decides who leaves: its *heat*.  ``FREE`` (-1) < every used frame
``(clock << SCORE_BITS) | score`` < ``PINNED``; claiming takes the coldest frames, so free frames
go first, then the least recently used, the lower score first, and never a pinned one.
Sealed pages have a backup, so eviction copies nothing: it edits two table entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from arkvale_kernels import checks
from arkvale_kernels.layout import FrameLists, Recalls, Residency
from arkvale_kernels.residency import reference

COUNTED = ("page_hits", "page_misses", "pages_recalled", "pages_evicted", "pages_refused")
"""What :func:`resolve_pages` adds to its ``counts``, in order."""


class Resolution(NamedTuple):
    """What :func:`resolve_pages` decided; valid until the tables change again."""

    lane_frames: torch.Tensor
    """``[rows, pages]`` int32: frame of every wanted page, -1 for padding and refused pages."""
    recalls: Recalls
    """Pages that took a frame; the caller must fill them from the host before attending."""


def resolve_pages(
    residency: Residency,
    lane_pages: torch.Tensor,
    scores: torch.Tensor | None,
    clock: torch.Tensor,
    counts: torch.Tensor,
    *,
    groups: int,
    lists: FrameLists | None = None,
) -> Resolution:
    """Give every wanted page of one layer a frame; hits become the warmest frames.

    A page missed by several rows claims one frame.  No page wanted in this step is a victim;
    when a lane runs out of victims the surplus misses are refused, never corrupted.

    Args:
        residency: tables of one layer, changed in place.
        lane_pages: ``[rows, pages]`` int lane pages, 0 for padding, rows lane-minor.
        scores: ``[rows, pages]`` float32 importance, or ``None`` where all are alike.
        clock: ``[]`` int64, larger in every forward pass.
        counts: ``[5]`` int64 totals named by ``COUNTED``, added to.
        groups: lanes of the layer; they share nothing.
        lists: where to write the frames of all rows once more, packed.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit together.
    """
    _check_resolve(residency, lane_pages, scores, clock, counts, groups, lists)
    arguments: Any = (residency, lane_pages, scores, clock, counts, groups, lists)
    if lane_pages.is_cuda:
        from arkvale_kernels.residency import kernel

        return Resolution(*kernel.resolve_pages(*arguments))
    return Resolution(*reference.resolve_pages(*arguments))


@checks.by_layout
def _check_resolve(
    residency: Residency,
    lane_pages: torch.Tensor,
    scores: torch.Tensor | None,
    clock: torch.Tensor,
    counts: torch.Tensor,
    groups: int,
    lists: FrameLists | None,
) -> None:
    _check_tables(residency, 1)
    checks.check_shape("lane_pages", lane_pages, (None, None))
    checks.check_rows("lane_pages", lane_pages)
    checks.check_dense(lane_pages=lane_pages, counts=counts)
    checks.check_integers(lane_pages=lane_pages)
    checks.check_shape("counts", counts, (len(COUNTED),))
    checks.check_shape("clock", clock, ())
    checks.check_dtype("counts", counts, torch.int64)
    checks.check_dtype("clock", clock, torch.int64)
    checks.check_dense(**residency._asdict())
    checks.check_device(lane_pages, **residency._asdict(), counts=counts, clock=clock)
    checks.check_ids("lane_pages", lane_pages, residency.frame_of.shape[0])
    _check_groups(residency, groups, lane_pages.shape[0])
    if scores is not None:
        checks.check_shape("scores", scores, tuple(lane_pages.shape))
        checks.check_dtype("scores", scores, torch.float32)
        checks.check_dense(scores=scores)
        checks.check_device(lane_pages, scores=scores)
    _check_lists(lists, lane_pages)


def find_frames(
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    *,
    scratch: int,
    lists: FrameLists | None = None,
) -> torch.Tensor:
    """Look up the frames of pages that are all resident; the tables stay as they are.

    Args:
        frame_of: ``[lane pages]`` int32 of one layer.
        lane_pages: ``[rows, pages]`` int, anything beyond a row's count.
        page_counts: ``[rows]`` int.
        scratch: lane frame of the scratch row, for entries of ``lists`` without a page.
        lists: as in :func:`resolve_pages`.

    Returns:
        ``[rows, pages]`` int32, -1 beyond a row's count.
    """
    _check_find(frame_of, lane_pages, page_counts, lists)
    if lane_pages.is_cuda:
        from arkvale_kernels.residency import kernel

        return kernel.find_frames(frame_of, lane_pages, page_counts, scratch, lists)
    return reference.find_frames(frame_of, lane_pages, page_counts, scratch, lists)


@checks.by_layout
def _check_find(
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    lists: FrameLists | None,
) -> None:
    checks.check_shape("frame_of", frame_of, (None,))
    checks.check_shape("lane_pages", lane_pages, (None, None))
    checks.check_rows("lane_pages", lane_pages)
    checks.check_shape("page_counts", page_counts, (lane_pages.shape[0],))
    checks.check_integers(lane_pages=lane_pages, page_counts=page_counts)
    checks.check_dtype("frame_of", frame_of, torch.int32)
    checks.check_dense(frame_of=frame_of, page_counts=page_counts)
    checks.check_device(lane_pages, frame_of=frame_of, page_counts=page_counts)
    checks.check_ids("page_counts", page_counts, lane_pages.shape[1] + 1)
    checks.check_ids("lane_pages", lane_pages, frame_of.shape[0], counts=page_counts)
    _check_lists(lists, lane_pages)


def find_places(
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    offsets: torch.Tensor,
    lane_frames: int,
    page_size: int,
) -> torch.Tensor:
    """Where tokens of open pages lie in every layer; like :func:`claim_frames`, once per pass.

    Args:
        frame_of: ``[layers, lane pages]`` int32.
        lane_pages: ``[tokens]`` int page of each token; offsets: ``[tokens]`` int place in it.
        lane_frames: frames of a layer, the scratch row included, which takes the tokens of pages
            without a frame.
        page_size: tokens of a frame.

    Returns:
        ``[layers, tokens]`` int64 index among all tokens that the frames of a layer hold.
    """
    checks.check_shape("frame_of", frame_of, (None, None))
    checks.check_dtype("frame_of", frame_of, torch.int32)
    checks.check_shape("lane_pages", lane_pages, (None,))
    checks.check_shape("offsets", offsets, tuple(lane_pages.shape))
    checks.check_integers(lane_pages=lane_pages, offsets=offsets)
    checks.check_device(frame_of, lane_pages=lane_pages, offsets=offsets)
    checks.check_ids("lane_pages", lane_pages, frame_of.shape[1])
    checks.check_ids("offsets", offsets, page_size)
    return reference.find_places(frame_of, lane_pages, offsets, lane_frames, page_size)


def claim_frames(
    residency: Residency,
    pages: torch.Tensor,
    heat: torch.Tensor,
    *,
    groups: int,
    evicting: int,
) -> torch.Tensor:
    """Give new pages a frame in every lane of every layer, the first in the list first.

    Runs once per pass over the tables of all layers together, as a handful of torch ops on any
    device.

    Args:
        residency: tables of all layers, changed in place.
        pages: ``[pages]`` int64 logical pages that are not resident anywhere; the padding page 0
            gets nothing.
        heat: ``[pages]`` int64 heat of the frames they get (``PINNED`` for open pages).
        groups: lanes of a layer.
        evicting: only the first ``evicting`` pages may take the frame of another page.

    Returns:
        ``[layers]`` int64: pages evicted per layer.
    """
    _check_tables(residency, 2)
    checks.check_shape("pages", pages, (None,))
    checks.check_shape("heat", heat, tuple(pages.shape))
    checks.check_dtype("heat", heat, torch.int64)
    checks.check_device(residency.heat, heat=heat)
    _check_pages(residency, pages, groups)
    if evicting < 0:
        raise ValueError(f"evicting must not be negative, got {evicting}")
    return reference.claim_frames(residency, pages, heat, groups, evicting)


def release_pages(residency: Residency, pages: torch.Tensor, *, groups: int) -> None:
    """Drop dead logical pages ``[pages]`` int64 from the tables of all layers; frames go free."""
    _check_tables(residency, 2)
    checks.check_shape("pages", pages, (None,))
    _check_pages(residency, pages, groups)
    reference.release_pages(residency, pages, groups)


def _check_tables(residency: Residency, dimensions: int) -> None:
    checks.check_shape("frame_of", residency.frame_of, (None,) * dimensions)
    checks.check_shape("page_in", residency.page_in, (None,) * dimensions)
    checks.check_shape("heat", residency.heat, tuple(residency.page_in.shape))
    for name, table, dtype in (
        ("frame_of", residency.frame_of, torch.int32),
        ("page_in", residency.page_in, torch.int32),
        ("heat", residency.heat, torch.int64),
    ):
        checks.check_dtype(name, table, dtype)
        checks.check_device(residency.heat, **{name: table})


def _check_groups(residency: Residency, groups: int, rows: int = 0) -> None:
    pages, frames = residency.frame_of.shape[-1], residency.heat.shape[-1] - 1
    if groups < 1 or rows % groups or pages % groups or frames % groups:
        raise ValueError(
            f"groups must divide {rows} rows, {pages} lane pages and {frames} lane frames, "
            f"got {groups}"
        )


def _check_pages(residency: Residency, pages: torch.Tensor, groups: int) -> None:
    """Logical pages of tables of all layers."""
    _check_groups(residency, groups)
    checks.check_integers(pages=pages)
    checks.check_device(residency.heat, pages=pages)
    checks.check_ids("pages", pages, residency.frame_of.shape[1] // groups)


def _check_lists(lists: FrameLists | None, lane_pages: torch.Tensor) -> None:
    if lists is not None:
        checks.check_shape("lists.starts", lists.starts, (lane_pages.shape[0] + 1,))
        checks.check_shape("lists.indices", lists.indices, (None,))
        for name, part in (("lists.indices", lists.indices), ("lists.starts", lists.starts)):
            checks.check_dtype(name, part, torch.int32)
            checks.check_dense(**{name: part})
            checks.check_device(lane_pages, **{name: part})
