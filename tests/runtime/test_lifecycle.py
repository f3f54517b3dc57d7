"""Any history of requests an engine may run, under frames so few that pages come and go all the
time: every pass is exact, every law of the tables holds after every event."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from arkvale_sglang.config.settings import DIGESTS, HEAD_REDUCES, ArkValeConfig
from support.engine import FakeEngine

SIZE = 16
PAGES = 24
MOST_ROWS = 8
TOLERANCE = 64 * torch.finfo(torch.float32).eps
"""Attention of unit-scale values: a convex combination in float32, a few roundings per output."""


def build(*, frames: int, budget: int, **values) -> FakeEngine:
    """``budget`` in pages."""
    config = ArkValeConfig(page_size=SIZE, budget=SIZE * budget, sink_pages=1, **values)
    return FakeEngine(config, pages=PAGES, frames=frames, layers=2, max_rows=2 * MOST_ROWS)


class Lifecycle(RuleBasedStateMachine):
    """Requests come, grow, share, decode and go, as an engine that keeps its word drives them.

    The engine's word: a chunk fits the free pages, no more requests run than admission says, and a
    decode step leaves out at most one request with an open page (one in the middle of its
    prefill).  While admission does not hold the next step, requests of the batch are retracted.
    """

    def __init__(self):
        super().__init__()
        self.fake: FakeEngine

    @initialize(
        frames=st.sampled_from([8, 9, 10, 12, 16, PAGES]),
        slack=st.integers(1, 8),
        groups=st.sampled_from([1, 2]),
        window=st.integers(1, 2),
        dense=st.integers(0, 1),
        cap=st.sampled_from([None, None, 1]),
        oversubscription=st.sampled_from([1.0, 4.0]),
        digest=st.sampled_from(DIGESTS),
        reduce=st.sampled_from(HEAD_REDUCES),
        prompts=st.lists(st.integers(5 * SIZE, 8 * SIZE), min_size=2, max_size=3),
    )
    def start(
        self, frames, slack, groups, window, dense, cap, oversubscription, digest, reduce, prompts
    ):
        """A pool whose frames hold one request's choice and the page being written, or more; and
        a few prompts, so that it is under pressure from the beginning."""
        self.fake = build(
            frames=frames, budget=max(window + 2, frames - slack), head_groups=groups,
            window_pages=window, dense_layers=dense, recall_cap=cap, digest=digest,
            head_reduce=reduce, oversubscription=oversubscription,
        )  # fmt: skip
        most = self.fake.cache.admission.most_requests
        self.most_rows = MOST_ROWS if most is None else min(most, MOST_ROWS)
        for tokens in prompts[: self.most_rows]:
            self.fake.extend({self.fake.add_row(): tokens})

    # -- what may happen ---------------------------------------------------------------------

    def rows(self, least_tokens: int = 0) -> list[int]:
        return [row for row, state in self.fake.rows.items() if state.tokens >= least_tokens]

    def has_room(self) -> bool:
        return len(self.fake.rows) < self.most_rows

    def is_open(self, row: int) -> bool:
        return self.fake.rows[row].tokens % SIZE > 0

    def capacity(self, row: int, free_pages: int) -> int:
        """Tokens that fit behind a row."""
        return free_pages * SIZE + -self.fake.rows[row].tokens % SIZE

    @rule()
    @precondition(has_room)
    def add_row(self):
        self.fake.add_row()

    @rule(data=st.data())
    @precondition(lambda self: self.fake.rows)
    def extend(self, data):
        """A chunk for one row or several, aligned to pages or not, up to all free pages."""
        chosen = data.draw(st.lists(st.sampled_from(self.rows()), min_size=1, unique=True))
        chunks, free = {}, len(self.fake.free_pages)
        for row in chosen:
            most = self.capacity(row, free)
            if most:
                chunks[row] = data.draw(st.integers(1, most) | st.integers(1, min(most, 3 * SIZE)))
                free -= self.fake.pages_needed(row, chunks[row])
        if chunks:
            assert self.fake.extend(chunks) < TOLERANCE

    @rule(data=st.data(), tokens=st.integers(1, 20))
    @precondition(lambda self: self.rows(least_tokens=1))
    def decode(self, data, tokens):
        """A few steps of the same batch: often enough to fill a page and open the next."""
        rows = data.draw(st.permutations(self.rows(least_tokens=1)))
        leave = data.draw(st.lists(st.sampled_from(rows), unique=True, max_size=len(rows) - 1))
        first_open = [row for row in leave if self.is_open(row)][:1]
        batch = [
            row for row in rows
            if row not in leave or (self.is_open(row) and row not in first_open)
        ]  # fmt: skip
        for _ in range(tokens):
            while batch and not self.next_step_fits(batch):
                self.fake.free(batch.pop())
            if not batch:
                return
            self.fake.steps.clear()
            assert self.fake.decode(batch) < TOLERANCE
            self.assert_attended()

    def next_step_fits(self, batch: list[int]) -> bool:
        """Whether pages and frames suffice, as the engine asks before every step."""
        needed = sum(self.fake.pages_needed(row, 1) for row in batch)
        tokens = [self.fake.rows[row].tokens for row in batch]
        return needed <= len(self.fake.free_pages) and self.fake.cache.admission.holds(tokens)

    def assert_attended(self) -> None:
        """Rows within their budget attend to all pages, others to sink, window and budget."""
        config = self.fake.config
        for step in self.fake.steps:
            pages = len(self.fake.rows[step.row].pages)
            assert len(step.chosen) == len(set(step.chosen)) <= config.budget_pages
            assert step.chosen[-1] == pages - 1, "the open page comes last"
            if config.recall_cap is not None:
                continue
            if pages <= config.budget_pages:
                assert len(step.chosen) == pages
            else:
                assert {0, *range(pages - config.window_pages, pages)} <= set(step.chosen)

    @rule(data=st.data())
    @precondition(lambda self: self.has_room() and self.rows(least_tokens=SIZE))
    def share(self, data):
        """A new request on the whole prefix of another."""
        self.fake.share(data.draw(st.sampled_from(self.rows(least_tokens=SIZE))), PAGES)

    @rule(data=st.data())
    @precondition(lambda self: self.has_room() and self.rows(least_tokens=2 * SIZE))
    def split(self, data):
        """A new request that leaves another's prefix early."""
        parent = data.draw(st.sampled_from(self.rows(least_tokens=2 * SIZE)))
        full = self.fake.rows[parent].tokens // SIZE
        self.fake.share(parent, data.draw(st.integers(1, full - 1)))

    @rule(data=st.data())
    @precondition(lambda self: self.fake.rows)
    def free(self, data):
        self.fake.free(data.draw(st.sampled_from(self.rows())))

    @rule()
    @precondition(lambda self: len(self.fake.free_pages) < PAGES // 2)
    def flush(self):
        self.fake.flush()

    # -- what must hold ----------------------------------------------------------------------

    @invariant()
    def laws_hold(self):
        self.fake.check()

    @invariant()
    def no_page_was_refused(self):
        """Admission promised a frame to every page that a step chose."""
        assert self.fake.cache.report()["pages_refused"] == 0


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=45,
    stateful_step_count=30,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("how", ["free", "flush"])
def test_pressure_ends_when_no_page_is_left_alive(how):
    """Once more pages than frames were live, steps look for missing pages; when all of them died,
    nothing can be missing and the next request must be served without looking."""
    fake = build(frames=8, budget=6)
    row = fake.add_row()
    fake.extend({row: SIZE * 20})
    assert fake.cache.pressed
    fake.free(row) if how == "free" else fake.flush()
    row = fake.add_row()
    fake.extend({row: SIZE * 2})
    fake.decode([row])
    assert not fake.cache.pressed


def attended_by_a_short_row(*, beside_a_long_one: bool) -> set[int]:
    """Pages that a row of 7 pages, all but its open one evicted, attends to under a recall cap of
    one page and a budget of 8."""
    config = ArkValeConfig(
        page_size=SIZE, budget=SIZE * 8, sink_pages=1, recall_cap=1, dense_layers=0
    )
    fake = FakeEngine(config, pages=60, frames=18, layers=1)
    short, long, other = (fake.add_row() for _ in range(3))
    fake.extend({short: SIZE * 6 + 1})
    fake.extend({long: SIZE * 9})
    fake.extend({other: SIZE * 34})
    for _ in range(40):
        fake.decode([other])
    fake.free(other)
    fake.steps.clear()
    fake.decode([short, long] if beside_a_long_one else [short])
    (step,) = [step for step in fake.steps if step.row == short]
    assert step.resident == {6}
    return set(step.chosen)


def test_the_recall_cap_treats_a_short_row_alike_whoever_it_is_batched_with():
    """What a request attends to must not depend on the length of its neighbours."""
    alone = attended_by_a_short_row(beside_a_long_one=False)
    assert attended_by_a_short_row(beside_a_long_one=True) == alone
