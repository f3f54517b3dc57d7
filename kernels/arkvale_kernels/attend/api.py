"""Public face of the attend op."""

from __future__ import annotations

import torch

from arkvale_kernels.attend import reference
from arkvale_kernels.checks import check_same_dtype, check_shape


def attend_frames(
    query: torch.Tensor,
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    lane_frames: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scaling: float,
    common_length: int | None = None,
) -> torch.Tensor:
    """Decode attention of each row over its chosen frames.

    Args:
        query: ``[rows, query heads, head_dim]``.
        k_frames, v_frames: ``[frames, page_size, KV heads, head_dim]``.
        lane_frames: ``[rows, pages]`` int frames; -1 contributes nothing.
        lengths: ``[rows]`` int tokens in the row's list; its last page may be partly filled.
        scaling: factor on the logits.
        common_length: the length of every row when all agree and no entry is -1: no mask then.

    Returns:
        ``[rows, query heads, head_dim]`` in the query's dtype; a row without any token is 0.
    """
    rows, _, head_dim = query.shape
    check_shape("k_frames", k_frames, (None, None, None, head_dim))
    check_shape("v_frames", v_frames, tuple(k_frames.shape))
    check_shape("lane_frames", lane_frames, (rows, None))
    check_shape("lengths", lengths, (rows,))
    check_same_dtype("query", query, "k_frames", k_frames)
    check_same_dtype("v_frames", v_frames, "k_frames", k_frames)
    _check_heads(query, k_frames.shape[2])
    return reference.attend_frames(
        query, k_frames, v_frames, lane_frames, lengths, scaling, common_length
    )


def attend_chunk(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a chunk of one sequence over itself.

    Args:
        query: ``[tokens, query heads, head_dim]``; k, v: ``[tokens, KV heads, head_dim]``.

    Returns:
        ``[tokens, query heads, head_dim]`` and the log-sum-exp ``[tokens, query heads]`` float32.
    """
    _check_keys(query, k, v, query.shape[0])
    return reference.attend_chunk(query, k, v, scaling)


def attend_part(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk over keys that all precede it; shapes as :func:`attend_chunk`."""
    _check_keys(query, k, v, None)
    return reference.attend_part(query, k, v, scaling)


def merge_parts(
    part: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets, by log-sum-exp.

    Args:
        part, other: ``(output [tokens, heads, head_dim], log-sum-exp [tokens, heads])``.

    Returns:
        The same pair for the union; the output is float32, cast it once at the end.
    """
    check_shape("other output", other[0], tuple(part[0].shape))
    check_shape("other log-sum-exp", other[1], tuple(part[1].shape))
    return reference.merge_parts(part, other)


def _check_keys(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: int | None) -> None:
    """The fused kernel trusts its caller: a short ``v`` would be read beyond its end."""
    check_shape("query", query, (None, None, None))
    check_shape("k", k, (tokens, None, query.shape[2]))
    check_shape("v", v, tuple(k.shape))
    check_same_dtype("k", k, "query", query)
    check_same_dtype("v", v, "query", query)
    _check_heads(query, k.shape[1])


def _check_heads(query: torch.Tensor, kv_heads: int) -> None:
    heads = query.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which do not divide over {kv_heads} KV heads")
