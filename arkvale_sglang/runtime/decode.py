"""One decode step: append, score, select, resolve, recall, attend (DESIGN section 3)."""

from __future__ import annotations

import dataclasses

import torch

from arkvale_kernels.attend import attend_frames
from arkvale_kernels.residency import resolve_pages
from arkvale_kernels.score import score_pages
from arkvale_kernels.select import select_pages
from arkvale_kernels.transfer import recall_pages, write_tokens
from arkvale_sglang.core.store import DenseLayer, ManagedLayer
from arkvale_sglang.policy.ranking import Ranking, rank_rows
from arkvale_sglang.runtime.cache import PagedCache


@dataclasses.dataclass(frozen=True)
class Wave:
    """Rows that attend together: the whole batch, unless its choices overflow the frames.

    A *lane row* is a row of the batch in one lane; rows are expanded lane-minor.
    """

    rows: slice
    """Of the batch."""
    lane_rows: slice
    lane_pages: torch.Tensor
    """``[lane rows, pages]`` int32, 0 beyond the end of a row."""
    lengths: torch.Tensor
    """``[lane rows]`` int64 tokens in the row's list of attended pages."""
    common_length: int | None
    """The length all rows share, when no entry of their lists can be empty."""
    ranking: Ranking | None
    """``None`` when every row is within its budget and attends to all its pages."""


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """Everything about a batch that is the same in every layer."""

    pages: torch.Tensor
    """``[rows, pages]`` int32 logical pages."""
    lengths: torch.Tensor
    """``[rows]`` int64 tokens, the new one included."""
    common_length: int | None
    open_pages: torch.Tensor
    """``[rows]`` int32 logical page of the new token; ``open_lane_pages`` for each lane row."""
    open_lane_pages: torch.Tensor
    offsets: torch.Tensor
    """``[lane rows]`` int64 place of the new token in its page."""
    sealing: torch.Tensor | None
    """``[pages]`` int64 lane pages that this token fills, or ``None``."""
    waves: list[Wave]


def plan_decode(
    cache: PagedCache,
    slots: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    host_lengths: list[int],
) -> DecodeStep:
    """Prepare a decode pass: map new open pages, lay out the waves.

    Args:
        slots: the engine's ``[requests, tokens]`` int32 slot table; rows: ``[rows]`` int64 in it.
        lengths: ``[rows]`` int64 tokens of each row, the new one included; ``host_lengths`` the
            same numbers on the host, so that shapes need no read of the device.
    """
    cache.begin_step()
    size = cache.config.page_size
    page_counts = [-(-length // size) for length in host_lengths]
    pages = cache.page_table(slots, rows, lengths, max(page_counts))
    counts = (lengths + (size - 1)) >> (size.bit_length() - 1)
    open_pages = pages.gather(1, (counts - 1).unsqueeze(1)).squeeze(1)
    opening = [row for row, length in enumerate(host_lengths) if length % size == 1]
    if opening:
        fresh = open_pages[opening]
        cache.claim(fresh, torch.ones_like(fresh, dtype=torch.bool), evicting=len(opening))
    filled = [row for row, length in enumerate(host_lengths) if length % size == 0]
    sealing = None
    if filled:
        sealing = open_pages[filled].long()
        cache.mark_sealed(sealing)
        sealing = cache.lane_pages(sealing)
    groups = cache.plan.geometry.groups
    return DecodeStep(
        pages=pages,
        lengths=lengths,
        common_length=_common(host_lengths),
        open_pages=open_pages,
        open_lane_pages=cache.lane_pages(open_pages),
        offsets=((lengths - 1) & (size - 1)).repeat_interleave(groups),
        sealing=sealing,
        waves=[
            _plan_wave(cache, pages, counts, lengths, page_counts, host_lengths, start, stop)
            for start, stop in cache.admission.waves(page_counts)
        ],
    )


def _plan_wave(
    cache: PagedCache,
    pages: torch.Tensor,
    counts: torch.Tensor,
    lengths: torch.Tensor,
    page_counts: list[int],
    host_lengths: list[int],
    start: int,
    stop: int,
) -> Wave:
    """Rows ``start`` to ``stop`` of the batch."""
    groups, budget = cache.plan.geometry.groups, cache.config.budget_pages
    width = max(page_counts[start:stop])
    lane_pages = cache.lane_pages(pages[start:stop, :width])
    counts = counts[start:stop].repeat_interleave(groups)
    attended = lengths[start:stop].repeat_interleave(groups)
    common, ranking = None if cache.pressed else _common(host_lengths[start:stop]), None
    if width > budget:
        common, ranking = None, rank_rows(cache.config, counts, width)
        attended = attended - (counts - budget).clamp(min=0) * cache.config.page_size
    else:
        cache.counters.resident_hits += (
            0 if cache.pressed else sum(page_counts[start:stop]) * cache.plan.geometry.lanes
        )
    return Wave(
        rows=slice(start, stop),
        lane_rows=slice(start * groups, stop * groups),
        lane_pages=lane_pages,
        lengths=attended,
        common_length=common,
        ranking=ranking,
    )


def _common(values: list[int]) -> int | None:
    return values[0] if all(value == values[0] for value in values) else None


def decode_managed(
    cache: PagedCache,
    index: int,
    step: DecodeStep,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Decode attention of one managed layer.

    Args:
        index: number of the layer among the managed ones.
        query: ``[rows, query heads, head_dim]``; k, v: ``[rows, KV heads, head_dim]``.

    Returns:
        ``[rows, query heads, head_dim]``.
    """
    layer = cache.store.managed[index]
    lane_rows = step.offsets.shape[0]
    frame_of = layer.residency.frame_of
    open_frames = frame_of.index_select(0, step.open_lane_pages)
    heads = layer.k_frames.shape[2:]
    write_tokens(
        layer.k_frames,
        layer.v_frames,
        open_frames,
        step.offsets,
        k.view(lane_rows, *heads),
        v.view(lane_rows, *heads),
    )
    if step.sealing is not None:
        cache.seal_frames(layer, step.sealing, frame_of.index_select(0, step.sealing))
    lane_query = query.view(lane_rows, -1, query.shape[-1])
    outputs: list[torch.Tensor] = []
    for wave in step.waves:
        if outputs:
            cache.clock += 1  # what earlier waves used in this step may leave now
        rows = lane_query[wave.lane_rows]
        outputs.append(_attend_wave(cache, index, layer, wave, rows, scaling))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out.view(query.shape)


def _attend_wave(
    cache: PagedCache,
    index: int,
    layer: ManagedLayer,
    wave: Wave,
    query: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Choose, recall and attend for the lane rows of one wave."""
    frame_of = layer.residency.frame_of
    lane_pages, scores = wave.lane_pages, None
    if wave.ranking is not None:
        ranking = wave.ranking
        resident = frame_of.index_select(0, lane_pages.reshape(-1)).view(lane_pages.shape) >= 0
        lane_pages, scores = select_pages(
            score_pages(
                query,
                layer.digests,
                lane_pages,
                ranking.bias,
                head_reduce=cache.config.head_reduce,
                scaling=scaling,
            ),
            lane_pages,
            resident,
            ranking.must_counts,
            ranking.open_index,
            budget=cache.config.budget_pages,
            recall_cap=cache.config.recall_cap,
        )
    if wave.ranking is None and not cache.pressed:
        lane_frames = frame_of.index_select(0, lane_pages.reshape(-1)).view(lane_pages.shape)
    else:
        resolved = resolve_pages(
            layer.residency, lane_pages, scores, cache.clock, groups=cache.plan.geometry.groups
        )
        recall_pages(
            layer.k_frames,
            layer.v_frames,
            layer.host,
            resolved.recall_pages,
            resolved.recall_frames,
        )
        cache.counters.add_resolution(index, resolved.counts)
        lane_frames = resolved.lane_frames
    return attend_frames(
        query,
        layer.k_frames,
        layer.v_frames,
        lane_frames,
        wave.lengths,
        scaling=scaling,
        common_length=wave.common_length,
    )


def decode_dense(
    layer: DenseLayer,
    step: DecodeStep,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: int,
    scaling: float,
) -> torch.Tensor:
    """Decode attention of one unmanaged layer over all its pages; shapes as the managed one's."""
    write_tokens(layer.k_frames, layer.v_frames, step.open_pages, step.offsets[::groups], k, v)
    return attend_frames(
        query,
        layer.k_frames,
        layer.v_frames,
        step.pages,
        step.lengths,
        scaling=scaling,
        common_length=step.common_length,
    )
