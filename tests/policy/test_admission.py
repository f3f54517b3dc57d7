"""Admission: promises that the frames can keep, and batches cut into waves that fit them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.policy.admission import FrameAdmission


def admission(*, pages=100, frames=20, budget=6, oversubscription=1.0) -> FrameAdmission:
    """Sizes in pages of 16 tokens."""
    config = ArkValeConfig(
        page_size=16, budget=16 * budget, sink_pages=1, window_pages=1,
        oversubscription=oversubscription,
    )  # fmt: skip
    geometry = PageGeometry(
        page_size=16, layers=3, dense_layers=2, kv_heads=1, head_dim=8, groups=1,
        dtype=torch.float32,
    )  # fmt: skip
    return FrameAdmission(config, PoolPlan(geometry, pages, frames))


@st.composite
def bounded(draw) -> tuple[FrameAdmission, int]:
    """Any pool whose frames are fewer than its pages and hold one request and a page being
    written, as start-up demands; and its frames."""
    frames = draw(st.integers(4, 40))
    gate = admission(
        pages=frames + draw(st.integers(1, 40)), frames=frames,
        budget=draw(st.integers(3, frames - 1)),
        oversubscription=draw(st.sampled_from([1.0, 1.5, 8.0])),
    )  # fmt: skip
    return gate, frames


@settings(max_examples=200, deadline=None)
@given(bounded(), st.data())
def test_waves_partition_the_rows_and_never_exceed_the_frames(pool, data):
    """Up to as many rows as may run at once, each of any length.

    While a wave attends, its rows' choices, the open pages of all rows, and one page being written
    by a prefill hold frames; a choice includes the row's own open page.
    """
    gate, frames = pool
    rows = data.draw(st.integers(1, gate.most_requests))
    counts = data.draw(st.lists(st.integers(1, 100), min_size=rows, max_size=rows))
    waves = gate.waves(counts)
    assert [row for start, stop in waves for row in range(start, stop)] == list(range(rows))
    for start, stop in waves:
        assert start < stop
        chosen = sum(min(gate.need_limit, count) - 1 for count in counts[start:stop])
        assert chosen + rows + 1 <= frames


@settings(max_examples=100, deadline=None)
@given(bounded(), st.data())
def test_waves_are_no_more_than_needed(pool, data):
    """A wave ends only where the next row would not have fitted."""
    gate, frames = pool
    rows = data.draw(st.integers(1, gate.most_requests))
    counts = data.draw(st.lists(st.integers(1, 100), min_size=rows, max_size=rows))
    waves = gate.waves(counts)
    for start, stop in waves[:-1]:
        chosen = sum(min(gate.need_limit, count) - 1 for count in counts[start : stop + 1])
        assert chosen + rows + 1 > frames


def test_no_wave_is_empty_even_where_the_frames_are_short():
    """More rows than may run: each still gets its turn, and the op refuses what does not fit."""
    assert admission(frames=8, budget=6).waves([6] * 5) == [(row, row + 1) for row in range(5)]


@settings(max_examples=100, deadline=None)
@given(bounded(), st.integers(1, 10**4))
def test_a_lone_row_always_fits(pool, tokens):
    """Whatever its length: an idle server admits it, running it is held, and it is one wave."""
    gate, _ = pool
    assert gate.holds([tokens])
    assert gate.waves([-(-tokens // 16)]) == [(0, 1)]


def test_short_requests_count_by_their_length():
    """20 frames at 6 a request, but one page is all that a short chat asks for."""
    gate = admission()
    assert gate.holds([10] * 20) and not gate.holds([10] * 21)
    assert gate.holds([1000, 1000, *[10] * 8]) and not gate.holds([1000, 1000, *[10] * 9])


@settings(max_examples=100, deadline=None)
@given(bounded(), st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_the_next_step_must_stay_within_the_promise(pool, running):
    """The next token of every request included: a page it opens counts before it is written."""
    gate, _ = pool
    needs = [min(gate.need_limit, math.ceil((tokens + 1) / 16)) for tokens in running]
    fits = sum(needs) <= gate.promised
    assert gate.holds(running) == (fits or len(running) == 1)


def test_need_counts_started_pages_up_to_the_budget():
    """Budget 6 pages of 16 tokens."""
    gate = admission()
    assert [gate.need(tokens) for tokens in (0, 1, 16, 17, 96, 97, 10**6)] == [0, 1, 1, 2, 6, 6, 6]


def test_need_is_what_the_requests_own_settings_ask_for():
    gate, config = admission(), ArkValeConfig(page_size=16, budget=96, sink_pages=1, window_pages=1)
    small = config.for_request({"budget": 48})
    full = config.for_request({"policy": "full"})
    assert [gate.need(tokens, small) for tokens in (16, 17, 10**6)] == [1, 2, 3]
    assert [gate.need(tokens, full) for tokens in (1, 10**6)] == [1, 1]
    assert gate.holds([1000] * 6, [small] * 6) and not gate.holds([1000] * 7, [small] * 7)
    assert gate.holds([1000] * 5, [config, config, full, full, full])


def test_rows_that_are_full_need_no_room_in_a_wave():
    """20 frames less 5 open pages and one more: two choices of 6 fit, however long the full are."""
    assert admission().waves([50] * 5, [6, 6, 1, 1, 1]) == [(0, 5)]
    assert admission().waves([50] * 5, [6, 6, 6, 1, 1]) == [(0, 2), (2, 5)]


def test_need_never_exceeds_the_pages_there_are():
    """A pool smaller than the budget bounds what a request can ask for."""
    assert admission(pages=5, frames=4, budget=6).need(10**6) == 5


@pytest.mark.parametrize("oversubscription, requests", [(1.0, 3), (2.0, 6), (2.5, 8)])
def test_oversubscription_scales_the_promise(oversubscription, requests):
    """20 frames at 6 a request; waves then take turns in the frames that exist."""
    gate = admission(oversubscription=oversubscription)
    assert gate.holds([1000] * requests) and not gate.holds([1000] * (requests + 1))


def test_open_pages_bound_the_number_of_requests():
    """Each pins one frame, and one row's choice must fit beside them."""
    assert admission(frames=20, budget=6).most_requests == 14
    assert admission(frames=7, budget=6).most_requests == 1


def test_a_cache_that_fits_bounds_nothing():
    """No cost under budget: no limit, no waves, whatever runs."""
    gate = admission(pages=20, frames=20)
    running = [10**6] * 50
    assert gate.most_requests is None and gate.holds(running)
    assert gate.waves([100] * 50) == [(0, 50)]


def test_rows_that_only_pad_a_captured_batch_ask_for_nothing():
    """Else a batch that fits would split once it is padded, and no graph replays two waves."""
    geometry = PageGeometry(16, 2, 0, 1, 8, 1, torch.float32)
    plan = PoolPlan(geometry, 100, 24)
    admission = FrameAdmission(ArkValeConfig(page_size=16, budget=16 * 6), plan)
    rows = [6, 6, 6, 6]
    assert len(admission.waves(rows)) == 2
    assert len(admission.waves(rows[:3])) == 1 == len(admission.waves([*rows[:3], *[0] * 20]))
