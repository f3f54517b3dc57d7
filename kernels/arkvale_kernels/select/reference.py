"""Page selection in plain torch.

The rule is a ranking in tiers: forced pages, then must, then resident ones, then the rest, by
score within a tier.  With tier and score in one integer it is one top-k.
Ties are broken by ``torch.topk``, which is free to choose.
"""

from __future__ import annotations

import torch

from arkvale_kernels.layout import SelectionRule

_FORCED, _MUST, _RESIDENT, _ABSENT = (tier << 32 for tier in (3, 2, 1, 0))


def select_pages(
    scores: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    rule: SelectionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.select.api.select_pages`."""
    rows, pages = scores.shape
    counts = page_counts.unsqueeze(1)
    index = torch.arange(pages, device=scores.device)
    competing = rule.competing(page_counts, pages)
    bits = scores.view(torch.int32)
    resident = (bits & 1).bool()
    by_score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 0x80000000
    best = by_score.masked_fill(~competing, -1).topk(min(rule.must, pages), dim=1)
    must = best.values >= 0
    if rule.recall_cap is not None:
        missing = must & ~resident.gather(1, best.indices)
        must = must & ~(missing & (missing.cumsum(1) > rule.recall_cap))

    rank = by_score + torch.where(resident, _RESIDENT, _ABSENT)
    if rule.recall_cap is not None:
        rank = rank.masked_fill(~resident, -1)
    leading = torch.where(must, best.values + _MUST, rank.gather(1, best.indices))
    rank = rank.scatter(1, best.indices, leading)
    rank = torch.where(competing, rank, _FORCED).masked_fill(index >= counts - 1, -1)
    listed = min(rule.budget - 1, pages)
    top = rank.topk(listed, dim=1)

    chosen = lane_pages.new_zeros(rows, rule.budget, dtype=torch.int32)
    importance = scores.new_full((rows, rule.budget), -torch.inf)
    taken = top.values >= 0
    chosen[:, :listed] = torch.where(taken, lane_pages.gather(1, top.indices), 0)
    by_choice = torch.where(top.values >= _FORCED, torch.inf, scores.gather(1, top.indices))
    importance[:, :listed] = torch.where(taken, by_choice, -torch.inf)
    last = (counts - 1).clamp(min=0)
    is_open = counts > 0
    place = last.clamp(max=rule.budget - 1).long()
    written = torch.where(is_open, lane_pages.gather(1, last.long()), chosen.gather(1, place))
    chosen.scatter_(1, place, written.to(torch.int32))
    importance.scatter_(1, place, torch.where(is_open, torch.inf, -torch.inf))
    return chosen, importance
