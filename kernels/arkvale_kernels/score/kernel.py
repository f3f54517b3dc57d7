"""Page scores: a scan over digests, bound by the memory that holds them.

A row is split over programs so that one row fills the chip; each program walks tiles of pages and,
within a tile, the KV heads of the lane.  Heads that are averaged are averaged in the query, so a
digest is read once whatever the GQA ratio.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arkvale_kernels.layout import SelectionRule
from arkvale_kernels.triton_helpers import as_bytes, as_float, multiprocessors

_PROGRAMS_PER_PROCESSOR = 8
"""Of 4 warps each: what keeps enough loads in flight to fill the memory's bandwidth."""
_TILE = 4096
"""Elements of one digest vector's tile: 16 bytes in flight per thread, eight times."""


@triton.jit
def _mark_resident(score, frame):
    """The score with its lowest mantissa bit telling whether the page has a frame."""
    bits = (score.to(tl.int32, bitcast=True) & -2) | (frame >= 0).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load_tile(digests, pages, offset, inside, head_dim: tl.constexpr, DIM: tl.constexpr, stride,
               FP8: tl.constexpr):  # fmt: skip
    dim = tl.arange(0, DIM)
    places = pages[:, None] * stride + (offset + dim)[None, :]
    mask = inside[:, None] & (dim < head_dim)[None, :]
    return as_float(tl.load(digests + places, mask=mask, other=0), FP8)


@triton.jit
def _score_pages(query, digests, frame_of, lane_pages, page_counts, scores, row_stride, width,
                 scaling, budget: tl.constexpr, sinks: tl.constexpr, window: tl.constexpr,
                 kv_heads: tl.constexpr, per_kv: tl.constexpr, head_dim: tl.constexpr, DIM:
                 tl.constexpr, PAGES: tl.constexpr, REDUCE: tl.constexpr,
                 FP8: tl.constexpr):  # fmt: skip
    """``softmax-mean`` leaves the scaled logits of every head, ``[rows, query heads, pages]``."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    count = tl.load(page_counts + row).to(tl.int32)
    stop = tl.where(count > budget, count - window, 0)
    dim = tl.arange(0, DIM)
    has_dim = dim < head_dim
    query += row * kv_heads * per_kv * head_dim + dim
    stride = 2 * kv_heads * head_dim
    for first in range(sinks + split * PAGES, stop, splits * PAGES):
        place = first + tl.arange(0, PAGES)
        inside = place < stop
        pages = tl.load(lane_pages + row * row_stride + place, mask=inside, other=0).to(tl.int64)
        total = tl.zeros([PAGES], tl.float32)
        if REDUCE == "max":
            total += float("-inf")
        for head in range(kv_heads):
            offset = head * head_dim
            upper = _load_tile(digests, pages, offset, inside, head_dim, DIM, stride, FP8)
            lower = _load_tile(
                digests, pages, offset + kv_heads * head_dim, inside, head_dim, DIM, stride, FP8
            )
            if REDUCE == "mean":
                positive = tl.zeros([DIM], tl.float32)
                negative = tl.zeros([DIM], tl.float32)
                for group in tl.static_range(per_kv):
                    of_head = query + (head * per_kv + group) * head_dim
                    q = tl.load(of_head, mask=has_dim, other=0.0).to(tl.float32)
                    positive += tl.maximum(q, 0.0)
                    negative += tl.minimum(q, 0.0)
                total += tl.sum(upper * positive[None, :] + lower * negative[None, :], 1)
            else:
                for group in tl.static_range(per_kv):
                    of_head = query + (head * per_kv + group) * head_dim
                    q = tl.load(of_head, mask=has_dim, other=0.0).to(tl.float32)
                    product = (
                        tl.maximum(q, 0.0)[None, :] * upper + tl.minimum(q, 0.0)[None, :] * lower
                    )
                    score = tl.sum(product, 1)
                    if REDUCE == "max":
                        total = tl.maximum(total, score)
                    else:
                        out = scores + (row * kv_heads * per_kv + head * per_kv + group) * width
                        tl.store(out + place, score * scaling, mask=inside)
        if REDUCE != "softmax-mean":
            if REDUCE == "mean":
                total = total / (kv_heads * per_kv)
            frame = tl.load(frame_of + pages, mask=inside, other=-1)
            tl.store(scores + row * width + place, _mark_resident(total, frame), mask=inside)


@triton.jit
def _softmax_mean(logits, frame_of, lane_pages, page_counts, scores, row_stride, width, heads,
                  budget: tl.constexpr, sinks: tl.constexpr, window: tl.constexpr, BLOCK:
                  tl.constexpr):  # fmt: skip
    """Mean over heads of each head's softmax over the competing pages of its row."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(page_counts + row).to(tl.int32)
    stop = tl.where(count > budget, count - window, 0)
    for head in range(heads):
        of_head = logits + (row * heads + head) * width
        largest = float("-inf")
        total = 0.0
        for first in range(sinks, stop, BLOCK):
            place = first + tl.arange(0, BLOCK)
            value = tl.load(of_head + place, mask=place < stop, other=float("-inf"))
            rise = tl.maximum(largest, tl.max(value, 0))
            total = total * tl.exp(largest - rise) + tl.sum(tl.exp(value - rise), 0)
            largest = rise
        for first in range(sinks, stop, BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < stop
            value = tl.load(of_head + place, mask=inside, other=float("-inf"))
            share = tl.exp(value - largest) / (total * heads)
            out = scores + row * width + place
            if head > 0:
                share += tl.load(out, mask=inside, other=0.0)
            if head == heads - 1:
                pages = tl.load(lane_pages + row * row_stride + place, mask=inside, other=0)
                frame = tl.load(frame_of + pages.to(tl.int64), mask=inside, other=-1)
                share = _mark_resident(share, frame)
            tl.store(out, share, mask=inside)


def score_pages(
    query: torch.Tensor,
    digests: torch.Tensor,
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    rule: SelectionRule,
    head_reduce: str,
    scaling: float,
) -> torch.Tensor:
    """See :func:`arkvale_kernels.score.api.score_pages`."""
    rows, query_heads, head_dim = query.shape
    width, kv_heads = lane_pages.shape[1], digests.shape[2]
    dim = triton.next_power_of_2(head_dim)
    # Heads that are kept apart need registers of their own.
    tile = max(16, (_TILE if head_reduce == "mean" else _TILE // 2) // dim)
    splits = triton.cdiv(_PROGRAMS_PER_PROCESSOR * multiprocessors(query.device), rows)
    splits = max(1, min(splits, triton.cdiv(width, tile)))
    scores = torch.empty((rows, width), dtype=torch.float32, device=query.device)
    out = scores
    if head_reduce == "softmax-mean":
        out = torch.empty((rows, query_heads, width), dtype=torch.float32, device=query.device)
    limits = {"budget": rule.budget, "sinks": rule.sinks, "window": rule.window}
    _score_pages[(rows, splits)](
        query,
        as_bytes(digests),
        frame_of,
        lane_pages,
        page_counts,
        out,
        lane_pages.stride(0),
        width,
        scaling,
        **limits,
        kv_heads=kv_heads,
        per_kv=query_heads // kv_heads,
        head_dim=head_dim,
        DIM=dim,
        PAGES=tile,
        REDUCE=head_reduce,
        FP8=digests.dtype.itemsize == 1,
        num_warps=4,
    )
    if head_reduce == "softmax-mean":
        _softmax_mean[(rows,)](
            out,
            frame_of,
            lane_pages,
            page_counts,
            scores,
            lane_pages.stride(0),
            width,
            query_heads,
            **limits,
            BLOCK=1024,
            num_warps=4,
        )
    return scores
