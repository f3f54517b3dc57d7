"""Attention in Triton: decode over chosen frames split over tokens, prefill, merges.

Softmax runs in powers of two, which the device has an instruction for; log-sum-exps are natural
outside a kernel.  Query heads of one KV head share a tile, so keys and values are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arkvale_kernels.triton_helpers import multiprocessors

_LOG2E = 1.4426950408889634
_LEAST_DOT = 16  # rows of the smallest matrix instruction
_MOST_HEADS = 64  # of one KV head in a decode program, lest its accumulator spill
_TILES_PER_SPLIT = 2  # at least: below, merging costs more than it spares
_PROGRAMS_PER_PROCESSOR = 4
_MOST_SPLITS = 64  # are merged in one tile
_MERGED_ELEMENTS = 4096


@triton.jit
def _softmax_step(logits, top, total, acc):
    """Fold ``logits [rows, tokens]`` into the running maximum and sum; returns the weights too."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    # A row that saw no token yet has minus infinity, which less itself would be NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(top - shift)
    return weights, new_top, total * decay + tl.sum(weights, 1), acc * decay[:, None]


@triton.jit
def _softmax_end(top, total, acc):
    """Output and natural log-sum-exp; 0 and minus infinity for a row that saw no token."""
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    return out, (top + tl.log2(total)) * 0.6931471805599453


@triton.jit(do_not_specialize=["pages", "lane_stride"])
def _attend_frames_kernel(
    query,
    k_frames,
    v_frames,
    lane_frames,
    lengths,
    out,
    lse,
    pages,
    lane_stride,
    query_row,
    query_head,
    k_frame,
    k_token,
    k_head,
    v_frame,
    v_token,
    v_head,
    scaling,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One split of one row's tokens, for ``HEADS`` query heads of one KV head.

    ``out [rows, query heads, splits, DIM]``, ``lse [rows, query heads, splits]``.
    """
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % KV_HEADS
    split, splits = tl.program_id(1), tl.num_programs(1)
    in_group = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    head = kv_head * RATIO + in_group
    dim = tl.arange(0, WIDTH)
    stored = (in_group < RATIO)[:, None] & (dim < DIM)[None, :]
    q = tl.load(
        query + row * query_row + head[:, None] * query_head + dim[None, :], mask=stored, other=0.0
    )
    # Splits share what the row has, not what its list could hold.
    length = tl.minimum(tl.load(lengths + row), pages * PAGE).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, TOKENS), splits) * TOKENS
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    begin, end = split * share, tl.minimum((split + 1) * share, length)
    token = begin + tl.arange(0, TOKENS)
    listed = lane_frames + row * lane_stride
    # Frames are looked up a tile ahead: a load that waits for another's result is not pipelined.
    frame = tl.load(listed + token // PAGE, mask=token < end, other=-1)
    for start in tl.range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        live = frame >= 0
        read = live[:, None] & (dim < DIM)[None, :]
        k_place = frame.to(tl.int64) * k_frame + token % PAGE * k_token + kv_head * k_head
        k = tl.load(k_frames + k_place[:, None] + dim[None, :], mask=read, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        logits = tl.where(live[None, :], logits, float("-inf"))
        weights, top, total, acc = _softmax_step(logits, top, total, acc)
        v_place = frame.to(tl.int64) * v_frame + token % PAGE * v_token + kv_head * v_head
        v = tl.load(v_frames + v_place[:, None] + dim[None, :], mask=read, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        token += TOKENS
        frame = tl.load(listed + token // PAGE, mask=token < end, other=-1)
    result, log_sum = _softmax_end(top, total, acc)
    place = (row * KV_HEADS * RATIO + head) * splits + split
    tl.store(lse + place, log_sum, mask=in_group < RATIO)
    tl.store(
        out + place[:, None] * DIM + dim[None, :], result.to(out.dtype.element_ty), mask=stored
    )


@triton.jit(do_not_specialize=["splits"])
def _merge_splits_kernel(
    parts,
    part_lses,
    out,
    lse,
    splits,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row and head: ``parts [.., splits, DIM]`` -> ``out [.., DIM]``."""
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    lses = tl.load(part_lses + row * splits + split, mask=split < splits, other=float("-inf"))
    top = tl.max(lses, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(lses - shift)
    total = tl.sum(weights, 0)
    read = (split < splits)[:, None] & (dim < DIM)[None, :]
    part = tl.load(
        parts + (row * splits + split[:, None]) * DIM + dim[None, :], mask=read, other=0.0
    )
    result = tl.sum(part * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(lse + row, top + tl.log(total))
    tl.store(out + row * DIM + dim, result.to(out.dtype.element_ty), mask=dim < DIM)


@triton.jit(do_not_specialize=["queries", "keys"])
def _attend_sequence_kernel(
    query,
    k,
    v,
    out,
    lse,
    queries,
    keys,
    query_token,
    query_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scaling,
    CAUSAL: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``ROWS`` of one KV head's queries (all its heads of a token in turn) over all their keys.

    ``out [queries, query heads, DIM]``, ``lse [queries, query heads]``.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    # Causal tiles grow with their place: the long ones start first, lest they be waited for.
    first_row = ((tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS) * ROWS
    row = first_row + tl.arange(0, ROWS)
    position, head = row // RATIO, kv_head * RATIO + row % RATIO
    dim = tl.arange(0, WIDTH)
    stored = (position < queries)[:, None] & (dim < DIM)[None, :]
    token = position.to(tl.int64)
    q_place = token * query_token + head * query_head
    q = tl.load(query + q_place[:, None] + dim[None, :], mask=stored, other=0.0)
    if CAUSAL:
        end = tl.minimum((first_row + ROWS - 1) // RATIO + 1, keys)
        bare = (first_row // RATIO + 1) // TOKENS * TOKENS
    else:
        end = keys
        bare = keys // TOKENS * TOKENS
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    key = tl.arange(0, TOKENS)
    # First the tiles that need no mask, then the rest.
    for masked in tl.static_range(2):
        for start in tl.range(bare if masked else 0, end if masked else bare, TOKENS):
            read = (dim < DIM)[None, :]
            if masked:
                read = read & (start + key < end)[:, None]
            begin = tl.cast(start, tl.int64)
            k_tile = k + begin * k_token + kv_head * k_head + key[:, None] * k_token
            keys_read = tl.load(k_tile + dim[None, :], mask=read, other=0.0)
            logits = tl.dot(q, tl.trans(keys_read), input_precision="ieee") * scaling
            if masked:
                seen = (start + key < end)[None, :]
                if CAUSAL:
                    seen = seen & ((start + key)[None, :] <= position[:, None])
                logits = tl.where(seen, logits, float("-inf"))
            weights, top, total, acc = _softmax_step(logits, top, total, acc)
            v_tile = v + begin * v_token + kv_head * v_head + key[:, None] * v_token
            values = tl.load(v_tile + dim[None, :], mask=read, other=0.0)
            acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    result, log_sum = _softmax_end(top, total, acc)
    place = token * (KV_HEADS * RATIO) + head
    tl.store(lse + place, log_sum, mask=position < queries)
    tl.store(
        out + place[:, None] * DIM + dim[None, :], result.to(out.dtype.element_ty), mask=stored
    )


@triton.jit
def _weigh(out, place, read, weight):
    """``out`` times ``weight [rows]``; what has no weight may hold anything."""
    read = read & (weight > 0.0)[:, None]
    return tl.load(out + place, mask=read, other=0.0).to(tl.float32) * weight[:, None]


@triton.jit(do_not_specialize=["rows"])
def _merge_parts_kernel(
    first,
    first_lse,
    second,
    second_lse,
    out,
    lse,
    rows,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """All tensors contiguous; a row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    live = row < rows
    one = tl.load(first_lse + row, mask=live, other=float("-inf"))
    two = tl.load(second_lse + row, mask=live, other=float("-inf"))
    top = tl.maximum(one, two)
    shift = tl.where(top == float("-inf"), 0.0, top)
    one, two = tl.exp(one - shift), tl.exp(two - shift)
    total = one + two
    place = row[:, None] * DIM + dim[None, :]
    read = live[:, None] & (dim < DIM)[None, :]
    result = _weigh(first, place, read, one) + _weigh(second, place, read, two)
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(lse + row, top + tl.log(total), mask=live)
    tl.store(out + place, result, mask=read)


def _width(head_dim: int) -> int:
    return max(_LEAST_DOT, triton.next_power_of_2(head_dim))


def _frame_tiles(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens of a decode tile.  Small dtypes: 32 KB of keys and values, since two such tiles in
    flight leave shared memory for three programs on an H100, whose loads hide one another's
    latency.  Float32, multiplied without matrix instructions, runs out of registers before."""
    tokens = (2**13 if dtype.itemsize == 2 else 2**11) // _width(head_dim)
    return {"TOKENS": max(_LEAST_DOT, min(64, tokens)), "num_stages": 3, "num_warps": 4}


def _sequence_tiles(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of prefill.  Small dtypes: a warp group per 64 rows, as its matrix instruction takes,
    an accumulator of at most 128 registers.  Float32, without such instructions: small."""
    if dtype.itemsize == 4:
        return {"ROWS": 16, "TOKENS": 16, "num_stages": 2, "num_warps": 4}
    if head_dim <= 64:
        return {"ROWS": 128, "TOKENS": 128, "num_stages": 3, "num_warps": 8}
    if head_dim <= 128:
        return {"ROWS": 128, "TOKENS": 64, "num_stages": 3, "num_warps": 8}
    return {"ROWS": 128, "TOKENS": 32, "num_stages": 3, "num_warps": 8}


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many programs each row's tokens are split, from static shapes alone."""
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * multiprocessors(device), programs)
    return max(1, min(wanted, tiles // _TILES_PER_SPLIT, _MOST_SPLITS))


def attend_frames(
    query: torch.Tensor,
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    lane_frames: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    common_length: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.attend.api.attend_frames`; ``common_length`` is not used."""
    rows, query_heads, dim = query.shape
    pages, (page, kv_heads) = lane_frames.shape[1], k_frames.shape[1:3]
    ratio, tiles = query_heads // kv_heads, _frame_tiles(dim, query.dtype)
    heads = min(_MOST_HEADS, max(_LEAST_DOT, triton.next_power_of_2(ratio)))
    blocks = triton.cdiv(ratio, heads)
    splits = _splits(
        rows * kv_heads * blocks, triton.cdiv(pages * page, tiles["TOKENS"]), query.device
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    part, part_lse = out, lse
    if splits > 1:
        shape = (rows, query_heads, splits, dim)
        part = torch.empty(shape, dtype=torch.float32, device=query.device)
        part_lse = torch.empty(shape[:3], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _attend_frames_kernel[rows * kv_heads, splits, blocks](
            query, k_frames, v_frames, lane_frames, lengths, part, part_lse,
            pages, lane_frames.stride(0), *query.stride()[:2],
            *k_frames.stride()[:3], *v_frames.stride()[:3], scaling * _LOG2E,
            KV_HEADS=kv_heads, RATIO=ratio, PAGE=page, DIM=dim, HEADS=heads, WIDTH=_width(dim),
            **tiles,
        )  # fmt: skip
        if splits > 1:
            _merge_splits_kernel[(rows * query_heads,)](
                part, part_lse, out, lse, splits,
                DIM=dim, SPLITS=triton.next_power_of_2(splits), WIDTH=_width(dim),
            )  # fmt: skip
    return out, lse


def _attend_sequence(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, query_heads, dim = query.shape
    keys, kv_heads = k.shape[:2]
    ratio, tiles = query_heads // kv_heads, _sequence_tiles(dim, query.dtype)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if tokens == 0:
        return out, lse
    with torch.cuda.device_of(query):
        _attend_sequence_kernel[(kv_heads * triton.cdiv(tokens * ratio, tiles["ROWS"]),)](
            query, k, v, out, lse, tokens, keys,
            *query.stride()[:2], *k.stride()[:2], *v.stride()[:2], scaling * _LOG2E,
            CAUSAL=causal, KV_HEADS=kv_heads, RATIO=ratio, DIM=dim, WIDTH=_width(dim),
            **tiles,
        )  # fmt: skip
    return out, lse


def attend_part(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.attend.api.attend_part`."""
    return _attend_sequence(query, k, v, scaling, False)


def attend_chunk(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.attend.api.attend_chunk`."""
    return _attend_sequence(query, k, v, scaling, True)


def merge_parts(
    part: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.attend.api.merge_parts`."""
    tokens, heads, dim = part[0].shape
    out = torch.empty(part[0].shape, dtype=torch.float32, device=part[0].device)
    lse = torch.empty(part[1].shape, dtype=torch.float32, device=part[0].device)
    if tokens == 0:
        return out, lse
    rows = max(1, _MERGED_ELEMENTS // _width(dim))
    with torch.cuda.device_of(out):
        _merge_parts_kernel[(triton.cdiv(tokens * heads, rows),)](
            *(tensor.contiguous() for tensor in (*part, *other)), out, lse, tokens * heads,
            DIM=dim, ROWS=rows, WIDTH=_width(dim),
        )  # fmt: skip
    return out, lse
