"""The select op against the rule read aloud: must, recall cap, fill, open page, ties."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arkvale_kernels import checks
from arkvale_kernels.layout import SelectionRule
from arkvale_kernels.select import kernel, reference, select_pages
from support import oracle
from support.guards import Guards

GARBAGE = 2**30
IMPLEMENTATIONS = {"reference": reference.select_pages, "kernel": kernel.select_pages}
by_implementation = pytest.mark.parametrize(
    "select", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys()
)


def marked(scores: torch.Tensor, resident: torch.Tensor) -> torch.Tensor:
    """Scores whose lowest bit tells which pages are resident."""
    return ((scores.view(torch.int32) & ~1) | resident.int()).view(torch.float32)


def batch(draw: np.random.Generator, counts: list[int], residency: float, rule: SelectionRule):
    """Distinct scores, NaN where the score does not decide; random page ids, garbage beyond a
    row's end."""
    rows, width = len(counts), max(counts) + 1
    scores = torch.full((rows, width), torch.nan)
    lane_pages = torch.full((rows, width), GARBAGE, dtype=torch.int32)
    for row, count in enumerate(counts):
        lane_pages[row, :count] = torch.from_numpy(1 + draw.permutation(3 * width)[:count])
        values = torch.from_numpy(draw.permutation(2 * width)[:count] - width) / 8
        if count > rule.budget:
            inner = slice(rule.sinks, count - rule.window)
            resident = torch.from_numpy(draw.random(count) < residency)
            scores[row, inner] = marked(values.float(), resident)[inner]
    return scores, lane_pages, torch.tensor(counts, dtype=torch.int32)


def held(guards: Guards, scores, lane_pages, counts):
    """Inputs that must not change, page ids as a view of wider rows."""
    width = lane_pages.shape[1]
    return (
        guards.hold(scores, frozen=True),
        guards.hold(lane_pages, frozen=True, row_stride=width + 5),
        guards.hold(counts, frozen=True),
    )


def row_choice(chosen: tuple[torch.Tensor, torch.Tensor], row: int) -> dict[int, float]:
    """Page ids and importances of a row, padding left out after a look at it."""
    pages, importance = (part[row].tolist() for part in chosen)
    listed = {page: score for page, score in zip(pages, importance, strict=True) if page}
    assert len(listed) == sum(page != 0 for page in pages), "a page is chosen once"
    assert all(score == -np.inf for page, score in zip(pages, importance, strict=True) if page == 0)
    return listed


def assert_rule(chosen, scores, lane_pages, counts, rule: SelectionRule) -> None:
    """Every row holds exactly the pages of the oracle, each beside its score."""
    assert chosen[0].dtype == torch.int32 and chosen[1].dtype == torch.float32
    assert chosen[0].shape == chosen[1].shape == (len(counts), rule.budget)
    resident = (scores.view(torch.int32) & 1) == 1
    for row, count in enumerate(counts.tolist()):
        found = row_choice(chosen, row)
        if count == 0:
            assert found == {}
            continue
        inner = range(rule.sinks, count - rule.window) if count > rule.budget else range(0)
        values = {place: scores[row, place].item() for place in inner}
        held = set(resident[row].nonzero().flatten().tolist())
        if count <= rule.budget:
            held = set(range(count))
        held |= set(range(count)) - set(inner)
        places = oracle.select(
            count, values, held, budget=rule.budget, sinks=rule.sinks, window=rule.window,
            must=rule.must, cap=rule.recall_cap,
        )  # fmt: skip
        expected = {int(lane_pages[row, p]): values.get(p, np.inf) for p in places}
        assert found == expected
        last = min(count, rule.budget) - 1
        assert chosen[0][row, last] == lane_pages[row, count - 1], "the open page stands last"


def counted(scores, lane_pages, counts, rule: SelectionRule) -> list[int]:
    """Forced fills and withheld pages, row by row as ``COUNTED`` says."""
    forced = withheld = 0
    for row, count in enumerate(counts.tolist()):
        if count <= rule.budget:
            continue
        inner = range(rule.sinks, count - rule.window)
        best = sorted(inner, key=lambda place: -scores[row, place].item())
        is_resident = {place: bool(scores[row, place].view(torch.int32) & 1) for place in inner}
        absent = [place for place in best[: rule.must] if not is_resident[place]]
        room = rule.budget - rule.sinks - rule.window - min(rule.must, len(best))
        if rule.recall_cap is None:
            forced += max(0, room - sum(is_resident[place] for place in best[rule.must :]))
        else:
            withheld += max(0, len(absent) - rule.recall_cap)
    return [forced, withheld]


RULES = st.builds(
    lambda must, spare, sinks, window, cap: SelectionRule(
        must + spare + sinks + window, must, sinks, window, cap
    ),
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.none() | st.integers(0, 6),
)


@by_implementation
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(0, 24), min_size=1, max_size=3),
    rule=RULES,
    residency=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_the_chosen_list_is_the_rule_applied_to_distinct_scores(
    select, seed, counts, rule, residency
):
    """Pages, scores, padding and place of the open page, for ragged rows at once; counts too."""
    inputs = batch(np.random.default_rng(seed), counts, residency, rule)
    totals = torch.tensor([1000, 2000])
    assert_rule(select(*inputs, rule, totals), *inputs, rule)
    assert (totals - torch.tensor([1000, 2000])).tolist() == counted(*inputs, rule)


@by_implementation
@pytest.mark.parametrize("cap", [None, 0, 1, 5], ids="cap{}".format)
@pytest.mark.parametrize(
    "rule, counts",
    [
        (SelectionRule(8, 3, 2, 2), [30, 8, 0, 9, 1]),
        (SelectionRule(33, 32, 0, 1), [300, 34, 12]),
        (SelectionRule(64, 20, 1, 40), [65, 64, 257]),
        (SelectionRule(1, 0, 0, 1), [7, 1]),
        (SelectionRule(3, 0, 2, 1), [9, 2]),
    ],
    ids=str,
)
def test_rows_of_any_length_between_guard_bands(select, rule, counts, cap, guards):
    """Rows of no page, within the budget, one page beyond it, far beyond it; nothing else is
    read or written."""
    rule = rule._replace(recall_cap=cap)
    inputs = held(guards, *batch(np.random.default_rng(len(counts)), counts, 0.4, rule))
    assert_rule(select(*inputs, rule), *inputs, rule)


@pytest.mark.parametrize("cap", [None, 9], ids="cap{}".format)
@pytest.mark.parametrize("residency", [0.02, 0.5])
def test_the_kernel_agrees_with_the_reference_on_rows_of_several_blocks(cap, residency, guards):
    """4096 pages are read at a time; the last block is ragged."""
    rule = SelectionRule(64, 32, 2, 3, cap)
    inputs = held(guards, *batch(np.random.default_rng(0), [9001, 4097, 50], residency, rule))
    totals = torch.zeros(2, 2, dtype=torch.int64)
    found = kernel.select_pages(*inputs, rule, totals[0])
    expected = reference.select_pages(*inputs, rule, totals[1])
    assert totals[0].tolist() == totals[1].tolist() == counted(*inputs, rule)
    for row in range(3):
        assert row_choice(found, row) == row_choice(expected, row)
        last = min(int(inputs[2][row]), rule.budget) - 1
        assert found[0][row, last] == expected[0][row, last]


def test_the_kernel_orders_scores_of_every_sign_and_size(guards):
    """Subnormal, huge and negative scores differ in the high bits of their keys or the low ones."""
    exponents = torch.linspace(-44, 38, 150)
    sizes = torch.cat((-(10.0**exponents), 10.0**exponents, torch.tensor([0.0])))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(sizes)))
    rule = SelectionRule(40, 20, 0, 1)
    scores = marked(sizes[order], torch.zeros(len(sizes), dtype=torch.bool)).view(1, -1)
    scores = torch.cat((scores, torch.full((1, 1), torch.nan)), 1)
    pages = torch.arange(1, scores.shape[1] + 1).view(1, -1)
    chosen = kernel.select_pages(scores, pages, torch.tensor([scores.shape[1]]), rule)
    best = scores[0, :-1].sort(descending=True).values[: rule.budget - 1]
    assert torch.equal(chosen[1][0, :-1].sort(descending=True).values, best)


@by_implementation
@pytest.mark.parametrize("score", [0.0, -3.5, 1e-44], ids=str)
@pytest.mark.parametrize("residents", [0, 3, 12])
@pytest.mark.parametrize("cap", [None, 2], ids="cap{}".format)
def test_equal_scores_still_choose_the_right_number_of_pages_once(
    select, score, residents, cap, guards
):
    """All-equal scores: any choice is right, but must pages are counted exactly and pages beyond
    them are resident ones as far as there are any."""
    pages, rule = 13, SelectionRule(8, 3, 0, 1, cap)
    resident = torch.arange(pages) < residents
    scores = marked(torch.full((1, pages), score), resident)
    lane_pages = torch.arange(101, 101 + pages).view(1, -1)
    chosen = select(scores, lane_pages, torch.tensor([pages]), rule)
    listed = row_choice(chosen, 0)
    missing = [page for page in listed if 100 + residents < page < 100 + pages]
    assert 100 + pages in listed
    if cap is None:
        assert len(listed) == rule.budget
        assert len(missing) <= max(rule.must, rule.budget - 1 - residents)
    else:
        assert len(missing) <= cap
        assert len(listed) >= min(rule.budget - 1, residents) + 1


def test_the_kernel_gives_ties_to_the_earlier_page(guards):
    """Among all-equal scores, resident pages of course before others."""
    pages, rule = 300, SelectionRule(9, 3, 1, 1)
    resident = torch.arange(pages) >= 200
    scores = marked(torch.full((1, pages), 2.5), torch.zeros(pages, dtype=torch.bool))
    lane_pages = torch.arange(1, pages + 1).view(1, -1)
    counts = torch.tensor([pages])
    chosen, _ = kernel.select_pages(scores, lane_pages, counts, rule)
    assert chosen[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 300]
    # The mark is the lowest bit of the score too, so that resident pages are the better ones.
    chosen, _ = kernel.select_pages(marked(scores, resident), lane_pages, counts, rule)
    assert chosen[0].tolist() == [1, 201, 202, 203, 204, 205, 206, 207, 300]


@by_implementation
@pytest.mark.parametrize("cap", [0, 1, 2, 5])
def test_the_recall_cap_keeps_the_best_missing_pages(select, cap, guards):
    """Nothing resident: the list is the first ``cap`` must pages and the open one."""
    scores = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0, torch.nan]])
    lane_pages = torch.tensor([[11, 12, 13, 14, 15, 16]])
    chosen = select(scores, lane_pages, torch.tensor([6]), SelectionRule(5, 3, 0, 1, cap))
    assert set(row_choice(chosen, 0)) == {*[11, 13, 14][:cap], 16}
    assert chosen[0][0, 4] == 16


def test_kernel_and_reference_are_called_alike():
    """The API hands the same positional arguments to whichever serves the device."""
    assert inspect.signature(kernel.select_pages) == inspect.signature(reference.select_pages)


# -- bad input -------------------------------------------------------------------------------

RULE = SelectionRule(6, 2, 2, 2)


def good() -> dict:
    return {
        "scores": torch.zeros(2, 9), "lane_pages": torch.ones(2, 9, dtype=torch.int32),
        "page_counts": torch.tensor([9, 0], dtype=torch.int32), "rule": RULE,
    }  # fmt: skip


def test_the_api_returns_pages_and_scores():
    chosen = select_pages(**good())
    assert chosen.lane_pages.shape == chosen.scores.shape == (2, 6)


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("rule", RULE._replace(must=3), "^rule must have 0 <= must <= budget - sinks - window"),
        ("rule", RULE._replace(budget=0), "^rule must have 0 <= must <= budget"),
        ("scores", torch.zeros(9), r"^scores must have shape \(any, any\)"),
        ("scores", torch.zeros(0, 9), r"^scores must have at least one row, got shape \(0, 9\)"),
        ("scores", torch.zeros(2, 9).half(), "^scores must be torch.float32"),
        ("scores", torch.zeros(4, 9)[::2], "^scores must be contiguous"),
        ("lane_pages", torch.ones(2, 8).int(), r"^lane_pages must have shape \(2, 9\)"),
        ("lane_pages", torch.ones(2, 9), "^lane_pages must be .*int32"),
        ("lane_pages", torch.ones(9, 2).int().T, "^lane_pages must be contiguous in its last"),
        ("page_counts", torch.ones(3).int(), r"^page_counts must have shape \(2\)"),
        ("page_counts", torch.ones(2), "^page_counts must be .*int32"),
        ("page_counts", torch.ones(4).int()[::2], "^page_counts must be contiguous"),
        ("counts", torch.zeros(5).long(), r"^counts must have shape \(2\)"),
        ("counts", torch.zeros(2).int(), "^counts must be torch.int64"),
        *(
            (name, good()[name].to("meta"), f"^{name} must be on cpu, got meta")
            for name in ("lane_pages", "page_counts")
        ),
    ],
)
def test_bad_input_is_refused_by_name(name, wrong, message):
    """A wrong argument is named, with what would be right."""
    with pytest.raises(ValueError, match=message):
        select_pages(**{**good(), name: wrong})


def test_rows_too_long_for_the_keys_of_the_kernel_are_refused():
    wide = torch.zeros(1, kernel.MOST_PAGES + 1)
    with pytest.raises(ValueError, match=r"^scores must have at most 1048576 pages in a row"):
        kernel.select_pages(wide, wide.int(), torch.tensor([3]), RULE)


def test_counts_out_of_range_are_refused_in_debug_mode_alone(monkeypatch):
    """Looking at them would stall the device."""
    arguments = good()
    arguments["page_counts"][0] = -1
    select_pages(**arguments)
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(ValueError, match=r"^page_counts must hold ids from 0 to 9, got -1 to 0"):
        select_pages(**arguments)
    arguments["page_counts"][0] = 10
    with pytest.raises(ValueError, match=r"^page_counts must hold ids from 0 to 9, got 0 to 10"):
        select_pages(**arguments)
