"""Exact prefill: a chunk attends to its whole prefix, wherever the pages are."""

from __future__ import annotations

import dataclasses
import functools

import torch

from arkvale_kernels.residency import find_places
from arkvale_kernels.transfer import seal_frames, seal_pages, write_tokens
from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.store import DenseLayer
from arkvale_sglang.runtime.cache import PagedCache
from arkvale_sglang.runtime.dropping import OBSERVED_TOKENS
from arkvale_sglang.runtime.prefix import Sequence, attend_sequences, prefix_blocks
from arkvale_sglang.runtime.streams import PrefixBlock


@dataclasses.dataclass(frozen=True)
class ExtendStep:
    """Everything about an extend batch that is the same in every layer."""

    sequences: list[Sequence]
    slots: torch.Tensor
    """``[tokens]`` int64 the engine's slot of every token, which is its place in a dense layer."""
    loose: torch.Tensor
    """``[loose]`` int64 tokens in pages that this chunk does not hold whole."""
    loose_places: torch.Tensor
    """``[managed layers, loose * groups]`` int64, where their lanes hold them."""
    first_tokens: torch.Tensor
    """``[pages]`` int64 first token of every page that this chunk holds whole."""
    whole_lane_pages: torch.Tensor
    """``[pages * groups]`` int32."""
    topped_up: torch.Tensor | None
    """``[pages]`` int32 lane pages begun by an earlier pass and filled by this one."""


def plan_extend(
    cache: PagedCache,
    slots: torch.Tensor,
    rows: torch.Tensor,
    new_slots: torch.Tensor,
    prefix_lengths: list[int],
    chunk_lengths: list[int],
    settings: list[ArkValeConfig] | None = None,
) -> ExtendStep:
    """Prepare an extend pass: map the new pages, split tokens into whole pages and loose ends.

    Args:
        slots: the engine's ``[requests, tokens]`` int32 slot table; rows: ``[rows]`` int64 in it.
        new_slots: ``[tokens]`` int64 slots of the new tokens, row after row.
        prefix_lengths, chunk_lengths: tokens of each row before and in this pass.
        settings: of each row, where some request brought its own.
    """
    cache.begin_step()
    cache.dropping.prepare(slots, settings or [cache.config])
    size, device = cache.config.page_size, slots.device
    ends = [prefix + chunk for prefix, chunk in zip(prefix_lengths, chunk_lengths, strict=True)]
    lengths = cache.to_device(ends)
    pages = cache.page_table(slots, rows, lengths, -(-max(ends) // size))
    _claim_new_pages(cache, pages, prefix_lengths, ends, settings)

    sequences, first_tokens, whole_pages, loose, topped_up = [], [], [], [], []
    start = 0
    for row, (prefix, end) in enumerate(zip(prefix_lengths, ends, strict=True)):
        tokens = slice(start, start + end - prefix)
        own = settings[row] if settings else cache.config
        request = rows[row : row + 1]
        sequences.append(_sequence(cache, own, tokens, request, pages[row], prefix, end))
        first, last = -(-prefix // size), end // size
        if first * size > prefix and first <= last:
            topped_up.append(pages[row, first - 1 : first])
        whole_pages.append(pages[row, first : max(first, last)])
        firsts, others = _split(prefix, end, start - prefix, size, device)
        first_tokens.append(firsts)
        loose += others
        start = tokens.stop
    _note_sealed(cache, [*whole_pages, *topped_up])
    layers = range(cache.plan.geometry.managed_layers)
    cache.prefix.start([block for sequence in sequences for block in sequence.prefix], layers)
    loose_tokens = torch.cat(loose)
    loose_slots = new_slots.index_select(0, loose_tokens)
    return ExtendStep(
        sequences=sequences,
        slots=new_slots,
        loose=loose_tokens,
        loose_places=find_places(
            cache.store.residency.frame_of,
            cache.lane_pages((loose_slots >> (size.bit_length() - 1)).to(torch.int32)),
            (loose_slots & (size - 1)).repeat_interleave(cache.plan.geometry.groups),
            *cache.store.k_frames.shape[1:3],
        ),
        first_tokens=torch.cat(first_tokens),
        whole_lane_pages=cache.lane_pages(torch.cat(whole_pages)),
        topped_up=cache.lane_pages(torch.cat(topped_up)) if topped_up else None,
    )


def _split(
    prefix: int, end: int, shift: int, size: int, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """First tokens of the pages that a chunk holds whole, and its tokens in other pages.

    ``shift`` is what a place in the row is off from one in the batch.
    """

    def span(begin: int, stop: int, step: int = 1) -> torch.Tensor:
        return torch.arange(begin + shift, max(begin, stop) + shift, step, device=device)

    first, last = -(-prefix // size) * size, end // size * size
    if first > last:  # all in one page
        return span(0, 0), [span(prefix, end)]
    return span(first, last, size), [span(prefix, first), span(last, end)]


def _sequence(
    cache: PagedCache,
    settings: ArkValeConfig,
    tokens: slice,
    request: torch.Tensor,
    pages: torch.Tensor,
    prefix: int,
    end: int,
) -> Sequence:
    ranked = None
    if settings.selection in ("snapkv", "h2o"):
        sealed = pages[: end // cache.config.page_size].unsqueeze(0)
        ranked = request, cache.lane_pages(torch.nn.functional.pad(sealed, (0, 1)))
    return Sequence(tokens, prefix_blocks(cache, pages, prefix), ranked)


def _note_sealed(cache: PagedCache, pages: list[torch.Tensor]) -> None:
    """Pages that every layer of this pass seals."""
    if pages:
        done = torch.cat(pages).long()
        cache.store.sealed.index_fill_(0, done, True)
        cache.store.sealed[0] = False  # passes that only warm up write to the padding page
        cache.counters.sealed += done.shape[0]


def _claim_new_pages(
    cache: PagedCache,
    pages: torch.Tensor,
    prefix_lengths: list[int],
    ends: list[int],
    settings: list[ArkValeConfig] | None,
) -> None:
    """Give the chunk's pages frames: all of them while frames are free, what a row's decode steps
    may ask for by evicting colder pages.  Open pages come first, then windows, sinks, and the rest
    backwards, so that a prompt longer than the frames ends with what its first decode step
    needs."""
    size, device, budget = cache.config.page_size, pages.device, cache.config.budget_pages
    rows, columns, ranks, is_open = [], [], [], []
    for row, (prefix, end) in enumerate(zip(prefix_lengths, ends, strict=True)):
        count = -(-end // size)
        column = torch.arange(-(-prefix // size), count)
        from_end = count - 1 - column
        is_sink = column < cache.config.sink_pages
        rank = torch.where(
            is_sink & (from_end >= cache.config.window_pages), cache.config.window_pages, from_end
        )
        if settings:
            rank = torch.where(rank < settings[row].frame_pages, rank, rank + budget)
        rows.append(torch.full_like(column, row))
        columns.append(column)
        ranks.append(rank)
        is_open.append((column == count - 1) & (end % size != 0))
    order = torch.cat(ranks).argsort(stable=True)
    if order.numel() == 0:
        return
    row_index, column_index = torch.cat(rows)[order], torch.cat(columns)[order]
    evicting = int((torch.cat(ranks) < budget).sum())
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
    _store_chunk(cache, index, step, k, v)
    read = functools.partial(cache.prefix.take, index)
    out = attend_sequences(cache.attention, step.sequences, query, k, v, scaling, read)
    for sequence in step.sequences:
        if sequence.ranked is not None:
            cache.transfers.join()  # the digests of this chunk's pages
            last = query[sequence.tokens][-OBSERVED_TOKENS:]
            cache.dropping.observe(index, layer, *sequence.ranked, last, scaling)
    return out


def extend_dense(
    cache: PagedCache,
    layer: DenseLayer,
    step: ExtendStep,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The same for one unmanaged layer, which holds every page."""
    write_tokens(layer.k_frames, layer.v_frames, step.slots, k, v)

    def read(block: PrefixBlock) -> tuple[torch.Tensor, torch.Tensor]:
        k_pages, v_pages = (
            frames.index_select(0, block.pages).flatten(0, 1)[: block.tokens]
            for frames in (layer.k_frames, layer.v_frames)
        )
        return k_pages, v_pages

    return attend_sequences(cache.attention, step.sequences, query, k, v, scaling, read)


def _store_chunk(
    cache: PagedCache, index: int, step: ExtendStep, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Write the chunk into frames where it has them, and seal the pages it completes, beside the
    attention, which reads the chunk itself."""
    layer, digest = cache.store.managed[index], cache.config.digest
    heads = layer.k_frames.shape[2:]
    with cache.transfers.beside(k, v):
        if step.loose.numel():
            write_tokens(
                layer.k_frames,
                layer.v_frames,
                step.loose_places[index],
                k.index_select(0, step.loose).view(-1, *heads),
                v.index_select(0, step.loose).view(-1, *heads),
            )
        if step.topped_up is not None:
            seal_frames(layer, step.topped_up, cache.clock, digest=digest)
            if cache.checksums is not None:
                cache.checksums.of_frames(index, layer, step.topped_up)
        if step.first_tokens.numel():
            seal_pages(layer, step.whole_lane_pages, step.first_tokens, k, v, digest=digest)
            if cache.checksums is not None:
                cache.checksums.of_chunk(index, step.whole_lane_pages, step.first_tokens, k, v)
