"""Public face of the score op."""

from __future__ import annotations

import torch

from arkvale_kernels import checks
from arkvale_kernels.layout import SelectionRule
from arkvale_kernels.score import reference

HEAD_REDUCES: tuple[str, ...] = ("mean", "max", "softmax-mean")


def score_pages(
    query: torch.Tensor,
    digests: torch.Tensor,
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    rule: SelectionRule,
    *,
    head_reduce: str,
    scaling: float,
) -> torch.Tensor:
    """Score the competing pages of every row against the row's query.

    The score of one head is ``sum_d max(q_d * upper_d, q_d * lower_d)`` (ArkVale equation 3).

    Args:
        query: ``[rows, query heads of the lane, head_dim]``, after RoPE.
        digests: ``[lane pages, 2, KV heads of the lane, head_dim]`` of one layer.
        frame_of: ``[lane pages]`` int32, see :class:`Residency`.
        lane_pages: ``[rows, pages]`` int lane page ids, anything beyond a row's count.
        page_counts: ``[rows]`` int pages of each row, the one being written included; a row of 0
            pages is inert.
        rule: says which pages compete.
        head_reduce: how the heads of a lane agree: one of ``HEAD_REDUCES``.
        scaling: softmax scale of the model's attention; used by ``softmax-mean`` alone.

    Returns:
        ``[rows, pages]`` float32 scores whose lowest mantissa bit tells whether the page is
        resident, since the scan that reads a page id can look that up for nothing; entries of
        pages that do not compete are undefined.

    Raises:
        ValueError: unknown ``head_reduce``, or shapes, dtypes, strides or devices that do not fit.
    """
    _check(query, digests, frame_of, lane_pages, page_counts, rule, head_reduce)
    arguments = (query, digests, frame_of, lane_pages, page_counts, rule, head_reduce, scaling)
    if query.is_cuda:
        from arkvale_kernels.score import kernel

        return kernel.score_pages(*arguments)
    return reference.score_pages(*arguments)


@checks.by_layout
def _check(
    query: torch.Tensor,
    digests: torch.Tensor,
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    rule: SelectionRule,
    head_reduce: str,
) -> None:
    if head_reduce not in HEAD_REDUCES:
        raise ValueError(
            f"head_reduce {head_reduce!r} is unknown; choose one of {', '.join(HEAD_REDUCES)}"
        )
    rule.check()
    checks.check_shape("query", query, (None, None, None))
    rows, query_heads, head_dim = query.shape
    checks.check_rows("query", query)
    checks.check_dtype("query", query, *checks.FLOATS)
    checks.check_shape("digests", digests, (None, 2, None, head_dim))
    checks.check_dtype("digests", digests, query.dtype, torch.float8_e4m3fn)
    checks.check_shape("frame_of", frame_of, (digests.shape[0],))
    checks.check_shape("lane_pages", lane_pages, (rows, None))
    checks.check_shape("page_counts", page_counts, (rows,))
    checks.check_rows("lane_pages", lane_pages)
    checks.check_integers(lane_pages=lane_pages, page_counts=page_counts, frame_of=frame_of)
    checks.check_dense(query=query, digests=digests, frame_of=frame_of, page_counts=page_counts)
    checks.check_device(
        query, digests=digests, frame_of=frame_of, lane_pages=lane_pages, page_counts=page_counts
    )
    checks.check_ids("page_counts", page_counts, lane_pages.shape[1] + 1)
    checks.check_ids("lane_pages", lane_pages, digests.shape[0], counts=page_counts)
    if query_heads % digests.shape[2]:
        raise ValueError(
            f"query has {query_heads} heads, which do not divide over {digests.shape[2]} KV heads"
        )
