"""Rules of single requests: budgets side by side in a batch, and rules that drop for good."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.runtime import prefix
from arkvale_sglang.runtime.dropping import OBSERVED_TOKENS
from support import oracle
from support.engine import FakeEngine, Step

PAGE, SINKS, WINDOW = 16, 2, 2
SERVER = ArkValeConfig(page_size=PAGE, budget=PAGE * 24, dense_layers=1)


def engine(groups: int = 2, pages: int = 120, frames: int = 120) -> FakeEngine:
    config = dataclasses.replace(SERVER, head_groups=groups)
    return FakeEngine(config, pages=pages, frames=frames, layers=3)


def own(fake: FakeEngine, selection: str, budget_pages: int) -> ArkValeConfig:
    return fake.config.for_request({"selection": selection, "budget": budget_pages * PAGE})


def steps_of(fake: FakeEngine) -> dict[tuple[int, int, int], list[Step]]:
    """Decode steps in order, by layer, group and row."""
    found: dict[tuple[int, int, int], list[Step]] = {}
    for step in fake.steps:
        found.setdefault((step.layer, step.group, step.row), []).append(step)
    return found


def mass(
    fake: FakeEngine, step: Step, query: np.ndarray, candidates: list[int]
) -> dict[int, float]:
    """What a query's heads give each page by its digest, softmax over the candidates."""
    lane = slice(step.group * fake.geometry.lane_heads, (step.group + 1) * fake.geometry.lane_heads)
    keys = fake.keys[step.layer, fake.rows[step.row].pages][: max(candidates) + 1, :, lane]
    digests = oracle.digests(keys, fake.config.digest)
    return oracle.page_scores(query, digests, candidates, "softmax-mean", fake.scaling)


def observed(fake: FakeEngine, step: Step, pages: int) -> np.ndarray:
    """Mean mass of the prompt's first ``pages`` pages under its last queries."""
    heads = fake.query_heads // fake.geometry.groups
    queries = fake.prompt_queries[step.layer, step.row][-OBSERVED_TOKENS:]
    queries = queries[:, step.group * heads : (step.group + 1) * heads]
    each = [mass(fake, step, query, list(range(SINKS, pages))) for query in queries]
    return np.mean([[scores.get(page, 0.0) for page in range(pages)] for scores in each], axis=0)


@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
def test_streaming_attends_to_sinks_and_the_latest_pages(groups):
    fake = engine(groups)
    row = fake.add_row()
    rule = [own(fake, "streaming", 8)]
    fake.extend({row: 40 * PAGE + 3}, rule)
    for _ in range(2 * PAGE):
        fake.decode([row], rule)
    for step in fake.steps:
        last = max(step.chosen)
        assert set(step.chosen) == {0, 1, *range(last - 5, last + 1)}


@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
@pytest.mark.parametrize("chunk", [20 * PAGE + 5, 21], ids=["long-chunk", "short-chunk"])
def test_snapkv_keeps_what_the_end_of_the_prompt_ranked_and_all_that_follows(groups, chunk):
    fake = engine(groups)
    row = fake.add_row()
    budget, prompt = 12, 40
    rule = [own(fake, "snapkv", budget)]
    fake.extend({row: 40 * PAGE + 5 - chunk}, rule)
    fake.extend({row: chunk}, rule)
    for _ in range(3 * PAGE):
        fake.decode([row], rule)
        fake.check()
    for steps in steps_of(fake).values():
        importance = observed(fake, steps[0], prompt)
        for step in steps:
            last = max(step.chosen)
            forced = {0, 1, last - 1, last}
            late = set(range(prompt, last - 1))
            room = budget - len(forced) - len(late)
            ranked = sorted(range(SINKS, prompt), key=lambda page: -importance[page])
            ranked = [page for page in ranked if page not in forced]
            assert set(step.chosen) == forced | late | set(ranked[:room])


@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
def test_h2o_loses_for_good_what_has_gathered_least(groups):
    fake = engine(groups)
    row = fake.add_row()
    budget, prompt = 10, 40
    rule = [own(fake, "h2o", budget)]
    fake.extend({row: prompt * PAGE + 5}, rule)
    for _ in range(3 * PAGE):
        fake.decode([row], rule)
        fake.check()
    for steps in steps_of(fake).values():
        total = dict(enumerate(observed(fake, steps[0], prompt)))
        lost: set[int] = set()
        for step in steps:
            last = max(step.chosen)
            candidates = list(range(SINKS, last - 1))
            for page, share in mass(fake, step, step.query, candidates).items():
                total[page] = total.get(page, 0.0) + share
            alive = [page for page in candidates if page not in lost]
            kept = sorted(alive, key=lambda page: -total[page])[: budget - SINKS - WINDOW]
            lost |= set(alive) - set(kept)
            assert set(step.chosen) == {0, 1, last - 1, last, *kept}


def test_a_slot_forgets_the_request_before():
    fake = engine(groups=1)
    rule = [own(fake, "snapkv", 8)]
    for prompt in (34, 30):
        row = fake.add_row()
        assert row == 0
        fake.extend({row: prompt * PAGE}, rule)
        for _ in range(2 * PAGE + 1):  # beyond pages that the first one had ranked
            fake.decode([row], rule)
        for step in fake.steps:
            last = max(step.chosen)
            importance = observed(fake, step, prompt)
            ranked = sorted(range(SINKS, min(prompt, last - 1)), key=lambda p: -importance[p])
            late = max(0, last - 1 - prompt)
            assert set(ranked[: 4 - late]) <= set(step.chosen)
            assert set(range(prompt, last)) <= set(step.chosen)
        fake.free(row)
        fake.steps.clear()


@pytest.mark.parametrize("frames", [120, 40], ids=["calm", "pressed"])
def test_rows_of_one_batch_keep_their_own_budgets(frames):
    fake = engine(groups=1, frames=frames)
    budgets = [24, 8, 12, 12]
    rules = [own(fake, "recall", budget) for budget in budgets[:3]] + [own(fake, "streaming", 12)]
    rows = [fake.add_row() for _ in budgets]
    for row, rule in zip(rows, rules, strict=True):
        fake.extend({row: 27 * PAGE + 1}, [rule])
    for _ in range(6):
        assert fake.decode(rows, rules) < 1e-4
        fake.check()
    for step in fake.steps:
        assert len(set(step.chosen)) == budgets[rows.index(step.row)]


@pytest.mark.parametrize(
    "frames, groups, staged",
    [(200, 2, 8192), (40, 1, 64), (40, 2, 8192), (32, 2, 64)],
    ids=["roomy", "blocks", "groups", "turns"],
)
def test_a_full_row_attends_to_everything_beside_rows_that_choose(
    frames, groups, staged, monkeypatch
):
    """With 40 or 32 frames a full row of 41 pages alone exceeds all there are, and the others
    evict, recall and take turns beside it."""
    monkeypatch.setattr(prefix, "STAGING_TOKENS", staged)
    fake = engine(groups, pages=200, frames=frames)
    full = fake.config.for_request({"policy": "full"})
    rules = [full, own(fake, "recall", 8), fake.config, full, own(fake, "streaming", 12), full]
    rows = [fake.add_row() for _ in rules]
    prompts = [41 * PAGE, 30 * PAGE + 5, 26 * PAGE - 2, 33 * PAGE - 1, 20 * PAGE, 3]
    for row, tokens, rule in zip(rows, prompts, rules, strict=True):
        assert fake.extend({row: tokens}, [rule]) < 1e-4
    for _ in range(5):
        assert fake.decode(rows, rules) < 1e-4
    fake.check()
    budgets = dict(zip(rows, [None, 8, 24, None, 12, None], strict=True))
    for step in fake.steps:
        pages = max(step.chosen) + 1
        assert len(set(step.chosen)) == (budgets[step.row] or pages)
    report = fake.cache.report()
    assert report["pages_refused"] == 0
    assert (report["pages_recalled"] > 0) == (frames < 200)
    full_tokens = sum(prompts[row] for row in (0, 3, 5))
    assert report["tokens_streamed"] == (5 * full_tokens + 3 * 10 if frames < 200 else 0)


def test_a_full_row_takes_no_frames_from_others_but_for_its_open_page():
    fake = engine(groups=1, frames=40)
    full = fake.config.for_request({"policy": "full"})
    first = fake.add_row()
    fake.extend({first: 24 * PAGE + 3})
    held = fake._residents(0, [first])[0, 0]
    second = fake.add_row()
    fake.extend({second: 50 * PAGE + 5}, [full])
    assert fake._residents(0, [first])[0, 0] == held
    assert len(fake._residents(0, [second])[0, 0]) == 40 - len(held)
    before = fake.cache.report()["pages_evicted"]
    for _ in range(PAGE - 6):
        fake.decode([second], [full])
    assert fake.cache.report()["pages_evicted"] == before
    assert fake._residents(0, [first])[0, 0] == held


def test_equal_rows_share_a_wave_and_the_servers_own_settings_cost_none():
    fake = engine(groups=1)
    small = own(fake, "recall", 8)
    cuts = fake.cache.waves([3, 3, 3, 3], [small, small, fake.config, small])
    assert cuts == [(0, 2), (2, 3), (3, 4)]
    assert fake.cache.waves([3, 3, 3, 3], None) == [(0, 4)]
