"""Any history of requests an engine may run, under frames so few that pages come and go all the
time: every pass is exact, every law of the tables holds after every event.

The histories are worlds of ``make chaos``, which draws others in every run.
"""

from __future__ import annotations

import collections

import pytest
import torch

from arkvale_sglang.config.settings import ArkValeConfig
from chaos import worlds
from support.engine import FakeEngine

SIZE = 16
WORLDS = range(20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Ops are so small here that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lived():
    """What each world lived through."""
    return {}


@pytest.mark.parametrize("seed", WORLDS)
def test_no_history_breaks_a_law(seed, lived):
    world = worlds.World(seed)
    world.run()
    lived[seed] = world.counts


def test_every_kind_of_event_happened(lived):
    counts = sum(lived.values(), collections.Counter())
    assert counts.total() >= len(lived) * worlds.EVENTS
    if len(lived) == len(WORLDS):
        assert len(counts) == 8 and min(counts.values()) > 1, counts


def test_a_world_replays():
    """The same events from the same seed, to the last figure."""
    logs: list[list[str]] = [[], []]
    first, second = (worlds.World(3, log=log.append) for log in logs)
    first.run(60)
    second.run(60)
    assert logs[0] == logs[1] and len(logs[0]) == 61
    assert first.fake.cache.report() == second.fake.cache.report()


def test_a_broken_law_is_told_with_its_world(monkeypatch):
    """A release that leaves pages sealed."""
    monkeypatch.setattr(
        "arkvale_sglang.runtime.cache.release_pages", lambda residency, dead, **options: None
    )
    seed, counts, broken = worlds.one_world(0)
    assert seed == 0 and 0 < counts.total() < worlds.EVENTS and "AssertionError" in broken


def build(*, frames: int, budget: int, **values) -> FakeEngine:
    """``budget`` in pages."""
    config = ArkValeConfig(page_size=SIZE, budget=SIZE * budget, sink_pages=1, **values)
    return FakeEngine(config, pages=24, frames=frames, layers=2, max_rows=16)


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
