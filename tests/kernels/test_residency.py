"""The residency op against a model in plain Python: hits, claims, evictions, refusals, releases."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkvale_kernels.residency import (
    FREE,
    PINNED,
    Residency,
    claim_frames,
    release_pages,
    resolve_pages,
)

CLOCK = 50
SCORES = [-torch.inf, -8.5, -1.0, -1e-30, 0.0, 1e-30, 0.5, 7.0, 3e38, torch.inf]
"""In rising order: importance must survive its way into an integer."""


@dataclasses.dataclass
class Held:
    """One lane: what its frames hold, ``{frame: (page, heat)}``."""

    frames: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)


def build(lanes: list[Held], *, pages: int, frames: int) -> Residency:
    """Tables of one layer in which lane ``g`` holds what ``lanes[g]`` says."""
    stride, groups = pages + 1, len(lanes)
    tables = Residency(
        frame_of=torch.full((groups * stride,), -1, dtype=torch.int32),
        page_in=torch.full((groups * frames + 1,), -1, dtype=torch.int32),
        heat=torch.full((groups * frames + 1,), FREE, dtype=torch.int64),
    )
    tables.heat[-1] = PINNED
    for group, lane in enumerate(lanes):
        for frame, (page, heat) in lane.frames.items():
            tables.frame_of[group * stride + page] = group * frames + frame
            tables.page_in[group * frames + frame] = group * stride + page
            tables.heat[group * frames + frame] = heat
    return tables


def copy(tables: Residency) -> Residency:
    return Residency(*(table.clone() for table in tables))


def stacked(layers: list[Residency]) -> Residency:
    return Residency(*(torch.stack(tables) for tables in zip(*layers, strict=True)))


def assert_paired(tables: Residency, groups: int) -> None:
    """Both tables tell the same story, lane by lane, and the scratch row stays out of it."""
    frame_of, page_in, heat = (table.tolist() for table in tables)
    stride, frames = len(frame_of) // groups, (len(page_in) - 1) // groups
    held = {page: frame for page, frame in enumerate(frame_of) if frame >= 0}
    assert {frame: page for page, frame in held.items()} == {
        frame: page for frame, page in enumerate(page_in) if page >= 0
    }
    assert all(page // stride == frame // frames for page, frame in held.items())
    assert all(page % stride for page in held), "padding never holds a frame"
    assert all((page < 0) == (h == FREE) for page, h in zip(page_in[:-1], heat, strict=False))
    assert page_in[-1] == -1 and heat[-1] == PINNED


def random_lane(draw: np.random.Generator, pages: int, frames: int) -> Held:
    """Some frames free, some pinned, the others of distinct heat below the clock."""
    heats = draw.permutation(CLOCK * 4)
    lane = Held()
    for frame, page in enumerate(1 + draw.permutation(pages)[:frames]):
        kind = draw.choice(["free", "pinned", "used"], p=[0.25, 0.15, 0.6])
        if kind != "free":
            heat = int(heats[frame]) << 30 if kind == "used" else PINNED
            lane.frames[frame] = (int(page), heat)
    return lane


def resolve(tables: Residency, wanted, scores=None, clock=CLOCK, groups=1):
    """Call the op on lists."""
    lane_pages = torch.tensor(wanted, dtype=torch.int32)
    if scores is not None:
        scores = torch.tensor(scores, dtype=torch.float32)
    return resolve_pages(tables, lane_pages, scores, torch.tensor(clock), groups=groups)


# -- resolve_pages ---------------------------------------------------------------------------


def expected_of_lane(lane: Held, wanted: dict[int, float]):
    """Recalled, evicted and refused pages of one lane; ``wanted`` maps pages to importance."""
    where = {page: frame for frame, (page, _) in lane.frames.items()}
    misses = sorted((p for p in wanted if p not in where), key=lambda p: (-wanted[p], p))
    kept = {where[page] for page in wanted if page in where}
    victims = sorted(
        (heat, page) for frame, (page, heat) in lane.frames.items()
        if frame not in kept and heat != PINNED
    )  # fmt: skip
    return misses, [page for _, page in victims]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 4),
    frames=st.integers(1, 7),
    pages=st.integers(7, 10),
    rows=st.integers(1, 3),
    width=st.integers(0, 5),
    scored=st.booleans(),
)
def test_resolve_does_what_the_model_says(seed, groups, frames, pages, rows, width, scored):
    """Free frames first, then the coldest that no row wants, pinned never; the most important
    misses first; each page once; what does not fit is refused and nothing else changes."""
    draw = np.random.default_rng(seed)
    lanes = [random_lane(draw, pages, frames) for _ in range(groups)]
    tables = build(lanes, pages=pages, frames=frames)
    before, stride = copy(tables), pages + 1
    wanted = draw.integers(0, pages + 1, (rows * groups, width))
    lane_of = np.arange(rows * groups)[:, None] % groups
    lane_pages = np.where(wanted > 0, wanted + lane_of * stride, 0)
    scores = draw.choice(SCORES, wanted.shape).astype(np.float32)
    found = resolve(tables, lane_pages, scores if scored else None, groups=groups)

    assert_paired(tables, groups)
    recalled = dict(zip(found.recall_pages.tolist(), found.recall_frames.tolist(), strict=True))
    totals = np.zeros(3, dtype=int)
    for group, lane in enumerate(lanes):
        importance = {}
        for page, score in zip(wanted[group::groups].flat, scores[group::groups].flat, strict=True):
            if page:
                value = float(score) if scored else 0.0
                importance[int(page)] = max(value, importance.get(int(page), -np.inf))
        misses, victims = expected_of_lane(lane, importance)
        free = frames - len(lane.frames)
        granted = misses[: free + len(victims)]
        evicted = set(victims[: max(0, len(granted) - free)])
        own = range(group * stride, (group + 1) * stride)
        assert {page - group * stride for page in recalled if page in own} == set(granted)
        for page in range(1, stride):
            old, new = before.frame_of[own[page]], tables.frame_of[own[page]]
            if page in granted:
                assert old == -1 and new == recalled[own[page]]
            elif page in evicted:
                assert old >= 0 and new == -1
            else:
                assert old == new, "a page that is neither granted nor evicted stays as it was"
        totals += [len(granted), len(evicted), len(misses) - len(granted)]
    was = before.frame_of[torch.from_numpy(lane_pages)].numpy()
    hits, missed = (was >= 0).sum(), ((was < 0) & (lane_pages > 0)).sum()
    assert found.counts.tolist() == [hits, missed, *totals]
    now = tables.frame_of[torch.from_numpy(lane_pages)]
    assert torch.equal(found.lane_frames, now)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_resolve_warms_what_was_wanted_in_the_order_of_importance(seed):
    """Frames touched now carry the clock and, below it, their score; pinned ones stay pinned and
    the others keep their heat."""
    draw = np.random.default_rng(seed)
    lane = random_lane(draw, 10, 10)
    tables = build([lane], pages=10, frames=10)
    before = copy(tables)
    pages = [int(page) for page in 1 + draw.permutation(10)[:5]]
    ranks = draw.permutation(len(SCORES))[:5]
    found = resolve(tables, [pages], [[SCORES[rank] for rank in ranks]])
    frames = found.lane_frames[0].tolist()
    warm = []
    for _, frame in sorted(zip(ranks.tolist(), frames, strict=True)):
        if frame >= 0 and before.heat[frame] == PINNED:
            assert tables.heat[frame] == PINNED
        elif frame >= 0:
            warm.append(tables.heat[frame].item())
    assert warm == sorted(set(warm)), "a higher score is warmer"
    assert all(heat >> 32 == CLOCK for heat in warm)
    others = [frame for frame in range(11) if frame not in frames]
    assert torch.equal(tables.heat[others], before.heat[others])


def test_a_page_missed_by_several_rows_claims_one_frame_at_its_highest_importance():
    """Two rows want page 5, one of them badly: it beats page 6 for the only frame."""
    tables = build([Held()], pages=8, frames=1)
    found = resolve(tables, [[5, 6], [5, 0]], [[1.0, 4.0], [9.0, 9.0]])
    assert found.recall_pages.tolist() == [5] and found.recall_frames.tolist() == [0]
    assert found.lane_frames.tolist() == [[0, -1], [0, -1]]
    assert found.counts.tolist() == [0, 3, 1, 0, 1]


def test_eviction_goes_free_first_then_least_recent_then_least_important_never_pinned():
    """One page a step, until only pinned frames are left."""
    heat = {1: PINNED, 2: (9 << 32) + 5, 3: (9 << 32) + 2, 4: 7 << 32}
    lane = Held({frame: (frame, heat[frame]) for frame in heat})
    tables = build([lane], pages=12, frames=5)
    taken = []
    for count in range(1, 7):
        new = list(range(6, 6 + count))
        found = resolve(tables, [new], clock=CLOCK)
        taken += found.recall_frames.tolist()
    assert taken == [0, 4, 3, 2], "free, then the oldest clock, then the lower score"
    assert tables.page_in[1] == 1 and tables.heat[1] == PINNED
    assert found.lane_frames[0].tolist()[4:] == [-1, -1]


def test_the_least_recently_used_page_leaves_over_many_steps():
    """A plain LRU list is the model; one page a step, hits and misses mixed."""
    draw = np.random.default_rng(0)
    tables = build([Held()], pages=9, frames=4)
    recent: list[int] = []
    for clock in range(1, 200):
        page = int(draw.integers(1, 10))
        resolve(tables, [[page]], clock=clock)
        recent = [*[other for other in recent if other != page], page][-4:]
        resident = (tables.frame_of >= 0).nonzero().flatten().tolist()
        assert sorted(recent) == resident
    assert_paired(tables, 1)


def test_all_equal_scores_are_granted_until_the_frames_are_full():
    """Ties may fall either way, but as many pages as frames are served and the rest refused."""
    tables = build([Held(), Held()], pages=9, frames=3)
    wanted = [[1, 2, 3, 4, 5], [11, 12, 0, 0, 0]]
    found = resolve(tables, wanted, [[0.0] * 5] * 2, groups=2)
    assert found.counts.tolist() == [0, 7, 5, 0, 2]
    assert (found.lane_frames[0] >= 0).sum() == 3 and found.lane_frames[1, :2].min() >= 3
    assert_paired(tables, 2)


def test_a_shortage_of_frames_refuses_pages_and_corrupts_nothing():
    """All frames pinned or wanted: every miss is refused and the tables stay as they were."""
    lane = Held({0: (1, PINNED), 1: (2, 5), 2: (3, PINNED)})
    tables = build([lane], pages=8, frames=3)
    before = copy(tables)
    found = resolve(tables, [[2, 7, 8]], [[0.0, 9.0, 9.0]])
    assert found.lane_frames.tolist() == [[1, -1, -1]]
    assert found.recall_pages.numel() == found.recall_frames.numel() == 0
    assert found.counts.tolist() == [1, 2, 0, 0, 2]
    assert torch.equal(tables.frame_of, before.frame_of)
    assert torch.equal(tables.page_in, before.page_in)


@pytest.mark.parametrize("wanted", [[[]], [[0, 0], [0, 0]]], ids=["no-pages", "padding"])
def test_padding_is_inert(wanted):
    """Neither an empty list nor padding touches a table or counts."""
    tables = build([Held({0: (3, 9)})], pages=4, frames=2)
    before = copy(tables)
    found = resolve(tables, wanted, [[1.0] * len(row) for row in wanted])
    assert (found.lane_frames == -1).all() and found.counts.tolist() == [0] * 5
    assert all(torch.equal(*pair) for pair in zip(tables, before, strict=True))


# -- claim_frames ----------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    groups=st.integers(1, 3),
    frames=st.integers(1, 6),
    claims=st.integers(0, 8),
    evicting=st.integers(0, 8),
)
def test_claim_does_what_the_model_says(seed, layers, groups, frames, claims, evicting):
    """In every lane of every layer, each with a past of its own: the first in the list first, free
    frames first, then the coldest, pinned never, and only ``evicting`` pages may evict."""
    draw = np.random.default_rng(seed)
    old, new = 6, claims
    held = [[random_lane(draw, old, frames) for _ in range(groups)] for _ in range(layers)]
    layered = [build(lanes, pages=old + new, frames=frames) for lanes in held]
    tables, before = stacked(layered), stacked(layered)
    pages = torch.arange(old + 1, old + new + 1)[torch.from_numpy(draw.permutation(new))]
    heat = torch.from_numpy(np.where(draw.random(new) < 0.5, PINNED, CLOCK << 32))
    evicted = claim_frames(tables, pages, heat, groups=groups, evicting=evicting)

    stride = old + new + 1
    for layer, lanes in enumerate(held):
        gone = 0
        assert_paired(Residency(*(table[layer] for table in tables)), groups)
        for group, lane in enumerate(lanes):
            free = frames - len(lane.frames)
            cold = sorted((h, page) for page, h in lane.frames.values() if h != PINNED)
            leaving = cold[: max(0, min(evicting, new) - free)]
            gone += len(leaving)
            granted = min(new, free + len(leaving))
            own = slice(group * stride, (group + 1) * stride)
            now, was = tables.frame_of[layer, own], before.frame_of[layer, own]
            assert (now[pages[:granted]] >= 0).all() and (now[pages[granted:]] == -1).all()
            for place, page in enumerate(pages[:granted]):
                assert tables.heat[layer, now[page]] == heat[place]
            victims = {page for _, page in leaving}
            for page in range(old + 1):
                assert now[page] == (-1 if page in victims else was[page])
        assert evicted[layer] == gone


def test_claims_of_pages_that_get_no_frame_change_nothing():
    """Every frame pinned: a claim that may evict all the same leaves the tables alone."""
    lane = Held({0: (1, PINNED), 1: (2, PINNED)})
    tables = stacked([build([lane, lane], pages=5, frames=2)])
    before = copy(tables)
    heat = torch.full((3,), PINNED)
    evicted = claim_frames(tables, torch.tensor([3, 4, 5]), heat, groups=2, evicting=3)
    assert evicted.tolist() == [0]
    assert all(torch.equal(*pair) for pair in zip(tables, before, strict=True))


# -- release_pages ---------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6))
def test_release_frees_the_dead_pages_and_only_them(seed, layers, groups, dead):
    """Resident or not, pinned or not, named once or twice, in every lane of every layer."""
    draw = np.random.default_rng(seed)
    pages, frames = 6, 4
    lanes = [[random_lane(draw, pages, frames) for _ in range(groups)] for _ in range(layers)]
    layered = [build(lane, pages=pages, frames=frames) for lane in lanes]
    tables, before = stacked(layered), stacked(layered)
    gone = torch.from_numpy(draw.integers(0, pages + 1, dead))
    release_pages(tables, gone, groups=groups)
    for layer in range(layers):
        assert_paired(Residency(*(table[layer] for table in tables)), groups)
    dies = torch.zeros(pages + 1, dtype=torch.bool)
    dies[gone] = True
    dies = dies.repeat(groups)
    assert (tables.frame_of[:, dies] == -1).all()
    assert torch.equal(tables.frame_of[:, ~dies], before.frame_of[:, ~dies])
    kept = (before.page_in < 0) | ~dies[before.page_in.long()]
    assert torch.equal(tables.heat[kept], before.heat[kept])
    assert (tables.heat[~kept] == FREE).all()


def test_wrong_arguments_are_refused_by_name():
    """Tables of one layer and of all layers are not interchangeable, and lists go together."""
    one = build([Held()], pages=4, frames=2)
    all_layers = stacked([one])
    clock, page = torch.tensor(1), torch.tensor([1])
    with pytest.raises(ValueError, match="frame_of must have shape"):
        resolve_pages(all_layers, torch.ones(1, 2), None, clock, groups=1)
    with pytest.raises(ValueError, match="scores must have shape"):
        resolve_pages(one, torch.ones(1, 2), torch.ones(1, 3), clock, groups=1)
    with pytest.raises(ValueError, match="frame_of must have shape"):
        claim_frames(one, page, page, groups=1, evicting=1)
    with pytest.raises(ValueError, match="heat must have shape"):
        claim_frames(all_layers, page, torch.tensor([1, 2]), groups=1, evicting=1)
    with pytest.raises(ValueError, match="frame_of must have shape"):
        release_pages(one, page, groups=1)
