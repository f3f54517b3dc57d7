"""Public face of the score op."""

from __future__ import annotations

import torch

from arkvale_kernels.checks import check_shape
from arkvale_kernels.score import reference

HEAD_REDUCES: tuple[str, ...] = ("mean", "max", "softmax-mean")


def score_pages(
    query: torch.Tensor,
    digests: torch.Tensor,
    lane_pages: torch.Tensor,
    bias: torch.Tensor,
    *,
    head_reduce: str,
    scaling: float,
) -> torch.Tensor:
    """Score candidate pages of every row against the row's query.

    The score of one head is ``sum_d max(q_d * upper_d, q_d * lower_d)`` (ArkVale equation 3).

    Args:
        query: ``[rows, query heads of the lane, head_dim]``, after RoPE.
        digests: ``[lane pages, 2, KV heads of the lane, head_dim]`` of one layer.
        lane_pages: ``[rows, pages]`` int, lane page ids; 0 where a row has fewer pages.
        bias: ``[rows, pages]`` float32: 0 for candidates, infinite where the score does not
            decide (+inf always attended, -inf never chosen by score).
        head_reduce: how the heads of a lane agree: one of ``HEAD_REDUCES``.
        scaling: softmax scale of the model's attention; used by ``softmax-mean`` alone.

    Returns:
        ``[rows, pages]`` float32: the reduced score plus ``bias``.

    Raises:
        ValueError: unknown ``head_reduce`` or shapes that do not fit together.
    """
    if head_reduce not in HEAD_REDUCES:
        raise ValueError(
            f"head reduction {head_reduce!r} is unknown; choose one of {', '.join(HEAD_REDUCES)}"
        )
    rows, query_heads, head_dim = query.shape
    check_shape("digests", digests, (None, 2, None, head_dim))
    check_shape("lane_pages", lane_pages, (rows, None))
    check_shape("bias", bias, (rows, lane_pages.shape[1]))
    if query_heads % digests.shape[2]:
        raise ValueError(
            f"{query_heads} query heads do not divide over {digests.shape[2]} KV heads"
        )
    return reference.score_pages(
        query, digests, lane_pages, bias, head_reduce=head_reduce, scaling=scaling
    )
