"""Page selection in plain torch.

The rule is a ranking in tiers: forced pages, then must, then resident ones, then the rest, by
score within a tier.  With tier and score in one integer it is one top-k.
Ties are broken by ``torch.topk``, which is free to choose.
"""

from __future__ import annotations

import torch

from arkvale_kernels.layout import SelectionRule

_ABSENT, _RESIDENT, _MUST, _FORCED = (tier << 32 for tier in range(1, 5))
_HALF_TIER = 1 << 31
_NONE = -_HALF_TIER


def select_pages(
    scores: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    rule: SelectionRule,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.select.api.select_pages`."""
    rows, pages = scores.shape
    lengths = page_counts.unsqueeze(1)
    index = torch.arange(pages, device=scores.device)
    competing = rule.competing(page_counts, pages)
    bits = scores.view(torch.int32)
    resident = bits & 1
    by_score = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    best = torch.where(competing, by_score, _NONE).topk(min(rule.must, pages), dim=1)
    rank = by_score.long() + torch.where(resident > 0, _RESIDENT, _ABSENT)
    leading = best.values.long() + _MUST
    if rule.recall_cap is not None:
        missing = 1 - resident.gather(1, best.indices)
        beyond = missing.cumsum(1) * missing > rule.recall_cap
        rank = rank.masked_fill(resident == 0, 0)
        leading = leading.masked_fill(beyond, 0)
        if counts is not None:
            counts[1] += (beyond & competing.gather(1, best.indices)).sum()
    rank = rank.scatter_(1, best.indices, leading)
    rank = torch.where(competing, rank, _FORCED).masked_fill_(index >= lengths - 1, 0)
    listed = min(rule.budget - 1, pages)
    top = rank.topk(listed, dim=1)

    chosen = lane_pages.new_zeros(rows, rule.budget, dtype=torch.int32)
    importance = scores.new_full((rows, rule.budget), -torch.inf)
    taken = top.values > 0
    if counts is not None and rule.recall_cap is None:
        counts[0] += (taken & (top.values < _ABSENT + _HALF_TIER)).sum()
    chosen[:, :listed] = torch.where(taken, lane_pages.gather(1, top.indices), 0)
    by_choice = torch.where(top.values >= _FORCED, torch.inf, scores.gather(1, top.indices))
    importance[:, :listed] = torch.where(taken, by_choice, -torch.inf)
    last = (lengths - 1).clamp_(min=0).long()
    is_open = lengths > 0
    place = last.clamp(max=rule.budget - 1)
    written = torch.where(is_open, lane_pages.gather(1, last), chosen.gather(1, place))
    chosen.scatter_(1, place, written.to(torch.int32))
    importance.scatter_(1, place, torch.where(is_open, torch.inf, -torch.inf))
    return chosen, importance
