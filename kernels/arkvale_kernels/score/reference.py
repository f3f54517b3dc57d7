"""Page scores in plain torch.

With upper >= lower, ``max(q*u, q*l) = relu(q)*u - relu(-q)*l`` in every channel, so a head's
score is a dot product of length ``2 * head_dim`` and query heads that are to be averaged are
averaged *before* the scan: one matrix-vector product per row whatever the GQA ratio.
"""

from __future__ import annotations

import torch

from arkvale_kernels.layout import SelectionRule


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
    flat = lane_pages.masked_fill(beyond, 0).reshape(-1)
    gathered = _rows_of(digests, flat).view(rows, pages, 2, kv_heads, head_dim)
    split = query.float().view(rows, kv_heads, query_heads // kv_heads, head_dim)
    if head_reduce == "mean":
        positive = split.clamp(min=0).sum(2)
        signed = torch.stack((positive, split.sum(2) - positive), 1) / query_heads
        scores = torch.bmm(gathered.flatten(2), signed.view(rows, -1, 1)).squeeze(2)
    else:
        signed = torch.cat((split.clamp(min=0), split.clamp(max=0)), -1)
        by_head = gathered.permute(0, 3, 1, 2, 4).flatten(3)
        scores = torch.matmul(by_head, signed.transpose(2, 3)).permute(0, 1, 3, 2).flatten(1, 2)
        if head_reduce == "max":
            scores = scores.amax(1)
        else:
            # Only competing pages share the softmax: a sink's huge score would flatten all others.
            competing = rule.competing(page_counts, pages)
            logits = torch.where(competing.unsqueeze(1), scores * scaling, -torch.inf)
            scores = torch.softmax(logits, dim=-1).mean(1)
    resident = frame_of.index_select(0, flat).view(rows, pages) >= 0
    return ((scores.view(torch.int32) & ~1) | resident).view(torch.float32)


def _rows_of(digests: torch.Tensor, lane_pages: torch.Tensor) -> torch.Tensor:
    """``digests[lane_pages]`` in float32; torch gathers no 8-bit floats, so those go as bytes."""
    flat = digests.view(digests.shape[0], -1)
    if digests.dtype.itemsize == 1:
        return flat.view(torch.uint8).index_select(0, lane_pages).view(digests.dtype).float()
    return flat.index_select(0, lane_pages).float()
