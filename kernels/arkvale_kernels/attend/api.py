"""Public face of the attend op."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from arkvale_kernels.attend import reference
from arkvale_kernels.checks import (
    FLOATS,
    INTEGERS,
    by_layout,
    check_contiguous_last,
    check_dtype,
    check_rows,
    check_same_device,
    check_same_dtype,
    check_shape,
)


def attend_frames(
    query: torch.Tensor,
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    lane_frames: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scaling: float,
    common_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention of each row over its chosen frames.

    All tensors are on one device and contiguous in their last dimension; ``lane_frames`` may be a
    view of wider rows.

    Args:
        query: ``[rows, query heads, head_dim]`` float32, float16 or bfloat16, at least one row.
        k_frames, v_frames: ``[frames, page_size, KV heads, head_dim]`` in the query's dtype.
        lane_frames: ``[rows, pages]`` int32 or int64 frames; -1 contributes nothing, and pages
            beyond a row's length may be anything.
        lengths: ``[rows]`` int32 or int64 tokens in the row's list; its last page may be partly
            filled.
        scaling: factor on the logits.
        common_length: the length of every row when all agree: a hint to the reference, which then
            needs no mask unless some entry is -1.

    Returns:
        ``[rows, query heads, head_dim]`` in the query's dtype and the log-sum-exp ``[rows, query
        heads]`` float32; 0 and minus infinity for a row without any token.
    """
    _check_frames(query, k_frames, v_frames, lane_frames, lengths)
    return _implementation(query).attend_frames(
        query, k_frames, v_frames, lane_frames, lengths, scaling, common_length
    )


@by_layout
def _check_frames(
    query: torch.Tensor,
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    lane_frames: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    check_shape("query", query, (None, None, None))
    rows, _, head_dim = query.shape
    check_rows("query", query)
    check_dtype("query", query, *FLOATS)
    check_shape("k_frames", k_frames, (None, None, None, head_dim))
    check_shape("v_frames", v_frames, tuple(k_frames.shape))
    check_shape("lane_frames", lane_frames, (rows, None))
    check_shape("lengths", lengths, (rows,))
    check_same_dtype("query", query, "k_frames", k_frames)
    check_same_dtype("v_frames", v_frames, "k_frames", k_frames)
    check_dtype("lane_frames", lane_frames, *INTEGERS)
    check_dtype("lengths", lengths, *INTEGERS)
    _check_layout(
        query, k_frames=k_frames, v_frames=v_frames, lane_frames=lane_frames, lengths=lengths
    )
    _check_heads(query, k_frames.shape[2])


def attend_chunk(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a chunk of one sequence over itself.

    Args:
        query: ``[tokens, query heads, head_dim]`` float32, float16 or bfloat16; ``k``, ``v``:
            ``[tokens, KV heads, head_dim]`` in its dtype.  All are on one device and contiguous in
            their last dimension, with any distance between tokens and between heads.

    Returns:
        ``[tokens, query heads, head_dim]`` in the query's dtype and the log-sum-exp ``[tokens,
        query heads]`` float32.
    """
    _check_keys(query, k, v, query.shape[0])
    return _implementation(query).attend_chunk(query, k, v, scaling)


def attend_part(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk over keys that all precede it.

    As :func:`attend_chunk`, but with any number of keys; over none, the output is 0 and the
    log-sum-exp minus infinity.
    """
    _check_keys(query, k, v, None)
    return _implementation(query).attend_part(query, k, v, scaling)


def merge_parts(
    part: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets, by log-sum-exp.

    Args:
        part, other: ``(output [tokens, heads, head_dim], log-sum-exp [tokens, heads])``; outputs
            float32, float16 or bfloat16, log-sum-exps float32.

    Returns:
        The same pair for the union; the output is float32, cast it once at the end.  Where neither
        part has a key it is 0, with log-sum-exp minus infinity.
    """
    check_shape("output", part[0], (None, None, None))
    check_shape("log-sum-exp", part[1], tuple(part[0].shape[:2]))
    check_shape("other output", other[0], tuple(part[0].shape))
    check_shape("other log-sum-exp", other[1], tuple(part[1].shape))
    for prefix, (out, lse) in (("", part), ("other ", other)):
        check_dtype(f"{prefix}output", out, *FLOATS)
        check_dtype(f"{prefix}log-sum-exp", lse, torch.float32)
        check_same_device(f"{prefix}output", out, "output", part[0])
        check_same_device(f"{prefix}log-sum-exp", lse, "output", part[0])
    return _implementation(part[0]).merge_parts(part, other)


def _implementation(tensor: torch.Tensor) -> Any:
    return _kernel() if tensor.is_cuda else reference


@functools.cache
def _kernel() -> Any:
    """Triton is imported at the first use on a device: elsewhere it need not be installed."""
    return importlib.import_module("arkvale_kernels.attend.kernel")


@by_layout
def _check_keys(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: int | None) -> None:
    """The kernels trust their caller: a short ``v`` would be read beyond its end."""
    check_shape("query", query, (None, None, None))
    check_dtype("query", query, *FLOATS)
    check_shape("k", k, (tokens, None, query.shape[2]))
    check_shape("v", v, tuple(k.shape))
    check_same_dtype("k", k, "query", query)
    check_same_dtype("v", v, "query", query)
    _check_layout(query, k=k, v=v)
    _check_heads(query, k.shape[1])


def _check_layout(query: torch.Tensor, **others: torch.Tensor) -> None:
    check_contiguous_last("query", query)
    for name, tensor in others.items():
        check_contiguous_last(name, tensor)
        check_same_device(name, tensor, "query", query)


def _check_heads(query: torch.Tensor, kv_heads: int) -> None:
    heads = query.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which do not divide over {kv_heads} KV heads")
