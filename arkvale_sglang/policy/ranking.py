"""Which pages of a row are forced, which compete, and how many of them are must.

A row of ``n`` pages whose budget is ``C`` pages attends to its sink pages, its window (the open
page included), the best ``K`` other pages whether resident or not, and the best resident pages
until ``C`` are chosen (ArkVale section 5.3).  A row with ``n <= C`` attends to everything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from arkvale_sglang.config.settings import ArkValeConfig


class Ranking(NamedTuple):
    """What selection needs to know about rows besides their scores; the same for all layers."""

    bias: torch.Tensor
    """``[rows, pages]`` float32, added to the scores: +inf forced, 0 competing, -inf padding and
    the open page, which is always attended but never ranked."""
    must_counts: torch.Tensor
    """``[rows, 1]`` int64 pages of the ranking that are must, the forced ones included."""
    open_index: torch.Tensor
    """``[rows, 2]`` int64: place of the open page in the row, and in the chosen list."""


def rank_rows(config: ArkValeConfig, page_counts: torch.Tensor, pages: int) -> Ranking:
    """Rank the pages of every row.

    Args:
        page_counts: ``[rows]`` int64 pages of each row, the open one included; at least 1.
        pages: width of the result.
    """
    budget = config.budget_pages
    counts = page_counts.unsqueeze(1)
    index = torch.arange(pages, device=page_counts.device).expand(counts.shape[0], -1)
    under_budget = counts <= budget
    in_window = index >= counts - config.window_pages
    forced = (index < config.sink_pages) | in_window | under_budget
    bias = torch.zeros(index.shape, device=page_counts.device)
    bias = bias.masked_fill_(forced, torch.inf).masked_fill_(index >= counts - 1, -torch.inf)
    over = config.sink_pages + config.window_pages - 1 + config.must_pages
    must_counts = torch.where(under_budget, counts - 1, over)
    open_index = torch.cat((counts - 1, counts.clamp(max=budget) - 1), 1)
    return Ranking(bias, must_counts, open_index)
