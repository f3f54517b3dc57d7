"""Public face of the select op."""

from __future__ import annotations

from typing import NamedTuple

import torch

from arkvale_kernels.checks import check_shape
from arkvale_kernels.select import reference


class Selection(NamedTuple):
    """Pages chosen for one step; every chosen page that is not resident must be recalled."""

    lane_pages: torch.Tensor
    """``[rows, budget]`` int: the row's pages by falling score, its open page at the end of its
    list; 0 where fewer pages were allowed."""
    scores: torch.Tensor
    """``[rows, budget]`` float32, beside ``lane_pages``; +inf for pages always attended."""


def select_pages(
    scores: torch.Tensor,
    lane_pages: torch.Tensor,
    resident: torch.Tensor,
    must_counts: torch.Tensor,
    open_index: torch.Tensor,
    *,
    budget: int,
    recall_cap: int | None = None,
) -> Selection:
    """Choose at most ``budget`` pages per row (ArkVale section 5.3, on a shared pool).

    The first ``must_counts`` pages by score are *must*: recalled if missing, all of them or the
    best ``recall_cap`` missing ones.  The rest of the budget is filled with the best pages that
    are *resident* already, so a row recalls at most ``must_counts`` pages by construction.

    Args:
        scores: ``[rows, pages]`` float32; +inf always attended, -inf never (padding, and the
            open page, which is appended outside the ranking).
        lane_pages: ``[rows, pages]`` int lane page ids.
        resident: ``[rows, pages]`` bool.
        must_counts: ``[rows, 1]`` int, pages of the ranking that are must, the +inf ones included.
        open_index: ``[rows, 2]`` int64: where the open page stands in ``lane_pages``, and where
            it goes in the result (one less than the length of the row's list).
        budget: length of the result, the open page included.
        recall_cap: most pages a row may recall beside those that score +inf, or ``None``.

    Raises:
        ValueError: shapes that do not fit together, or a budget below one page.
    """
    rows, pages = scores.shape
    check_shape("lane_pages", lane_pages, (rows, pages))
    check_shape("resident", resident, (rows, pages))
    check_shape("must_counts", must_counts, (rows, 1))
    check_shape("open_index", open_index, (rows, 2))
    if budget < 1:
        raise ValueError(f"budget must be at least one page, got {budget}")
    return Selection(
        *reference.select_pages(
            scores, lane_pages, resident, must_counts, open_index, budget, recall_cap
        )
    )
