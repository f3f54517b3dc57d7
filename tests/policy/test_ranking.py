"""The ranking: which pages are forced, which compete, how many are must, where the open page is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.policy.ranking import rank_rows


def config(sinks=2, window=2, budget=8, top_k=None) -> ArkValeConfig:
    """Sizes in pages of 16 tokens; no more top pages than the budget has."""
    return ArkValeConfig(
        page_size=16, sink_pages=sinks, window_pages=window, budget=16 * budget,
        top_k=None if top_k is None else 16 * min(top_k, budget),
    )  # fmt: skip


def role(settings: ArkValeConfig, page: int, count: int) -> float:
    """Bias of a page by the rule read aloud."""
    if page >= count - 1:
        return -torch.inf
    if count <= settings.budget_pages:
        return torch.inf
    is_sink, in_window = page < settings.sink_pages, page >= count - settings.window_pages
    return torch.inf if is_sink or in_window else 0.0


@settings(max_examples=100, deadline=None)
@given(
    sinks=st.integers(0, 3),
    window=st.integers(1, 3),
    spare=st.integers(1, 6),
    top_k=st.none() | st.integers(1, 4),
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    extra=st.integers(0, 3),
)
def test_every_page_has_the_role_the_rule_gives_it(sinks, window, spare, top_k, counts, extra):
    """Ragged rows, wider than the longest, above and below the budget."""
    chosen = config(sinks, window, sinks + window + spare, top_k)
    pages = max(counts) + extra
    ranking = rank_rows(chosen, torch.tensor(counts), pages)
    expected = [[role(chosen, page, count) for page in range(pages)] for count in counts]
    assert ranking.bias.dtype == torch.float32
    assert ranking.bias.tolist() == expected
    for row, count in enumerate(counts):
        budget = chosen.budget_pages
        over = sinks + window - 1 + chosen.must_pages
        assert ranking.must_counts[row].item() == (count - 1 if count <= budget else over)
        assert ranking.open_index[row].tolist() == [count - 1, min(count, budget) - 1]


@pytest.mark.parametrize("count", [1, 2, 7, 8], ids="pages{}".format)
def test_a_row_within_its_budget_competes_for_nothing(count):
    """All pages forced and must, so attention is exact: budget 8, rows up to 8 pages."""
    ranking = rank_rows(config(), torch.tensor([count]), 12)
    assert not (ranking.bias == 0).any()
    assert (ranking.bias == torch.inf).sum() == count - 1 == ranking.must_counts.item()


def test_one_page_over_the_budget_starts_to_compete():
    """Nine pages: two sinks, the window's sealed page and the open page leave five to compete."""
    ranking = rank_rows(config(), torch.tensor([9]), 9)
    competing = (ranking.bias[0] == 0).nonzero().flatten().tolist()
    assert competing == [2, 3, 4, 5, 6]
    assert ranking.must_counts.item() == 2 + 1 + config().must_pages


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 30))
def test_must_pages_and_the_open_page_fit_the_budget(sinks, window, spare, count):
    """Selection drops nothing that is must: they and the open page are at most the budget."""
    for top_k in (None, 1, spare):
        chosen = config(sinks, window, sinks + window + spare, top_k)
        ranking = rank_rows(chosen, torch.tensor([count]), count)
        assert ranking.must_counts.item() + 1 <= chosen.budget_pages
        forced = (ranking.bias == torch.inf).sum().item()
        assert forced <= ranking.must_counts.item(), "forced pages are must"
