"""The select op against the rule read aloud: must, recall cap, fill, open page, ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkvale_kernels.select import select_pages
from support import oracle
from support.numeric import same_bits

BUDGET = 6


def batch(draw: np.random.Generator, counts: list[int], pages: int, residency: float):
    """Rows of ``counts`` pages with distinct finite scores and random lane page ids; the last page
    of a row is its open one."""
    rows = len(counts)
    scores = torch.full((rows, pages), -torch.inf)
    lane_pages = torch.zeros(rows, pages, dtype=torch.int32)
    resident = torch.zeros(rows, pages, dtype=torch.bool)
    for row, count in enumerate(counts):
        closed = count - 1
        scores[row, :closed] = torch.from_numpy(
            draw.permutation(2 * pages)[:closed] - pages
        ).float()
        lane_pages[row, :count] = torch.from_numpy(1 + draw.permutation(10 * pages)[:count])
        resident[row, :count] = torch.from_numpy(draw.random(count) < residency)
    return scores, lane_pages, resident


def open_places(counts: list[int], budget: int) -> torch.Tensor:
    """Where the open page stands and where it goes."""
    return torch.tensor([[count - 1, min(count, budget) - 1] for count in counts])


def expected_list(scores, resident, must: int, budget: int, cap: int | None) -> list[int]:
    """Indices of one row by falling score, from the API's own words."""
    ranked = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > -np.inf]
    missing = [page for page in ranked[:must] if not resident[page]]
    recalled = missing if cap is None else missing[:cap]
    return [page for page in ranked if resident[page] or page in recalled][: budget - 1]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    must=st.integers(0, BUDGET - 1),
    cap=st.none() | st.integers(0, 4),
    residency=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_the_chosen_list_is_the_rule_applied_to_distinct_scores(seed, counts, must, cap, residency):
    """Order, scores, padding and place of the open page, for ragged rows at once."""
    pages = max(counts) + 1
    scores, lane_pages, resident = batch(np.random.default_rng(seed), counts, pages, residency)
    inputs = [scores.clone(), lane_pages.clone(), resident.clone()]
    chosen = select_pages(
        scores, lane_pages, resident, torch.full((len(counts), 1), must),
        open_places(counts, BUDGET), budget=BUDGET, recall_cap=cap,
    )  # fmt: skip
    for row, count in enumerate(counts):
        listed = expected_list(scores[row].numpy(), resident[row].numpy(), must, BUDGET, cap)
        expected = lane_pages.new_zeros(BUDGET)
        expected[: len(listed)] = lane_pages[row, listed]
        expected[min(count, BUDGET) - 1] = lane_pages[row, count - 1]
        assert torch.equal(chosen.lane_pages[row], expected)
        importance = torch.full((BUDGET,), -torch.inf)
        importance[: len(listed)] = scores[row, listed]
        importance[min(count, BUDGET) - 1] = torch.inf
        assert torch.equal(chosen.scores[row], importance)
    assert same_bits(scores, inputs[0]) and torch.equal(lane_pages, inputs[1])
    assert torch.equal(resident, inputs[2])


@pytest.mark.parametrize("cap", [None, 0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_forced_pages_come_first_and_agree_with_the_selection_oracle(seed, cap):
    """Sinks and window score +inf; only which forced page a cap drops is left open."""
    pages, sinks, window, must = 14, 2, 2, 2
    scores, lane_pages, resident = batch(np.random.default_rng(seed), [pages], pages, 0.5)
    candidates = range(sinks, pages - window)
    values = {page: scores[0, page].item() for page in candidates}
    scores[0, [0, 1, pages - 2]] = torch.inf
    budget = sinks + window + must + 2
    chosen = select_pages(
        scores, lane_pages, resident, torch.tensor([[sinks + window - 1 + must]]),
        open_places([pages], budget), budget=budget, recall_cap=cap,
    )  # fmt: skip
    index = {int(page): place for place, page in enumerate(lane_pages[0])}
    found = {index[int(page)] for page in chosen.lane_pages[0] if page > 0}
    rule = {"budget": budget, "sinks": sinks, "window": window, "must": must}
    expected = oracle.select(pages, values, set(np.flatnonzero(resident[0])), **rule, cap=cap)
    forced = {0, 1, pages - 2}
    assert found - forced == expected - forced
    assert len(found & forced) == len(expected & forced)


@pytest.mark.parametrize("score", [0.0, -3.5, torch.inf], ids=str)
@pytest.mark.parametrize("residents", [0, 3, 12])
def test_equal_scores_still_choose_the_right_number_of_pages_once(score, residents):
    """All-equal scores: any choice is right, but must pages are counted exactly and pages beyond
    them are resident ones."""
    pages, must, budget = 13, 3, 8
    scores = torch.full((1, pages), score)
    scores[0, -1] = -torch.inf
    lane_pages = torch.arange(101, 101 + pages).view(1, -1)
    resident = torch.arange(pages).view(1, -1) < residents
    chosen = select_pages(
        scores, lane_pages, resident, torch.tensor([[must]]), open_places([pages], budget),
        budget=budget,
    )  # fmt: skip
    listed = [int(page) - 101 for page in chosen.lane_pages[0, :-1] if page > 0]
    missing = [page for page in listed if page >= residents]
    assert len(listed) == len(set(listed)) and pages - 1 not in listed
    assert len(missing) <= must
    assert len(listed) == min(budget - 1, len(missing) + residents)
    assert len(listed) >= must
    assert int(chosen.lane_pages[0, -1]) == 100 + pages


@pytest.mark.parametrize("cap", [0, 1, 2, 5])
def test_the_recall_cap_keeps_the_best_missing_pages(cap):
    """Nothing resident: the list is the first ``cap`` must pages and the open one."""
    scores = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0, -torch.inf]])
    lane_pages = torch.tensor([[11, 12, 13, 14, 15, 16]])
    chosen = select_pages(
        scores, lane_pages, torch.zeros(1, 6, dtype=torch.bool), torch.tensor([[3]]),
        torch.tensor([[5, 4]]), budget=5, recall_cap=cap,
    )  # fmt: skip
    best = [11, 13, 14][:cap]
    assert chosen.lane_pages[0].tolist() == [*best, *[0] * (4 - len(best)), 16]


def test_a_row_within_its_budget_chooses_all_its_pages():
    """Beside a long row in the same batch, whatever is resident."""
    scores, lane_pages, resident = batch(np.random.default_rng(0), [12, 4, 1], 12, 0.4)
    scores[1, :3] = torch.inf
    chosen = select_pages(
        scores, lane_pages, resident, torch.tensor([[2], [3], [0]]),
        open_places([12, 4, 1], BUDGET), budget=BUDGET,
    )  # fmt: skip
    assert set(chosen.lane_pages[1].tolist()) == {*lane_pages[1, :4].tolist(), 0}
    assert chosen.lane_pages[1, 3] == lane_pages[1, 3] and (chosen.lane_pages[1, 4:] == 0).all()
    assert chosen.lane_pages[2].tolist() == [lane_pages[2, 0].item(), *[0] * (BUDGET - 1)]


def test_a_budget_of_one_page_is_the_open_page():
    """The smallest budget leaves nothing to rank."""
    chosen = select_pages(
        torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[7, 8, 9]]),
        torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0]]), torch.tensor([[2, 0]]), budget=1,
    )  # fmt: skip
    assert chosen.lane_pages.tolist() == [[9]]


def test_no_rows_choose_nothing():
    """An empty batch keeps its shape."""
    empty = torch.zeros(0, 3)
    chosen = select_pages(
        empty, empty.int(), empty.bool(), torch.zeros(0, 1).long(), torch.zeros(0, 2).long(),
        budget=4,
    )  # fmt: skip
    assert chosen.lane_pages.shape == chosen.scores.shape == (0, 4)


def test_wrong_arguments_are_refused_by_name():
    """Every check names its argument."""
    good = {
        "scores": torch.zeros(2, 3), "lane_pages": torch.ones(2, 3, dtype=torch.int32),
        "resident": torch.ones(2, 3, dtype=torch.bool), "must_counts": torch.ones(2, 1).long(),
        "open_index": torch.ones(2, 2).long(), "budget": 3,
    }  # fmt: skip
    for name, wrong in (
        ("lane_pages", torch.ones(2, 4)),
        ("resident", torch.ones(1, 3)),
        ("must_counts", torch.ones(2)),
        ("open_index", torch.ones(2, 1)),
        ("budget", 0),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            select_pages(**{**good, name: wrong})
