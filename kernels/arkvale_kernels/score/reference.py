"""Page scores in plain torch.

With upper >= lower, ``max(q*u, q*l) = relu(q)*u - relu(-q)*l`` in every channel, so a head's
score is a dot product of length ``2 * head_dim`` and query heads that are to be averaged are
averaged *before* the scan: one matrix-vector product per row whatever the GQA ratio.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import torch

from arkvale_kernels.layout import COPY_BYTES, SelectionRule


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
    """See :func:`arkvale_kernels.score.api.score_pages`; products and sums are float32."""
    rows, query_heads, head_dim = query.shape
    pages, kv_heads = lane_pages.shape[1], digests.shape[2]
    beyond = torch.arange(pages, device=page_counts.device) >= page_counts.unsqueeze(1)
    listed = lane_pages.masked_fill(beyond, 0)
    split = query.float().view(rows, kv_heads, query_heads // kv_heads, head_dim)
    if head_reduce == "mean":
        positive = split.clamp(min=0).sum(2)
        signed = torch.stack((positive, split.sum(2) - positive), 1) / query_heads
        signed = signed.view(rows, 1, -1)
        scores = _joined([_dot(some.flatten(2), signed) for some in _blocks(digests, listed)])
    else:
        signed = torch.cat((split.clamp(min=0), split.clamp(max=0)), -1).transpose(2, 3)
        parts = [
            torch.matmul(some.permute(0, 3, 1, 2, 4).flatten(3), signed)
            .transpose(2, 3)
            .flatten(1, 2)
            for some in _blocks(digests, listed)
        ]
        scores = _joined(parts)
        if head_reduce == "max":
            scores = scores.amax(1)
        else:
            # Only competing pages share the softmax: a sink's huge score would flatten all others.
            competing = rule.competing(page_counts, pages)
            logits = torch.where(competing.unsqueeze(1), scores * scaling, -torch.inf)
            scores = torch.softmax(logits, dim=-1).mean(1)
    resident = frame_of.index_select(0, listed.view(-1)).view(rows, pages) >= 0
    return ((scores.view(torch.int32) & ~1) | resident).view(torch.float32)


def _blocks(digests: torch.Tensor, lane_pages: torch.Tensor) -> Iterator[torch.Tensor]:
    """Digests of a run of pages of every row at a time: ``[rows, run, 2, KV heads, head_dim]``
    float32, a copy where there are several rows.

    A prompt's pages mostly have consecutive ids, so one row's digests are mostly read in place.
    """
    rows, row_bytes = lane_pages.shape[0], 4 * digests[0].numel()
    jumps = (lane_pages.diff() != 1).nonzero()[:, 1].tolist() if rows == 1 else None
    start = 0
    for run in lane_pages.split(max(1, COPY_BYTES // (rows * row_bytes)), dim=1):
        stop = start + run.shape[1]
        apart = jumps is None or bisect_left(jumps, start) < bisect_left(jumps, stop - 1)
        if apart or not run.numel():
            yield _rows_of(digests, run.reshape(-1)).view(rows, -1, *digests.shape[1:])
        else:
            first = int(run[0, 0])
            yield digests[first : first + stop - start].float().unsqueeze(0)
        start = stop


def _dot(block: torch.Tensor, signed: torch.Tensor) -> torch.Tensor:
    """``[rows, run, channels]``, overwritten if of several rows, with ``[rows, 1, channels]``.

    A host's batched product of matrices with one vector each takes five times as long as this.
    """
    if block.shape[0] == 1:
        return torch.mv(block[0], signed[0, 0]).unsqueeze(0)
    return block.mul_(signed).sum(2)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _rows_of(digests: torch.Tensor, lane_pages: torch.Tensor) -> torch.Tensor:
    """``digests[lane_pages]`` in float32; torch gathers no 8-bit floats, so those go as bytes."""
    flat = digests.view(digests.shape[0], -1)
    if digests.dtype.itemsize == 1:
        return flat.view(torch.uint8).index_select(0, lane_pages).view(digests.dtype).float()
    return flat.index_select(0, lane_pages).float()
