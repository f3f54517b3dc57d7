"""Page selection in plain torch.

Must pages outrank every fill page, so "must, then fill until the budget is full" is one top-k
over the pages that are allowed at all: the resident ones and the (capped) must.
Ties are broken by ``torch.topk``, which is free to choose.
"""

from __future__ import annotations

import torch


def select_pages(
    scores: torch.Tensor,
    lane_pages: torch.Tensor,
    resident: torch.Tensor,
    must_counts: torch.Tensor,
    open_index: torch.Tensor,
    budget: int,
    recall_cap: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.select.api.select_pages`."""
    rows, pages = scores.shape
    ranked = min(budget - 1, pages)
    leading, leaders = scores.topk(ranked, dim=1)
    must = torch.arange(ranked, device=scores.device) < must_counts
    if recall_cap is not None:
        missing = must & ~resident.gather(1, leaders) & (leading < torch.inf)
        must = must & ~(missing & (missing.cumsum(1) > recall_cap))
    allowed = resident.scatter(1, leaders, must | resident.gather(1, leaders))
    best = scores.masked_fill(~allowed, -torch.inf).topk(ranked, dim=1)

    chosen = lane_pages.new_zeros(rows, budget)
    chosen_scores = scores.new_full((rows, budget), -torch.inf)
    listed = best.values > -torch.inf
    chosen[:, :ranked] = lane_pages.gather(1, best.indices) * listed
    chosen_scores[:, :ranked] = best.values
    source, target = open_index.split(1, dim=1)
    chosen.scatter_(1, target, lane_pages.gather(1, source))
    chosen_scores.scatter_(1, target, torch.inf)
    return chosen, chosen_scores
