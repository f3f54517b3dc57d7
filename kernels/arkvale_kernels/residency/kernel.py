"""Residency on the device: one program per lane decides, so that nothing needs a lock.

What a step wants is small (rows times budget); frames are many but read only when a page must
leave.  Table entries that other threads of the program just wrote are read past the first-level
cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arkvale_kernels.layout import SCORE_BITS, FrameLists, Recalls, Residency
from arkvale_kernels.triton_helpers import ordered_bits

_WANTED = tl.constexpr(-2)
"""Table mark of a page that was missed and waits for a frame."""
_SCORE_BITS = tl.constexpr(SCORE_BITS)


@triton.jit
def _entries(lane_pages, first, total, group, groups, budget: tl.constexpr, BLOCK: tl.constexpr):
    """The lane's wanted pages, row after row: place in the tables of the batch, page, wanted."""
    index = first + tl.arange(0, BLOCK)
    row = (index // budget) * groups + group
    place = row.to(tl.int64) * budget + index % budget
    inside = index < total
    page = tl.load(lane_pages + place, mask=inside, other=0).to(tl.int64)
    return row, place, page, inside, inside & (page > 0)


@triton.jit
def _heats(scores, place, wanted, now, HAS_SCORES: tl.constexpr, BLOCK: tl.constexpr):
    if HAS_SCORES:
        score = tl.load(scores + place, mask=wanted, other=0.0)
        return now | (ordered_bits(score) >> (32 - _SCORE_BITS))
    else:
        return tl.zeros([BLOCK], tl.int64) + now


@triton.jit
def _touch(frame_of, heat, lane_pages, scores, recall_pages, group, groups, total, now,
           budget: tl.constexpr, HAS_SCORES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Warm the hits and list every missing page once; returns hits, misses, pages listed."""
    hits = tl.zeros([], tl.int32)
    misses = tl.zeros([], tl.int32)
    listed = tl.zeros([], tl.int32)
    for first in range(0, total, BLOCK):
        _, place, page, _, wanted = _entries(lane_pages, first, total, group, groups, budget, BLOCK)
        frame = tl.load(frame_of + page, mask=wanted, other=0, cache_modifier=".cg")
        hit = wanted & (frame >= 0)
        warmth = _heats(scores, place, wanted, now, HAS_SCORES, BLOCK)
        tl.atomic_max(heat + frame, warmth, mask=hit)
        missing = wanted & (frame < 0)
        before = tl.atomic_min(frame_of + page, _WANTED, mask=missing)
        # Of all that want a page, one finds it unmarked.
        new = missing & (before == -1)
        target = listed + tl.cumsum(new.to(tl.int32), 0) - 1
        tl.store(recall_pages + target, page.to(tl.int32), mask=new)
        hits += tl.sum(hit.to(tl.int32), 0)
        misses += tl.sum(missing.to(tl.int32), 0)
        listed += tl.sum(new.to(tl.int32), 0)
    return hits, misses, listed


@triton.jit
def _coldest(heat, frames, wanted, now, BLOCK: tl.constexpr):
    """The heat that the ``wanted`` coldest frames unused in this step do not exceed, and how many
    frames of just that heat belong to them; all frames if there are fewer.

    Eight bits a round; heats are shifted up by one, so that free frames are 0.
    """
    digits = tl.arange(0, 256)
    prefix = tl.zeros([], tl.int64)
    limit = tl.zeros([], tl.int64)
    shift = tl.zeros([], tl.int32)
    while (now >> shift.to(tl.int64)) > 255:
        shift += 8
    open_round = wanted > 0
    held = wanted
    while open_round:
        counts = tl.zeros([256], tl.int32)
        for first in range(0, frames, BLOCK):
            index = first + tl.arange(0, BLOCK)
            value = tl.load(heat + index, mask=index < frames, other=now, cache_modifier=".cg") + 1
            fits = (value <= now) & ((value >> (shift + 8).to(tl.int64)) == prefix)
            digit = (value >> shift.to(tl.int64)) & 255
            counts += tl.histogram(digit.to(tl.int32), 256, mask=fits)
        reach = tl.cumsum(counts, 0)
        digit = tl.minimum(tl.sum((reach < wanted).to(tl.int32), 0), 255)
        below = tl.sum(tl.where(digits == digit - 1, reach, 0), 0)
        held = tl.sum(tl.where(digits == digit, counts, 0), 0)
        prefix = prefix * 256 + digit
        wanted = tl.minimum(wanted - below, held)
        # A digit taken whole needs no further round: everything below the next digit is in.
        shift64 = shift.to(tl.int64)
        limit = tl.where(held == wanted, ((prefix + 1) << shift64) - 1, prefix << shift64)
        open_round = (held > wanted) & (shift > 0)
        shift -= 8
    # Of a digit taken whole, all frames belong, those at the limit itself too.
    return limit - 1, tl.where(held == wanted, frames, wanted)


@triton.jit
def _evict(frame_of, page_in, heat, recall_pages, recall_frames, frames, first_frame, listed,
           now, BLOCK: tl.constexpr):  # fmt: skip
    """Give the listed pages the coldest frames; returns pages served and pages that left."""
    limit, ties = _coldest(heat + first_frame, frames, listed, now, BLOCK)
    served = tl.zeros([], tl.int32)
    evicted = tl.zeros([], tl.int32)
    equal_before = tl.zeros([], tl.int32)
    for first in range(0, frames, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < frames
        frame = first_frame + index
        value = tl.load(heat + frame, mask=inside, other=now, cache_modifier=".cg")
        usable = inside & (value < now)
        equal = usable & (value == limit)
        order = equal_before + tl.cumsum(equal.to(tl.int32), 0)
        victim = (usable & (value < limit)) | (equal & (order <= ties))
        target = served + tl.cumsum(victim.to(tl.int32), 0) - 1
        victim = victim & (target < listed)
        page = tl.load(recall_pages + target, mask=victim, other=0, cache_modifier=".cg")
        leaving = tl.load(page_in + frame, mask=victim, other=-1)
        left = victim & (leaving >= 0)
        tl.store(frame_of + leaving, tl.full([BLOCK], -1, tl.int32), mask=left)
        tl.store(page_in + frame, page, mask=victim)
        tl.store(frame_of + page, frame, mask=victim)
        tl.store(heat + frame, tl.zeros([BLOCK], tl.int64) + now, mask=victim)
        tl.store(recall_frames + target, frame, mask=victim)
        equal_before += tl.sum(equal.to(tl.int32), 0)
        served += tl.sum(victim.to(tl.int32), 0)
        evicted += tl.sum(left.to(tl.int32), 0)
    return served, evicted


@triton.jit
def _list_frames(indices, starts, row, column, frame, inside, scratch):
    """Write frames to the packed lists; rows may own fewer or more entries than they want."""
    start = tl.load(starts + row, mask=inside, other=0)
    stop = tl.load(starts + row + 1, mask=inside, other=0)
    owned = inside & (start + column < stop)
    tl.store(indices + start + column, tl.where(frame < 0, scratch, frame), mask=owned)


@triton.jit
def _resolve_pages(frame_of, page_in, heat, lane_pages, scores, clock, counts, lane_frames,
                   recall_pages, recall_frames, recall_counts, indices, starts, rows, frames,
                   groups: tl.constexpr, budget: tl.constexpr, HAS_SCORES: tl.constexpr, HAS_LISTS:
                   tl.constexpr, BLOCK: tl.constexpr, FRAMES: tl.constexpr):  # fmt: skip
    group = tl.program_id(0)
    total = rows * budget
    recall_pages += group * total
    recall_frames += group * total
    now = tl.load(clock) << _SCORE_BITS
    hits, misses, listed = _touch(
        frame_of, heat, lane_pages, scores, recall_pages, group, groups, total, now, budget,
        HAS_SCORES, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    served = tl.zeros([], tl.int32)
    evicted = tl.zeros([], tl.int32)
    if listed > 0:
        served, evicted = _evict(
            frame_of, page_in, heat, recall_pages, recall_frames, frames, group * frames, listed,
            now, FRAMES,
        )  # fmt: skip
        tl.debug_barrier()
    for first in range(0, total, BLOCK):
        row, place, page, inside, wanted = _entries(
            lane_pages, first, total, group, groups, budget, BLOCK
        )
        frame = tl.load(frame_of + page, mask=wanted, other=-1, cache_modifier=".cg")
        resident = wanted & (frame >= 0)
        frame = tl.where(resident, frame, -1)
        tl.store(lane_frames + place, frame, mask=inside)
        if listed > 0:
            warmth = _heats(scores, place, wanted, now, HAS_SCORES, BLOCK)
            tl.atomic_max(heat + frame, warmth, mask=resident)
        if HAS_LISTS:
            column = (place % budget).to(tl.int32)
            _list_frames(indices, starts, row, column, frame, inside, groups * frames)
    if served < listed:
        # Refused pages carry a mark that must not outlive the step.
        tl.debug_barrier()
        for first in range(served, listed, BLOCK):
            index = first + tl.arange(0, BLOCK)
            page = tl.load(recall_pages + index, mask=index < listed, other=0)
            tl.store(frame_of + page, tl.full([BLOCK], -1, tl.int32), mask=index < listed)
    tl.store(recall_counts + group, served)
    tl.atomic_add(counts, hits.to(tl.int64))
    tl.atomic_add(counts + 1, misses.to(tl.int64))
    tl.atomic_add(counts + 2, served.to(tl.int64))
    tl.atomic_add(counts + 3, evicted.to(tl.int64))
    tl.atomic_add(counts + 4, (listed - served).to(tl.int64))


@triton.jit
def _find_frames(frame_of, lane_pages, page_counts, lane_frames, indices, starts, row_stride,
                 width, scratch, HAS_LISTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    count = tl.load(page_counts + row).to(tl.int32)
    pages = lane_pages + row.to(tl.int64) * row_stride + column
    page = tl.load(pages, mask=column < count, other=0).to(tl.int64)
    frame = tl.load(frame_of + page, mask=column < count, other=-1)
    tl.store(lane_frames + row.to(tl.int64) * width + column, frame, mask=inside)
    if HAS_LISTS:
        rows = row + tl.zeros([BLOCK], tl.int32)
        _list_frames(indices, starts, rows, column, frame, inside, scratch)


def resolve_pages(
    residency: Residency,
    lane_pages: torch.Tensor,
    scores: torch.Tensor | None,
    clock: torch.Tensor,
    counts: torch.Tensor,
    groups: int,
    lists: FrameLists | None,
) -> tuple[torch.Tensor, Recalls]:
    """See :func:`arkvale_kernels.residency.api.resolve_pages`; among frames of one heat the first
    leave, and where frames are short the last misses are refused."""
    rows, budget = lane_pages.shape
    device = lane_pages.device
    lane_frames = torch.empty((rows, budget), dtype=torch.int32, device=device)
    recalls = Recalls(
        torch.empty(rows * budget, dtype=torch.int32, device=device),
        torch.empty(rows * budget, dtype=torch.int32, device=device),
        torch.empty(groups, dtype=torch.int32, device=device),
    )
    frames = (residency.heat.shape[0] - 1) // groups
    block = min(2048, max(128, triton.next_power_of_2(rows // groups * budget)))
    warps = 16 if block == 2048 else min(8, block // 32)  # no thread without an entry
    _resolve_pages[(groups,)](
        *residency,
        lane_pages,
        scores if scores is not None else lane_pages,
        clock,
        counts,
        lane_frames,
        *recalls,
        *(lists if lists is not None else (lane_pages, lane_pages)),
        rows // groups,
        frames,
        groups=groups,
        budget=budget,
        HAS_SCORES=scores is not None,
        HAS_LISTS=lists is not None,
        BLOCK=block,
        FRAMES=min(4096, 512 * warps),
        num_warps=warps,
    )
    return lane_frames, recalls


def find_frames(
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    scratch: int,
    lists: FrameLists | None,
) -> torch.Tensor:
    """See :func:`arkvale_kernels.residency.api.find_frames`."""
    rows, width = lane_pages.shape
    lane_frames = torch.empty((rows, width), dtype=torch.int32, device=lane_pages.device)
    block = min(1024, triton.next_power_of_2(width))
    _find_frames[(rows, triton.cdiv(width, block))](
        frame_of,
        lane_pages,
        page_counts,
        lane_frames,
        *(lists if lists is not None else (lane_pages, lane_pages)),
        lane_pages.stride(0),
        width,
        scratch,
        HAS_LISTS=lists is not None,
        BLOCK=block,
        num_warps=4,
    )
    return lane_frames
