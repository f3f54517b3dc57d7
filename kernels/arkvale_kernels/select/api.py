"""Public face of the select op."""

from __future__ import annotations

from typing import NamedTuple

import torch

from arkvale_kernels import checks
from arkvale_kernels.layout import SelectionRule
from arkvale_kernels.select import reference

COUNTED = ("forced_fills", "pages_withheld")
"""What :func:`select_pages` adds to its ``counts``, in order.

A *forced fill* is an absent page outside the must pages that is listed, hence recalled, only
because resident ones do not suffice to fill the list; under a recall cap there are none, since the
list stays short.  A *withheld* page is an absent must page that was given up to the recall cap.
Both are counted in each row, as misses are, so a page that two rows want counts twice.
"""


class Selection(NamedTuple):
    """Pages chosen for one step; every chosen page that is not resident must be recalled."""

    lane_pages: torch.Tensor
    """``[rows, budget]`` int32: the row's pages in any order but for its open page, which stands
    at the end of its ``min(pages, budget)`` entries; 0 in the rest, and where a recall cap left
    a place empty."""
    scores: torch.Tensor
    """``[rows, budget]`` float32, beside ``lane_pages``; +inf for pages attended whatever their
    score, -inf beside 0."""


def select_pages(
    scores: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    rule: SelectionRule,
    counts: torch.Tensor | None = None,
) -> Selection:
    """Choose ``min(pages, budget)`` pages per row by the rule.

    Args:
        scores: ``[rows, pages]`` float32 as the score op returns them.
        lane_pages: ``[rows, pages]`` int lane page ids, anything beyond a row's count.
        page_counts: ``[rows]`` int pages of each row, the open one included; 0 is inert.
        counts: ``[2]`` int64 totals named by ``COUNTED``, added to.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit together, or a rule whose
            parts exceed its budget.
    """
    _check(scores, lane_pages, page_counts, rule, counts)
    if scores.is_cuda:
        from arkvale_kernels.select import kernel

        return Selection(*kernel.select_pages(scores, lane_pages, page_counts, rule, counts))
    return Selection(*reference.select_pages(scores, lane_pages, page_counts, rule, counts))


@checks.by_layout
def _check(
    scores: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    rule: SelectionRule,
    counts: torch.Tensor | None,
) -> None:
    rule.check()
    checks.check_shape("scores", scores, (None, None))
    checks.check_rows("scores", scores)
    checks.check_dense(scores=scores, page_counts=page_counts)
    checks.check_dtype("scores", scores, torch.float32)
    checks.check_shape("lane_pages", lane_pages, tuple(scores.shape))
    checks.check_rows("lane_pages", lane_pages)
    checks.check_shape("page_counts", page_counts, (scores.shape[0],))
    checks.check_integers(lane_pages=lane_pages, page_counts=page_counts)
    checks.check_device(scores, lane_pages=lane_pages, page_counts=page_counts)
    checks.check_ids("page_counts", page_counts, scores.shape[1] + 1)
    if counts is not None:
        checks.check_shape("counts", counts, (len(COUNTED),))
        checks.check_dtype("counts", counts, torch.int64)
        checks.check_dense(counts=counts)
        checks.check_device(scores, counts=counts)
