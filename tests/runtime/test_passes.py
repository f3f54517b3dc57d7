"""Decode and extend passes against dense attention in float64 and the selection oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arkvale_sglang.config.settings import ArkValeConfig
from support import oracle
from support.engine import FakeEngine

TOLERANCE = 64 * torch.finfo(torch.float32).eps
"""Attention of unit-scale values: a convex combination in float32, a few roundings per output."""


def engine(pages=64, frames=64, seed=0, query_heads=4, kv_heads=2, **settings):
    options = {"page_size": 16, "budget": 16 * 1024, "dense_layers": 1, **settings}
    return FakeEngine(
        ArkValeConfig(**options),
        pages=pages, frames=frames, layers=3, seed=seed, query_heads=query_heads, kv_heads=kv_heads,
    )  # fmt: skip


def assert_chosen_as_oracle(fake: FakeEngine) -> None:
    """Every page set chosen so far equals the oracle's, near-ties aside."""
    assert fake.steps
    config = fake.config
    for step in fake.steps:
        keys = fake.keys[step.layer, fake.rows[step.row].pages]
        lane = slice(
            step.group * fake.geometry.lane_heads, (step.group + 1) * fake.geometry.lane_heads
        )
        pages = max(step.chosen) + 1
        digest = oracle.digests(keys[: pages - 1, :, lane], config.digest)
        candidates = list(range(config.sink_pages, pages - config.window_pages))
        scores = oracle.page_scores(
            step.query, digest, candidates, config.head_reduce, fake.scaling
        )
        expected = oracle.select(
            pages, scores, step.resident,
            budget=config.budget_pages, sinks=config.sink_pages, window=config.window_pages,
            must=config.must_pages, cap=config.recall_cap,
        )  # fmt: skip
        assert len(step.chosen) == len(set(step.chosen))
        assert step.chosen[-1] == pages - 1, "the open page comes last"
        gap = expected ^ set(step.chosen)
        values = [scores[page] for page in gap]
        assert not gap or np.ptp(values) < 1e-5, (step, expected)


@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 256], ids="len-{}".format)
def test_prefill_then_decode_is_exact_when_everything_fits(length, groups):
    fake = engine(head_groups=groups)
    row = fake.add_row()
    assert fake.extend({row: length}) < TOLERANCE
    for _ in range(20):
        assert fake.decode([row]) < TOLERANCE
        fake.check()
    assert all(len(step.chosen) == max(step.chosen) + 1 for step in fake.steps)
    assert fake.cache.report()["pages_evicted"] == 0


@pytest.mark.parametrize("chunks", [[16] * 12, [48, 16, 112], [7, 9, 33, 100, 1, 20]], ids=str)
@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
def test_prefill_far_beyond_the_frames_is_exact(chunks, groups):
    """Frames for 6 pages, prompts of 11 and 12: most of the prefix streams from the host."""
    fake = engine(pages=40, frames=6, budget=16 * 5, head_groups=groups)
    row = fake.add_row()
    for chunk in chunks:
        assert fake.extend({row: chunk}) < TOLERANCE
        fake.check()
    report = fake.cache.report()
    assert report["pages_evicted"] > 0 or len(chunks) == 1
    fake.decode([row])
    assert_chosen_as_oracle(fake)


def test_ragged_extend_batch_with_shared_and_unaligned_prefixes_is_exact():
    fake = engine(pages=60, frames=20, budget=16 * 8)
    parent = fake.add_row()
    assert fake.extend({parent: 133}) < TOLERANCE
    children = [fake.share(parent, 8), fake.share(parent, 3), fake.add_row()]
    assert fake.extend(dict(zip(children, [5, 40, 1], strict=True))) < TOLERANCE
    fake.check()
    assert fake.extend({children[0]: 30, parent: 2, children[2]: 64}) < TOLERANCE
    fake.check()


@pytest.mark.parametrize("digest", ["cuboid-mean", "cuboid-max", "cuboid-center", "mean-std"])
@pytest.mark.parametrize("reduce", ["mean", "max", "softmax-mean"])
@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
def test_sparse_decode_chooses_what_the_oracle_chooses(digest, reduce, groups):
    fake = engine(
        pages=80, frames=24, budget=16 * 7, top_k=16 * 2, digest=digest, head_reduce=reduce,
        head_groups=groups,
    )  # fmt: skip
    long, short, middle = (fake.add_row() for _ in range(3))
    fake.extend({long: 400, short: 20, middle: 130})
    for _ in range(18):
        assert fake.decode([long, short, middle]) < TOLERANCE
        fake.check()
    assert_chosen_as_oracle(fake)
    report = fake.cache.report()
    assert report["pages_recalled"] > 0 and report["pages_refused"] == 0
    assert max(len(step.chosen) for step in fake.steps) == fake.config.budget_pages


@pytest.mark.parametrize("cap", [0, 1, 2])
def test_recall_cap_bounds_recalls_and_is_chosen_as_the_oracle_says(cap):
    fake = engine(pages=80, frames=16, budget=16 * 8, recall_cap=cap)
    row = fake.add_row()
    fake.extend({row: 500})
    for _ in range(12):
        before = fake.cache.report()["layers"]
        assert fake.decode([row]) < TOLERANCE
        after = fake.cache.report()["layers"]
        for old, new in zip(before, after, strict=True):
            assert new["pages_recalled"] - old["pages_recalled"] <= cap
    assert_chosen_as_oracle(fake)
    fake.check()


@pytest.mark.parametrize("prompts", [[135] * 3, [60, 70, 145]], ids=["same", "ragged"])
def test_rows_that_overflow_the_frames_take_turns_and_stay_exact(prompts):
    """Up to 10 pages each, frames for 14: every step evicts one row for the other."""
    fake = engine(pages=60, frames=14, budget=16 * 10, oversubscription=4.0)
    rows = [fake.add_row() for _ in prompts]
    for row, tokens in zip(rows, prompts, strict=True):
        assert fake.extend({row: tokens}) < TOLERANCE
    recalled = 0
    for _ in range(12):
        assert fake.decode(rows) < TOLERANCE
        fake.check()
        now = fake.cache.report()["pages_recalled"]
        assert now > recalled, "every step recalls"
        recalled = now
    assert all(len(step.chosen) == max(step.chosen) + 1 for step in fake.steps), (
        "all pages attended"
    )
    assert fake.cache.report()["pages_refused"] == 0


def test_a_follow_up_on_an_evicted_prefix_is_exact_and_recalls_it():
    fake = engine(pages=60, frames=12, budget=16 * 10)
    first, second = fake.add_row(), fake.add_row()
    fake.extend({first: 150})
    fake.decode([first])
    fake.extend({second: 150})
    for _ in range(4):
        fake.decode([second])
    follow_up = fake.share(first, 9)
    assert fake.extend({follow_up: 10}) < TOLERANCE
    before = fake.cache.report()["pages_recalled"]
    assert fake.decode([follow_up]) < TOLERANCE
    assert fake.cache.report()["pages_recalled"] > before
    fake.check()


def test_shared_prefix_is_sealed_once_and_a_page_missed_twice_is_recalled_once():
    fake = engine(pages=60, frames=40, budget=16 * 6, top_k=16 * 3)
    parent = fake.add_row()
    fake.extend({parent: 16 * 20})
    sealed = fake.cache.report()["pages_sealed"]
    children = [fake.share(parent, 20) for _ in range(4)]
    fake.extend(dict.fromkeys(children, 3))
    report = fake.cache.report()
    assert report["pages_sealed"] == sealed == 20
    assert report["pages_backed_up"] == 20 * fake.geometry.lanes
    for _ in range(8):
        assert fake.decode(children) < TOLERANCE
    report = fake.cache.report()
    assert report["pages_recalled"] <= report["page_misses"]
    fake.check()


def test_a_reused_page_never_shows_its_former_life():
    fake = engine(pages=12, frames=12)
    for _ in range(5):
        row = fake.add_row()
        assert fake.extend({row: 100}) < TOLERANCE
        assert fake.decode([row]) < TOLERANCE
        fake.free(row)
        fake.check()
    fake.flush()
    fake.check()
    assert fake.cache.report()["frames_used"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_error_stays_within_a_few_roundings(dtype):
    fake = FakeEngine(
        ArkValeConfig(page_size=16, budget=16 * 8, dense_layers=1),
        pages=40, frames=12, dtype=dtype, query_heads=8, head_dim=64,
    )  # fmt: skip
    row = fake.add_row()
    limit = 8 * torch.finfo(dtype).eps
    assert fake.extend({row: 200}) < limit
    for _ in range(20):
        assert fake.decode([row]) < limit


def test_prefix_blocks_are_read_in_the_order_that_layers_take_them(monkeypatch):
    """Three blocks a layer: each read once, and again if a layer asks out of turn."""
    from arkvale_sglang.runtime import prefix, streams

    monkeypatch.setattr(prefix, "STAGING_TOKENS", 64)
    reads = []
    gather = streams.gather_pages

    def counting(layer, lane_pages, **options):
        reads.append(lane_pages.tolist())
        return gather(layer, lane_pages, **options)

    monkeypatch.setattr(streams, "gather_pages", counting)
    fake = engine(pages=40, frames=6, budget=16 * 5)
    row = fake.add_row()
    fake.extend({row: 170})
    assert fake.extend({row: 10}) < TOLERANCE
    assert len(reads) == 3 * fake.geometry.managed_layers
    layer, block = fake.cache.prefix._order[1]
    again, _ = fake.cache.prefix.take(layer, block)
    assert again.shape[0] == block.tokens and len(reads) == 3 * fake.geometry.managed_layers + 1


def test_a_profiler_sees_the_parts_of_a_step():
    fake = engine(pages=80, frames=16, budget=16 * 8)
    row = fake.add_row()
    fake.extend({row: 500})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        fake.decode([row])
    seen = {event.key for event in profiler.key_averages()}
    parts = ("append", "score", "select", "resolve", "recall", "attend")
    assert {f"arkvale.{part}" for part in parts} <= seen
