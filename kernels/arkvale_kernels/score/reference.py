"""Page scores in plain torch.

With upper >= lower, ``max(q*u, q*l) = relu(q)*u - relu(-q)*l`` in every channel, so a head's
score is a dot product of length ``2 * head_dim`` and query heads that are to be averaged are
averaged *before* the scan: one matrix-vector product per row whatever the GQA ratio.
"""

from __future__ import annotations

import torch


def score_pages(
    query: torch.Tensor,
    digests: torch.Tensor,
    lane_pages: torch.Tensor,
    bias: torch.Tensor,
    *,
    head_reduce: str,
    scaling: float,
) -> torch.Tensor:
    """See :func:`arkvale_kernels.score.api.score_pages`; products and sums are float32."""
    rows, query_heads, head_dim = query.shape
    pages, kv_heads = lane_pages.shape[1], digests.shape[2]
    gathered = digests.view(digests.shape[0], -1).index_select(0, lane_pages.reshape(-1)).float()
    split = query.float().view(rows, kv_heads, query_heads // kv_heads, head_dim)
    if head_reduce == "mean":
        positive = split.clamp(min=0).sum(2)
        signed = torch.stack((positive, split.sum(2) - positive), 1) / query_heads
        scores = torch.bmm(
            gathered.view(rows, pages, 2 * kv_heads * head_dim),
            signed.view(rows, 2 * kv_heads * head_dim, 1),
        ).squeeze(2)
        return _decide(scores, bias)

    signed = torch.cat((split.clamp(min=0), split.clamp(max=0)), -1)
    by_head = gathered.view(rows, pages, 2, kv_heads, head_dim).permute(0, 3, 1, 2, 4).flatten(3)
    scores = torch.matmul(by_head, signed.transpose(2, 3)).permute(0, 1, 3, 2).flatten(1, 2)
    if head_reduce == "max":
        return _decide(scores.amax(1), bias)
    # Only candidates compete in the softmax: a sink's huge score would flatten all others.
    logits = torch.where(bias.unsqueeze(1) == 0, scores * scaling, -torch.inf)
    return _decide(torch.softmax(logits, dim=-1).mean(1), bias)


def _decide(scores: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Where the bias is infinite it is the answer: a page that does not compete may lack a digest
    of its own, and what is left of another page there may be NaN."""
    return torch.where(bias == 0, scores, bias)
