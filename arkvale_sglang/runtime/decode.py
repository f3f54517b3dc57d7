"""One decode step: score, select, resolve, move, attend."""

from __future__ import annotations

import dataclasses

import torch

from arkvale_kernels.attend import attend_frames
from arkvale_kernels.layout import NewTokens, PagedLayer, Recalls
from arkvale_kernels.profile import part
from arkvale_kernels.residency import find_frames, find_places, resolve_pages
from arkvale_kernels.score import score_pages
from arkvale_kernels.select import select_pages
from arkvale_kernels.transfer import move_pages, write_tokens
from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.store import DenseLayer
from arkvale_sglang.policy.admission import selection_rule
from arkvale_sglang.runtime.attention import DecodeAttention
from arkvale_sglang.runtime.cache import PagedCache
from arkvale_sglang.runtime.prefix import Sequence, attend_whole, whole_rows


@dataclasses.dataclass(frozen=True)
class Wave:
    """Rows that attend together: the whole batch, unless its choices overflow the frames.

    A *lane row* is a row of the batch in one lane; rows are expanded lane-minor.
    """

    settings: ArkValeConfig
    """Of these rows: the server's, but for what their requests asked for."""
    requests: torch.Tensor | None
    """``[rows]`` int64 in the engine's slot table, for the rules that remember."""
    lane_rows: slice
    """Of the batch."""
    lane_pages: torch.Tensor
    """``[lane rows, pages]`` int32, undefined beyond the end of a row."""
    page_counts: torch.Tensor
    """``[lane rows]`` int32 pages of each row, the open one included; 0 is inert."""
    lengths: torch.Tensor
    """``[lane rows]`` int32 tokens in the row's list of attended pages."""
    common_length: int | None
    """The length all rows share."""
    over_budget: bool
    """Whether some row must choose; else every row attends to all its pages."""
    attention: DecodeAttention | None
    """How the lists are attended; ``None`` for the op's own kernel."""
    sequences: list[Sequence] | None = None
    """Of the rows, where they attend to everything and pages may lack frames: read as in prefill,
    they need none but their open pages'."""


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """Everything about a batch that is the same in every layer."""

    pages: torch.Tensor
    """``[rows, pages]`` int32 logical pages, undefined beyond the end of a row."""
    lengths: torch.Tensor
    """``[rows]`` int32 tokens, the new one included."""
    common_length: int | None
    slots: torch.Tensor
    """``[rows]`` int64 the engine's slot of the new token, which is its place in a dense layer."""
    open_lane_pages: torch.Tensor
    """``[lane rows]`` int32 lane page of the new token."""
    offsets: torch.Tensor
    """``[lane rows]`` int32 place of the new token in its page."""
    pressed: bool
    """Whether a page may lack its frame."""
    waves: list[Wave]
    dense_attention: DecodeAttention | None
    fills: bool = True
    """Whether a page may become full."""
    places: torch.Tensor | None = None
    """``[managed layers, lane rows]`` int64 of the new tokens, where looked up beforehand."""
    lane_frames: torch.Tensor | None = None
    """``[managed layers, lane rows, pages]`` int32 of a calm step's only wave, likewise."""

    @property
    def calm(self) -> bool:
        """Whether nothing is chosen and nothing can be missing, so that tables are only read."""
        return not self.pressed and not any(wave.over_budget for wave in self.waves)


def plan_decode(
    cache: PagedCache,
    slots: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    host_lengths: list[int],
    settings: list[ArkValeConfig] | None = None,
) -> DecodeStep:
    """Prepare a decode pass: map new open pages, lay out the waves.

    Args:
        slots: the engine's ``[requests, tokens]`` int32 slot table; rows: ``[rows]`` int64 in it.
        lengths: ``[rows]`` int64 tokens of each row, the new one included; ``host_lengths`` the
            same numbers on the host, so that shapes need no read of the device.  0 is inert.
        settings: of each row, where some request brought its own.
    """
    cache.begin_step()
    cache.dropping.prepare(slots, settings or [cache.config])
    size = cache.config.page_size
    lengths = lengths.to(torch.int32)
    page_counts = [-(-length // size) for length in host_lengths]
    pages = cache.page_table(slots, rows, lengths, max(1, *page_counts))
    counts = (lengths + (size - 1)) >> (size.bit_length() - 1)
    open_pages = pages.gather(1, (counts - 1).clamp(min=0).long().unsqueeze(1)).squeeze(1)
    offsets = (lengths - 1) & (size - 1)
    fills = _map_open_pages(cache, open_pages, offsets, host_lengths)
    groups = cache.plan.geometry.groups
    offsets_by_lane = offsets.repeat_interleave(groups)
    open_lane_pages = cache.lane_pages(open_pages)
    waves = [
        _plan_wave(
            cache,
            settings[rows_of[0]] if settings else cache.config,
            rows,
            pages,
            counts,
            lengths,
            host_lengths,
            slice(*rows_of),
            number,
        )
        for number, rows_of in enumerate(cache.waves(page_counts, settings))
    ]
    places, lane_frames = _look_ahead(cache, open_lane_pages, offsets_by_lane, waves)
    return DecodeStep(
        pages=pages,
        lengths=lengths,
        common_length=_common(host_lengths),
        slots=open_pages.long() * size + offsets,
        open_lane_pages=open_lane_pages,
        offsets=offsets_by_lane,
        pressed=cache.pressed,
        waves=waves,
        dense_attention=(
            cache.attention.plan_dense(host_lengths, pages, counts) if cache.store.dense else None
        ),
        fills=fills,
        places=places,
        lane_frames=lane_frames,
    )


def _look_ahead(
    cache: PagedCache, open_lane_pages: torch.Tensor, offsets: torch.Tensor, waves: list[Wave]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Look up for all layers at once what differs between them by their tables alone: places of
    the new tokens, and in a calm step the frames of all pages.

    On a host an op costs its dispatch whatever its size.  What is looked up stays true throughout
    the step: open pages keep their frames, and in a calm step all pages do.
    """
    if cache.store.device.type != "cpu":
        return None, None
    table = cache.store.residency.frame_of
    places = find_places(table, open_lane_pages, offsets, *cache.store.k_frames.shape[1:3])
    if cache.pressed or len(waves) > 1 or waves[0].over_budget:
        return places, None
    lane_pages = waves[0].lane_pages
    lane_frames = table.index_select(1, lane_pages.view(-1))
    return places, lane_frames.view(-1, *lane_pages.shape)


def _map_open_pages(
    cache: PagedCache, open_pages: torch.Tensor, offsets: torch.Tensor, host_lengths: list[int]
) -> bool:
    """Give pages that this step begins a frame; returns whether it fills some."""
    size = cache.config.page_size
    opening = [row for row, length in enumerate(host_lengths) if length % size == 1]
    if opening:
        fresh = open_pages.index_select(0, cache.to_device(opening))
        cache.claim(fresh, torch.ones_like(fresh, dtype=torch.bool), evicting=len(opening))
    full = sum(length % size == 0 for length in host_lengths if length)
    if full:
        is_full = (offsets == size - 1) & (open_pages > 0)
        cache.store.sealed.index_copy_(0, open_pages.long(), is_full)
        cache.counters.sealed += full
    return full > 0


def _plan_wave(
    cache: PagedCache,
    settings: ArkValeConfig,
    requests: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor,
    lengths: torch.Tensor,
    host_lengths: list[int],
    rows: slice,
    number: int,
) -> Wave:
    groups, size = cache.plan.geometry.groups, cache.config.page_size
    own = host_lengths[rows]
    page_counts = [-(-length // size) for length in own]
    width = max(1, *page_counts)
    whole = settings.policy == "full"
    budget = width if whole else settings.budget_pages
    over_budget = width > budget
    counts = counts[rows].repeat_interleave(groups)
    attended = lengths[rows].repeat_interleave(groups)
    if over_budget:
        attended = attended - (counts - budget).clamp(min=0) * size
    elif not cache.pressed:
        cache.counters.resident_hits += sum(page_counts) * cache.plan.geometry.lanes
    kept = [
        length - max(0, pages - budget) * size
        for length, pages in zip(own, page_counts, strict=True)
    ]
    sequences = whole_rows(cache, pages, host_lengths, rows) if whole and cache.pressed else None
    return Wave(
        settings=settings,
        requests=None if settings.selection == "recall" else requests[rows],
        lane_rows=slice(rows.start * groups, rows.stop * groups),
        lane_pages=cache.lane_pages(pages[rows, :width].contiguous()),
        page_counts=counts,
        lengths=attended,
        common_length=_common(kept),
        over_budget=over_budget,
        attention=None if sequences else cache.attention.plan_lanes(kept, number),
        sequences=sequences,
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
    heads = layer.k_frames.shape[2:]
    new: NewTokens | None = NewTokens(
        step.open_lane_pages,
        step.offsets,
        k.view(lane_rows, *heads),
        v.view(lane_rows, *heads),
        step.places[index] if step.places is not None else None,
        step.fills,
    )
    lane_query = query.view(lane_rows, -1, query.shape[-1])
    outputs: list[torch.Tensor] = []
    for number, wave in enumerate(step.waves):
        # What earlier waves used in this step may leave now.
        clock = cache.clock + number if number else cache.clock
        rows = lane_query[wave.lane_rows]
        lane_frames, recalls = None, None
        if wave.sequences is None and (step.pressed or wave.over_budget):
            lane_frames, recalls = _choose(cache, index, wave, rows, clock, scaling)
        elif wave.sequences is None:
            with part("resolve"):
                known = step.lane_frames
                lane_frames = _look_up(layer, wave) if known is None else known[index]
        move_pages(layer, new, recalls, clock, digest=cache.config.digest)
        if cache.checksums is not None:
            cache.checksums.after_move(index, layer, new, recalls)
        new = None
        with part("attend"):
            if wave.sequences is None:
                out = _attend(layer, wave, rows, lane_frames, scaling)
            else:
                out = attend_whole(cache, index, wave.sequences, query, k, v, scaling)
        outputs.append(out.view(rows.shape))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out.view(query.shape)


def _choose(
    cache: PagedCache,
    index: int,
    wave: Wave,
    query: torch.Tensor,
    clock: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, Recalls]:
    """Frames of the pages that the wave attends to, and which of them must be filled first."""
    layer, rule = cache.store.managed[index], selection_rule(wave.settings)
    chosen, resolved = cache.counters.of_layer(index)
    lane_pages, scores = wave.lane_pages, None
    if wave.over_budget:
        with part("score"):
            ranked = _rank(cache, index, wave, query, scaling)
        with part("select"):
            lane_pages, scores = select_pages(ranked, lane_pages, wave.page_counts, rule, chosen)
    with part("resolve"):
        return resolve_pages(
            layer.residency,
            lane_pages,
            scores,
            clock,
            resolved,
            groups=cache.plan.geometry.groups,
            lists=wave.attention.lists if wave.attention else None,
        )


def _rank(
    cache: PagedCache, index: int, wave: Wave, query: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Scores of the wave's pages by its rule: ``[lane rows, pages]`` float32."""
    layer = cache.store.managed[index]
    if wave.requests is None:
        return score_pages(
            query,
            layer.digests,
            layer.residency.frame_of,
            wave.lane_pages,
            wave.page_counts,
            selection_rule(wave.settings),
            head_reduce=wave.settings.head_reduce,
            scaling=scaling,
        )
    return cache.dropping.rank(
        index,
        layer,
        wave.settings,
        wave.requests,
        wave.lane_pages,
        wave.page_counts,
        query,
        scaling,
    )


def _look_up(layer: PagedLayer, wave: Wave) -> torch.Tensor:
    return find_frames(
        layer.residency.frame_of,
        wave.lane_pages,
        wave.page_counts,
        scratch=layer.k_frames.shape[0] - 1,
        lists=wave.attention.lists if wave.attention else None,
    )


def _attend(
    layer: PagedLayer,
    wave: Wave,
    query: torch.Tensor,
    lane_frames: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    if wave.attention is not None:
        return wave.attention.run(query, layer.k_frames, layer.v_frames, scaling)
    assert lane_frames is not None
    return attend_frames(
        query,
        layer.k_frames,
        layer.v_frames,
        lane_frames,
        wave.lengths,
        scaling=scaling,
        common_length=wave.common_length,
    )[0]


def decode_dense(
    layer: DenseLayer,
    step: DecodeStep,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Decode attention of one unmanaged layer over all its pages; shapes as the managed one's."""
    write_tokens(layer.k_frames, layer.v_frames, step.slots, k, v)
    if step.dense_attention is not None:
        return step.dense_attention.run(query, layer.k_frames, layer.v_frames, scaling)
    return attend_frames(
        query,
        layer.k_frames,
        layer.v_frames,
        step.pages,
        step.lengths,
        scaling=scaling,
        common_length=step.common_length,
    )[0]
