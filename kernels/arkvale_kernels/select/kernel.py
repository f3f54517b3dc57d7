"""Page selection: one program per row finds two thresholds by radix and packs what passes them.

A page's key is its score above its place in the row, so keys are distinct, ties fall to the
earlier page, and a threshold separates exactly as many pages as were asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arkvale_kernels.layout import SelectionRule
from arkvale_kernels.triton_helpers import ordered_bits

MOST_PAGES = 1 << 20
"""In a row: places take 20 bits of a key, scores 32, the tier 1."""


@triton.jit
def _keys(row_scores, first, start, stop, TIERED: tl.constexpr, BLOCK: tl.constexpr):
    """Place, key and residency of ``BLOCK`` pages; the key of a page outside is -1."""
    place = first + tl.arange(0, BLOCK)
    inside = (place >= start) & (place < stop)
    score = tl.load(row_scores + place, mask=inside, other=0.0)
    resident = (score.to(tl.int32, bitcast=True) & 1) == 1
    key = (ordered_bits(score) << 20) | (0xFFFFF - place).to(tl.int64)
    if TIERED:
        key = key | (resident.to(tl.int64) << 52)
    return place, tl.where(inside, key, -1), resident, inside


@triton.jit
def _threshold(row_scores, start, stop, wanted, floor, ceiling, TIERED: tl.constexpr, KEEP:
               tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The key that ``wanted`` of the pages with ``floor <= untiered key < ceiling`` reach, or 0 if
    there are fewer.  ``KEEP`` narrows them to "resident" or "absent" ones.

    Eight bits a round from the top; a round that leaves no page to argue about is the last.
    """
    digits = tl.arange(0, 256)
    threshold = tl.zeros([], tl.int64)
    prefix = tl.zeros([], tl.int64)
    shift = tl.full([], 48, tl.int32)
    wanted += tl.zeros([], tl.int32)
    while (shift >= 0) & (wanted > 0):
        counts = tl.zeros([256], tl.int32)
        for first in range(start, stop, BLOCK):
            _, key, resident, inside = _keys(row_scores, first, start, stop, TIERED, BLOCK)
            plain = key & 0xFFFFFFFFFFFFF
            considered = inside & (plain >= floor) & (plain < ceiling)
            if KEEP == "resident":
                considered = considered & resident
            if KEEP == "absent":
                considered = considered & (resident == 0)
            considered = considered & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=considered)
        reach = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((reach >= wanted).to(tl.int32), 0) - 1
        above = tl.sum(tl.where(digits == digit + 1, reach, 0), 0)
        held = tl.sum(tl.where(digits == digit, counts, 0), 0)
        prefix = prefix * 256 + digit
        threshold = tl.where(digit < 0, 0, prefix << shift.to(tl.int64))
        wanted = tl.where((digit < 0) | (held == wanted - above), 0, wanted - above)
        shift -= 8
    return threshold


@triton.jit
def _count(row_scores, start, stop, leading, recalled, BLOCK: tl.constexpr):
    """How many must pages are kept: resident, or worth their recall."""
    taken = tl.zeros([], tl.int32)
    for first in range(start, stop, BLOCK):
        _, key, resident, inside = _keys(row_scores, first, start, stop, False, BLOCK)
        kept = inside & (key >= leading) & (resident | (key >= recalled))
        taken += tl.sum(kept.to(tl.int32), 0)
    return taken


@triton.jit
def _copy(lane_pages, row_scores, chosen, importance, first, count, at, WIDTH: tl.constexpr):
    """Copy ``count`` forced pages from place ``first`` of the row to place ``at`` of the list."""
    index = tl.arange(0, WIDTH)
    inside = index < count
    page = tl.load(lane_pages + first + index, mask=inside, other=0).to(tl.int32)
    tl.store(chosen + at + index, page, mask=inside)
    tl.store(importance + at + index, tl.full([WIDTH], float("inf"), tl.float32), mask=inside)


@triton.jit
def _select_pages(scores, lane_pages, page_counts, chosen, importance, counts, row_stride, width,
                  budget: tl.constexpr, must: tl.constexpr, sinks: tl.constexpr, window:
                  tl.constexpr, cap: tl.constexpr, HAS_COUNTS: tl.constexpr, WIDTH: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(page_counts + row).to(tl.int32)
    scores += row * width
    lane_pages += row * row_stride
    chosen += row * budget
    importance += row * budget
    listed = tl.minimum(count, budget)
    index = tl.arange(0, WIDTH)
    if count > budget:
        start, stop = sinks, count - window
        _copy(lane_pages, scores, chosen, importance, 0, sinks, 0, WIDTH)
        _copy(lane_pages, scores, chosen, importance, stop, window - 1, sinks, WIDTH)
        everything = tl.full([], 0x10000000000000, tl.int64)
        nothing = tl.zeros([], tl.int64)
        leading = everything
        if must > 0:
            leading = _threshold(scores, start, stop, must, nothing, leading, False, "all", BLOCK)
        # Absent must pages below this key are given up.
        recalled = leading
        if cap >= 0:
            recalled = everything
            if cap > 0:
                best = _threshold(scores, start, stop, cap, leading, everything, False, "absent",
                                  BLOCK)  # fmt: skip
                recalled = tl.maximum(best, leading)
        taken = _count(scores, start, stop, leading, recalled, BLOCK)
        room = budget - sinks - window - taken
        filling = _threshold(scores, start, stop, room, nothing, leading, True,
                             "all" if cap < 0 else "resident", BLOCK)  # fmt: skip
        if room == 0:
            filling = everything << 1  # out of reach

        at = sinks + window - 1
        forced = tl.zeros([], tl.int32)
        for first in range(start, stop, BLOCK):
            place, key, resident, inside = _keys(scores, first, start, stop, True, BLOCK)
            plain = key & 0xFFFFFFFFFFFFF
            must_be = (plain >= leading) & (resident | (plain >= recalled))
            fills = (plain < leading) & (key >= filling)
            if cap >= 0:
                fills = fills & resident
            kept = inside & (must_be | fills)
            target = at + tl.cumsum(kept.to(tl.int32), 0) - 1
            page = tl.load(lane_pages + place, mask=kept, other=0).to(tl.int32)
            score = tl.load(scores + place, mask=kept, other=0.0)
            tl.store(chosen + target, page, mask=kept)
            tl.store(importance + target, score, mask=kept)
            at += tl.sum(kept.to(tl.int32), 0)
            if HAS_COUNTS and cap < 0:
                forced += tl.sum((inside & fills & (resident == 0)).to(tl.int32), 0)
        if HAS_COUNTS:
            tl.atomic_add(counts, forced.to(tl.int64))
            tl.atomic_add(counts + 1, (must - taken).to(tl.int64))
        _copy(lane_pages, scores, chosen, importance, count - 1, 1, budget - 1, WIDTH)
        empty = (index >= at) & (index < budget - 1)
    else:
        _copy(lane_pages, scores, chosen, importance, 0, listed, 0, WIDTH)
        empty = (index >= listed) & (index < budget)
    tl.store(chosen + index, tl.zeros([WIDTH], tl.int32), mask=empty)
    tl.store(importance + index, tl.full([WIDTH], float("-inf"), tl.float32), mask=empty)


def select_pages(
    scores: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    rule: SelectionRule,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.select.api.select_pages`; ties fall to the earlier page."""
    rows, width = scores.shape
    if width > MOST_PAGES:
        raise ValueError(f"scores must have at most {MOST_PAGES} pages in a row, got {width}")
    chosen = torch.empty((rows, rule.budget), dtype=torch.int32, device=scores.device)
    importance = torch.empty((rows, rule.budget), dtype=torch.float32, device=scores.device)
    block = min(4096, max(256, triton.next_power_of_2(width)))
    _select_pages[(rows,)](
        scores,
        lane_pages,
        page_counts,
        chosen,
        importance,
        counts if counts is not None else page_counts,
        lane_pages.stride(0),
        width,
        budget=rule.budget,
        must=rule.must,
        sinks=rule.sinks,
        window=rule.window,
        cap=-1 if rule.recall_cap is None else rule.recall_cap,
        HAS_COUNTS=counts is not None,
        WIDTH=triton.next_power_of_2(rule.budget),
        BLOCK=block,
        num_warps=8 if block >= 1024 else 4,
    )
    return chosen, importance
