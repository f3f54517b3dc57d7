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
    kv_heads = digests.shape[2]
    gathered = digests.view(digests.shape[0], -1).index_select(0, lane_pages.reshape(-1)).float()
    split = query.float().view(rows, kv_heads, query_heads // kv_heads, head_dim)
    if head_reduce == "mean":
        positive = split.clamp(min=0).sum(2)
        signed = torch.stack((positive, split.sum(2) - positive), 1) / query_heads
        scores = torch.bmm(
            gathered.view(rows, -1, 2 * kv_heads * head_dim), signed.view(rows, -1, 1)
        ).squeeze(2)
        return scores.add_(bias)

    signed = torch.cat((split.clamp(min=0), split.clamp(max=0)), -1)
    by_head = gathered.view(rows, -1, 2, kv_heads, head_dim).permute(0, 3, 1, 2, 4).flatten(3)
    scores = torch.matmul(by_head, signed.transpose(2, 3)).permute(0, 1, 3, 2).flatten(1, 2)
    if head_reduce == "max":
        return scores.amax(1).add_(bias)
    # Only candidates compete in the softmax: a sink's huge score would flatten all others.
    others = torch.where(bias == 0, 0.0, -torch.inf).unsqueeze(1)
    shares = torch.softmax(scores * scaling + others, dim=-1).nan_to_num_(0.0)
    return shares.mean(1).add_(bias)
