"""Exact prefill: a chunk attends to its whole prefix, wherever the pages are (DESIGN section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from arkvale_kernels.attend import attend_chunk, attend_part, merge_parts
from arkvale_kernels.transfer import gather_pages, write_tokens
from arkvale_sglang.core.sizing import STAGING_TOKENS
from arkvale_sglang.core.store import DenseLayer, ManagedLayer
from arkvale_sglang.runtime.cache import PagedCache


@dataclasses.dataclass(frozen=True)
class PrefixBlock:
    """Pages of a prefix that are staged together; only the last may hold fewer tokens."""

    pages: torch.Tensor
    """``[pages]`` int32 logical pages, and their ``lane_pages`` ``[pages * groups]``."""
    lane_pages: torch.Tensor
    tokens: int


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One request of an extend batch: its tokens in the batch and the prefix before them."""

    tokens: slice
    prefix: list[PrefixBlock]


@dataclasses.dataclass(frozen=True)
class ExtendStep:
    """Everything about an extend batch that is the same in every layer."""

    sequences: list[Sequence]
    token_pages: torch.Tensor
    """``[tokens]`` int32 logical page of every token."""
    offsets: torch.Tensor
    """``[tokens]`` int64 place of every token in its page."""
    loose: torch.Tensor
    """``[loose]`` int64 tokens in pages that this chunk does not hold whole."""
    loose_lane_pages: torch.Tensor
    """``[loose * groups]`` int32."""
    whole: torch.Tensor
    """``[pages * page_size]`` int64 tokens of the pages that this chunk holds whole."""
    whole_lane_pages: torch.Tensor
    """``[pages * groups]`` int64."""
    topped_up: torch.Tensor | None
    """``[pages]`` int64 lane pages begun by an earlier pass and filled by this one."""


def plan_extend(
    cache: PagedCache,
    slots: torch.Tensor,
    rows: torch.Tensor,
    new_slots: torch.Tensor,
    prefix_lengths: list[int],
    chunk_lengths: list[int],
) -> ExtendStep:
    """Prepare an extend pass: map the new pages, split tokens into whole pages and loose ends.

    Args:
        slots: the engine's ``[requests, tokens]`` int32 slot table; rows: ``[rows]`` int64 in it.
        new_slots: ``[tokens]`` int64 slots of the new tokens, row after row.
        prefix_lengths, chunk_lengths: tokens of each row before and in this pass.
    """
    cache.begin_step()
    size = cache.config.page_size
    device = slots.device
    ends = [prefix + chunk for prefix, chunk in zip(prefix_lengths, chunk_lengths, strict=True)]
    lengths = torch.tensor(ends, device=device)
    pages = cache.page_table(slots, rows, lengths, -(-max(ends) // size))
    _claim_new_pages(cache, pages, prefix_lengths, ends)

    sequences, whole, whole_pages, loose, topped_up = [], [], [], [], []
    start = 0
    for row, (prefix, end) in enumerate(zip(prefix_lengths, ends, strict=True)):
        stop = start + end - prefix
        sequences.append(Sequence(slice(start, stop), _prefix_blocks(cache, pages[row], prefix)))
        first, last = -(-prefix // size), end // size
        shift = start - prefix
        if first * size > prefix and first <= last:
            topped_up.append(pages[row, first - 1 : first])
        if first < last:
            whole.append(torch.arange(first * size + shift, last * size + shift, device=device))
            whole_pages.append(pages[row, first:last])
        head, tail = min(first * size, end), max(last * size, prefix)
        loose.append(torch.arange(prefix + shift, head + shift, device=device))
        if first <= last:
            loose.append(torch.arange(tail + shift, end + shift, device=device))
        start = stop
    sealed = [*whole_pages, *topped_up]
    if sealed:
        cache.mark_sealed(torch.cat(sealed).long())
    token_pages = (new_slots >> (size.bit_length() - 1)).to(torch.int32)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    loose_tokens = torch.cat(loose)
    return ExtendStep(
        sequences=sequences,
        token_pages=token_pages,
        offsets=new_slots & (size - 1),
        loose=loose_tokens,
        loose_lane_pages=cache.lane_pages(token_pages.index_select(0, loose_tokens)),
        whole=torch.cat(whole) if whole else none,
        whole_lane_pages=cache.lane_pages(torch.cat(whole_pages).long()) if whole else none,
        topped_up=cache.lane_pages(torch.cat(topped_up).long()) if topped_up else None,
    )


def _prefix_blocks(cache: PagedCache, pages: torch.Tensor, prefix: int) -> list[PrefixBlock]:
    """Cut a prefix into blocks that fit the staging buffer."""
    size = cache.config.page_size
    cuts = range(0, prefix, STAGING_TOKENS)
    blocks = []
    for start in cuts:
        tokens = min(STAGING_TOKENS, prefix - start)
        block = pages[start // size : -(-(start + tokens) // size)]
        blocks.append(PrefixBlock(block, cache.lane_pages(block), tokens))
    cache.counters.streamed += prefix
    return blocks


def _claim_new_pages(
    cache: PagedCache, pages: torch.Tensor, prefix_lengths: list[int], ends: list[int]
) -> None:
    """Give the chunk's pages frames: all of them while frames are free, a budget's worth by
    evicting colder pages.  Open pages come first, then windows, sinks, and the rest backwards,
    so that a prompt longer than the frames ends with what its first decode step needs."""
    size, device = cache.config.page_size, pages.device
    rows, columns, ranks, is_open = [], [], [], []
    for row, (prefix, end) in enumerate(zip(prefix_lengths, ends, strict=True)):
        count = -(-end // size)
        column = torch.arange(-(-prefix // size), count)
        from_end = count - 1 - column
        is_sink = column < cache.config.sink_pages
        rank = torch.where(
            is_sink & (from_end >= cache.config.window_pages), cache.config.window_pages, from_end
        )
        rows.append(torch.full_like(column, row))
        columns.append(column)
        ranks.append(rank)
        is_open.append((column == count - 1) & (end % size != 0))
    order = torch.cat(ranks).argsort(stable=True)
    if order.numel() == 0:
        return
    row_index, column_index = torch.cat(rows)[order], torch.cat(columns)[order]
    evicting = int((torch.cat(ranks) < cache.config.budget_pages).sum())
    cache.claim(
        pages[row_index.to(device), column_index.to(device)],
        torch.cat(is_open)[order].to(device),
        evicting,
    )


def extend_managed(
    cache: PagedCache,
    index: int,
    step: ExtendStep,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Exact attention of a batch of chunks in one managed layer, whose pages are sealed on the way.

    Args:
        index: number of the layer among the managed ones.
        query: ``[tokens, query heads, head_dim]``; k, v: ``[tokens, KV heads, head_dim]``.

    Returns:
        ``[tokens, query heads, head_dim]``.
    """
    layer = cache.store.managed[index]
    _store_chunk(cache, layer, step, k, v)

    def read(block: PrefixBlock) -> tuple[torch.Tensor, torch.Tensor]:
        staged = gather_pages(
            layer.k_frames, layer.v_frames, layer.host, layer.residency.frame_of, block.lane_pages
        )
        groups = cache.plan.geometry.groups
        return _join_lanes(staged[0], groups), _join_lanes(staged[1], groups)

    return _attend_sequences(step, query, k, v, scaling, read)


def extend_dense(
    layer: DenseLayer,
    step: ExtendStep,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The same for one unmanaged layer, which holds every page."""
    write_tokens(layer.k_frames, layer.v_frames, step.token_pages, step.offsets, k, v)

    def read(block: PrefixBlock) -> tuple[torch.Tensor, torch.Tensor]:
        k_pages = layer.k_frames.index_select(0, block.pages)
        return k_pages.flatten(0, 1), layer.v_frames.index_select(0, block.pages).flatten(0, 1)

    return _attend_sequences(step, query, k, v, scaling, read)


def _attend_sequences(
    step: ExtendStep,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    read: Callable[[PrefixBlock], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Merge each chunk's attention to itself with that to the blocks of its prefix."""
    out = torch.empty_like(query)
    for sequence in step.sequences:
        tokens = sequence.tokens
        part = attend_chunk(query[tokens], k[tokens], v[tokens], scaling=scaling)
        for block in sequence.prefix:
            staged_k, staged_v = read(block)
            other = attend_part(
                query[tokens], staged_k[: block.tokens], staged_v[: block.tokens], scaling=scaling
            )
            part = merge_parts(part, other)
        out[tokens] = part[0]
    return out


def _store_chunk(
    cache: PagedCache, layer: ManagedLayer, step: ExtendStep, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Write the chunk into frames where it has them, and seal the pages it completes."""
    groups, heads = cache.plan.geometry.groups, layer.k_frames.shape[2:]
    frame_of = layer.residency.frame_of
    if step.loose.numel():
        write_tokens(
            layer.k_frames,
            layer.v_frames,
            frame_of.index_select(0, step.loose_lane_pages),
            step.offsets.index_select(0, step.loose).repeat_interleave(groups),
            k.index_select(0, step.loose).view(-1, *heads),
            v.index_select(0, step.loose).view(-1, *heads),
        )
    if step.topped_up is not None:
        cache.seal_frames(layer, step.topped_up, frame_of.index_select(0, step.topped_up))
    if step.whole.numel():
        whole_k, whole_v = (
            _split_lanes(part.index_select(0, step.whole), cache.config.page_size, groups)
            for part in (k, v)
        )
        cache.seal(layer, step.whole_lane_pages, whole_k, whole_v)
        frames = frame_of.index_select(0, step.whole_lane_pages).long()
        frames = frames.masked_fill_(frames < 0, layer.k_frames.shape[0] - 1)
        layer.k_frames.index_copy_(0, frames, whole_k)
        layer.v_frames.index_copy_(0, frames, whole_v)


def _split_lanes(tokens: torch.Tensor, page_size: int, groups: int) -> torch.Tensor:
    """``[pages * page_size, heads, dim]`` -> ``[pages * groups, page_size, lane heads, dim]``."""
    pages = tokens.unflatten(0, (-1, page_size)).unflatten(2, (groups, -1))
    return pages.transpose(1, 2).flatten(0, 1)


def _join_lanes(pages: torch.Tensor, groups: int) -> torch.Tensor:
    """The inverse: ``[pages * groups, page_size, lane heads, dim]`` -> ``[tokens, heads, dim]``."""
    return pages.unflatten(0, (-1, groups)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
