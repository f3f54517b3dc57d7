"""Resolving and finding frames against a model in plain Python: hits, evictions, refusals."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arkvale_kernels.layout import PINNED, SCORE_BITS, FrameLists, Residency
from arkvale_kernels.residency import (
    COUNTED,
    find_frames,
    find_places,
    kernel,
    reference,
    resolve_pages,
)
from support.tables import CLOCK, Held, assert_paired, build, copy, random_lane, same

SCORES = [-torch.inf, -8.5, -1.0, -1e-30, 0.0, 1e-30, 0.5, 7.0, 3e38, torch.inf]
"""In rising order: importance must survive its way into an integer."""
IMPLEMENTATIONS = {"reference": reference, "kernel": kernel}
by_implementation = pytest.mark.parametrize(
    "op", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys()
)
examples = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def guarded(tables: Residency, guards) -> Residency:
    return Residency(*(guards.hold(table) for table in tables))


def resolve(op, tables: Residency, wanted, scores=None, clock=CLOCK, groups=1, lists=None):
    """Call the op on lists; frames, ``{recalled page: frame}``, counts."""
    lane_pages = torch.tensor(np.asarray(wanted), dtype=torch.int32)
    if scores is not None:
        scores = torch.tensor(np.asarray(scores), dtype=torch.float32)
    counts = torch.full((len(COUNTED),), 1000)
    frames, recalls = op.resolve_pages(
        tables, lane_pages, scores, torch.tensor(clock), counts, groups, lists
    )
    assert frames.dtype == torch.int32 and frames.shape == lane_pages.shape
    listed = torch.arange(recalls.lane_pages.shape[0])
    if recalls.counts is not None:
        share = torch.arange(recalls.lane_pages.shape[0] // groups)
        listed = listed[(share < recalls.counts.unsqueeze(1)).flatten()]
    pages, taken = (part[listed].tolist() for part in recalls[:2])
    assert len(set(pages)) == len(pages) and len(set(taken)) == len(taken)
    return frames, dict(zip(pages, taken, strict=True)), (counts - 1000).tolist()


def expected_of_lane(lane: Held, wanted: dict[int, float]) -> tuple[list[int], list[int]]:
    """Missed pages by falling importance and possible victims by rising heat; ``wanted`` maps
    pages to importance."""
    where = {page: frame for frame, (page, _) in lane.frames.items()}
    misses = sorted((p for p in wanted if p not in where), key=lambda p: (-wanted[p], p))
    kept = {where[page] for page in wanted if page in where}
    victims = sorted(
        (heat, page) for frame, (page, heat) in lane.frames.items()
        if frame not in kept and heat != PINNED
    )  # fmt: skip
    return misses, [page for _, page in victims]


@by_implementation
@examples
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 3),
    frames=st.integers(1, 7),
    pages=st.integers(7, 10),
    rows=st.integers(1, 3),
    width=st.integers(1, 5),
    scored=st.booleans(),
)
def test_resolve_does_what_the_model_says(op, seed, groups, frames, pages, rows, width, scored):
    """Free frames first, then the coldest that no row wants, pinned never; each page once; what
    does not fit is refused and nothing else changes."""
    draw = np.random.default_rng(seed)
    lanes = [random_lane(draw, pages, frames) for _ in range(groups)]
    tables = build(lanes, pages=pages, frames=frames)
    before, stride = copy(tables), pages + 1
    wanted = draw.integers(0, pages + 1, (rows * groups, width))
    lane_of = np.arange(rows * groups)[:, None] % groups
    lane_pages = np.where(wanted > 0, wanted + lane_of * stride, 0)
    scores = draw.choice(SCORES, wanted.shape).astype(np.float32)
    found, recalled, counts = resolve(
        op, tables, lane_pages, scores if scored else None, groups=groups
    )

    assert_paired(tables, groups)
    totals = np.zeros(3, dtype=int)
    for group, lane in enumerate(lanes):
        importance: dict[int, float] = {}
        for page, score in zip(wanted[group::groups].flat, scores[group::groups].flat, strict=True):
            if page:
                value = float(score) if scored else 0.0
                importance[int(page)] = max(value, importance.get(int(page), -np.inf))
        misses, victims = expected_of_lane(lane, importance)
        free = frames - len(lane.frames)
        served = min(len(misses), free + len(victims))
        evicted = set(victims[: max(0, served - free)])
        own = range(group * stride, (group + 1) * stride)
        granted = {page - group * stride for page in recalled if page in own}
        assert len(granted) == served and granted <= set(misses)
        if op is reference:
            assert granted == set(misses[:served]), "the most important first"
        for page in range(1, stride):
            old, new = before.frame_of[own[page]], tables.frame_of[own[page]]
            if page in granted:
                assert old == -1 and new == recalled[own[page]]
            elif page in evicted:
                assert old >= 0 and new == -1
            else:
                assert old == new, "a page that is neither granted nor evicted stays as it was"
        totals += [served, len(evicted), len(misses) - served]
    was = before.frame_of[torch.from_numpy(lane_pages)].numpy()
    hits, missed = (was >= 0).sum(), ((was < 0) & (lane_pages > 0)).sum()
    assert counts == [hits, missed, *totals]
    assert torch.equal(found, tables.frame_of[torch.from_numpy(lane_pages)])


@by_implementation
@examples
@given(seed=st.integers(0, 10**6))
def test_resolve_warms_what_was_wanted_in_the_order_of_importance(op, seed):
    """Frames touched now carry the clock and, below it, their score; pinned ones stay pinned and
    the others keep their heat."""
    draw = np.random.default_rng(seed)
    lane = random_lane(draw, 10, 10)
    tables = build([lane], pages=10, frames=10)
    before = copy(tables)
    pages = [int(page) for page in 1 + draw.permutation(10)[:5]]
    ranks = draw.permutation(len(SCORES))[:5]
    found, _, _ = resolve(op, tables, [pages], [[SCORES[rank] for rank in ranks]])
    frames = found[0].tolist()
    warm = []
    for _, frame in sorted(zip(ranks.tolist(), frames, strict=True)):
        if frame >= 0 and before.heat[frame] == PINNED:
            assert tables.heat[frame] == PINNED
        elif frame >= 0:
            warm.append(tables.heat[frame].item())
    assert warm == sorted(warm), "a higher score is warmer"
    assert len(set(warm)) >= len(warm) - 2, "but for +-1e-30 and 0, which share their high bits"
    assert all(heat >> SCORE_BITS == CLOCK for heat in warm)
    others = [frame for frame in range(11) if frame not in frames]
    assert torch.equal(tables.heat[others], before.heat[others])


def batch_of(groups: int, seed: int, *, pages: int, frames: int, used: int, rows: int, width: int):
    """Tables with ``used`` frames a lane of few different heats, two of them pinned; ragged rows
    that share pages; lists with entries to spare and entries too few."""
    draw = np.random.default_rng(seed)
    lanes = []
    for _ in range(groups):
        held = zip(draw.permutation(frames)[:used], 1 + draw.permutation(pages)[:used], strict=True)
        heats = [PINNED] * 2 + [int(h) << SCORE_BITS for h in draw.integers(0, 6, used)]
        lanes.append(Held({int(f): (int(p), heats[place]) for place, (f, p) in enumerate(held)}))
    wanted = np.stack([1 + draw.permutation(pages)[:width] for _ in range(rows)])
    wanted[draw.integers(0, rows), width // 2 :] = 0
    lane = np.arange(groups) * (pages + 1)
    wanted = np.where(wanted[:, None] > 0, wanted[:, None] + lane[:, None], 0)
    wanted = wanted.reshape(rows * groups, width)
    owned = np.clip((wanted > 0).sum(1) + draw.integers(-1, 2, rows * groups), 0, width)
    starts = torch.tensor([0, *owned.cumsum()], dtype=torch.int32)
    scores = draw.standard_normal(wanted.shape)
    return build(lanes, pages=pages, frames=frames), wanted, scores, starts


@pytest.mark.parametrize(
    "groups, frames, used, rows, width",
    [
        (1, 30, 0, 3, 7),
        (2, 30, 10, 3, 7),
        (3, 30, 28, 2, 9),
        (8, 24, 24, 2, 5),
        (1, 200, 200, 5, 33),
        (2, 17, 17, 4, 11),
        (1, 5000, 4990, 36, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("scored", [True, False], ids=["scored", "unscored"])
def test_kernel_and_reference_leave_the_same_tables_up_to_equal_heats(
    groups, frames, used, rows, width, scored, guards
):
    """Ragged batches up to more entries and frames than a block holds, between guard bands."""
    tables, wanted, scores, starts = batch_of(
        groups, frames, pages=2 * frames, frames=frames, used=used, rows=rows, width=width
    )
    scores = scores if scored else None
    total, scratch = int(starts[-1]), groups * frames
    found = {}
    for op in (kernel, reference):
        own = guarded(tables, guards)
        lists = FrameLists(guards.empty(total + 9, dtype=torch.int32), guards.hold(starts))
        untouched = lists.indices[-1].item()
        result = resolve(op, own, wanted, scores, groups=groups, lists=lists)
        assert_paired(own, groups)
        assert (lists.indices[total:] == untouched).all()
        for row, (start, stop) in enumerate(itertools.pairwise(starts)):
            frames_of_row = result[0][row, : stop - start]
            expected = torch.where(frames_of_row < 0, scratch, frames_of_row)
            assert torch.equal(lists.indices[start:stop], expected)
        found[op] = own, result
    (tables, (_, recalled, counts)), (others, (_, also, expected)) = found.values()
    assert counts == expected
    if counts[COUNTED.index("pages_refused")] == 0:
        assert set(recalled) == set(also)
        assert torch.equal(tables.heat.sort().values, others.heat.sort().values)


@by_implementation
def test_a_page_missed_by_several_rows_claims_one_frame_at_its_highest_importance(op, guards):
    """Three rows want page 5, one of them badly."""
    tables = guarded(build([Held()], pages=8, frames=1), guards)
    wanted, scores = [[5, 0], [5, 0], [5, 5]], [[1.0, 4.0], [9.0, 9.0], [2.0, 2.0]]
    found, recalled, counts = resolve(op, tables, wanted, scores)
    assert recalled == {5: 0} and counts == [0, 4, 1, 0, 0]
    assert found.tolist() == [[0, -1], [0, -1], [0, 0]]
    expected = reference.heat_of(torch.tensor([9.0]), torch.tensor(CLOCK))
    assert tables.heat[0] == expected


def test_the_reference_refuses_the_least_important_pages(guards):
    tables = build([Held()], pages=8, frames=1)
    _, recalled, counts = resolve(reference, tables, [[5, 6], [5, 0]], [[1.0, 4.0], [9.0, 9.0]])
    assert recalled == {5: 0} and counts == [0, 3, 1, 0, 1]


@by_implementation
def test_eviction_goes_free_first_then_least_recent_then_least_important_never_pinned(op, guards):
    """One page a step, until only pinned frames are left."""
    used = 9 << SCORE_BITS
    heat = {1: PINNED, 2: used + 5, 3: used + 2, 4: 7 << SCORE_BITS}
    lane = Held({frame: (frame, heat[frame]) for frame in heat})
    tables = guarded(build([lane], pages=12, frames=5), guards)
    taken = []
    for count in range(1, 7):
        new = list(range(6, 6 + count))
        found, recalled, _ = resolve(op, tables, [new])
        taken += recalled.values()
    assert taken == [0, 4, 3, 2], "free, then the oldest clock, then the lower score"
    assert tables.page_in[1] == 1 and tables.heat[1] == PINNED
    assert found[0].tolist()[4:] == [-1, -1]
    assert_paired(tables, 1)


@by_implementation
def test_the_least_recently_used_page_leaves_over_many_steps(op):
    """A plain LRU list is the model; one page a step, hits and misses mixed."""
    draw = np.random.default_rng(0)
    tables = build([Held()], pages=9, frames=4)
    recent: list[int] = []
    for clock in range(1, 60):
        page = int(draw.integers(1, 10))
        resolve(op, tables, [[page]], clock=clock)
        recent = [*[other for other in recent if other != page], page][-4:]
        resident = (tables.frame_of >= 0).nonzero().flatten().tolist()
        assert sorted(recent) == resident
    assert_paired(tables, 1)


@by_implementation
@pytest.mark.parametrize("clock", [0, 1, 255, 256, 2**31, 2**38], ids="clock{}".format)
def test_clocks_of_any_size_order_heats(op, clock, guards):
    """The kernel looks at as many digits of a heat as the clock needs."""
    older = [max(0, clock - age) << SCORE_BITS for age in (3, 2, 5, 1)]
    lane = Held({frame: (frame + 1, heat) for frame, heat in enumerate(older)})
    tables = guarded(build([lane], pages=9, frames=4), guards)
    _, recalled, counts = resolve(op, tables, [[7, 8]], clock=clock)
    colder = [frame for frame, heat in enumerate(older) if heat < clock << SCORE_BITS]
    assert counts[2] == len(recalled) == min(2, len(colder))
    assert set(recalled.values()) == {2, 0} if clock > 5 else set(recalled.values()) <= {*colder}
    assert_paired(tables, 1)


@by_implementation
def test_a_shortage_of_frames_refuses_pages_and_corrupts_nothing(op, guards):
    """All frames pinned or wanted: every miss is refused and the tables stay as they were."""
    lane = Held({0: (1, PINNED), 1: (2, 5), 2: (3, PINNED)})
    tables = guarded(build([lane], pages=8, frames=3), guards)
    before = copy(tables)
    lists = FrameLists(guards.empty(3, dtype=torch.int32), torch.tensor([0, 3]).int())
    found, recalled, counts = resolve(op, tables, [[2, 7, 8]], [[0.0, 9.0, 9.0]], lists=lists)
    assert found.tolist() == [[1, -1, -1]] and lists.indices.tolist() == [1, 3, 3]
    assert recalled == {} and counts == [1, 2, 0, 0, 2]
    assert torch.equal(tables.frame_of, before.frame_of)
    assert torch.equal(tables.page_in, before.page_in)


@by_implementation
@pytest.mark.parametrize("wanted", [[[0, 0], [0, 0]], [[0]]], ids=str)
def test_padding_is_inert(op, wanted, guards):
    """It neither touches a table nor counts."""
    tables = guarded(build([Held({0: (3, 9)})], pages=4, frames=2), guards)
    before = copy(tables)
    found, recalled, counts = resolve(op, tables, wanted, [[1.0] * len(row) for row in wanted])
    assert (found == -1).all() and counts == [0] * 5 and recalled == {}
    assert same(tables, before)


# -- find_frames -----------------------------------------------------------------------------


@by_implementation
@pytest.mark.parametrize("width", [1, 37, 1500])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_frames_are_found_up_to_the_end_of_a_row(op, width, dtype, guards):
    """Beyond it stands garbage, which no list sees either; the table stays as it is."""
    draw = np.random.default_rng(width)
    frame_of = torch.from_numpy(draw.integers(-1, 50, 3 * width)).int()
    counts = [0, width, width // 2]
    pages = torch.full((3, width), 2**30, dtype=dtype)
    for row, count in enumerate(counts):
        pages[row, :count] = torch.from_numpy(draw.integers(0, 3 * width, count))
    starts = torch.tensor([0, 0, width, width + width // 2], dtype=torch.int32)
    lists = FrameLists(guards.empty(2 * width, dtype=torch.int32), guards.hold(starts))
    found = op.find_frames(
        guards.hold(frame_of, frozen=True),
        guards.hold(pages, frozen=True, row_stride=width + 5),
        guards.hold(torch.tensor(counts), frozen=True),
        999,
        lists,
    )
    assert found.dtype == torch.int32
    packed = []
    for row, count in enumerate(counts):
        expected = frame_of[pages[row, :count].long()]
        assert torch.equal(found[row, :count], expected)
        packed += [999 if frame < 0 else frame for frame in expected.tolist()]
    assert lists.indices[: len(packed)].tolist() == packed


@by_implementation
def test_frames_beyond_the_end_of_a_row_are_none(op, guards):
    frame_of = torch.tensor([-1, 4, 5], dtype=torch.int32)
    pages = torch.tensor([[1, 2, 2**30], [2, 2**30, 2**30]], dtype=torch.int32)
    found = op.find_frames(frame_of, pages, torch.tensor([2, 0]), 999, None)
    assert found.tolist() == [[4, 5, -1], [-1, -1, -1]]


def test_places_are_where_each_layer_holds_a_token():
    """Two layers of three frames and the scratch row, pages of 16: tokens of pages without a frame
    go to the scratch row."""
    frame_of = torch.tensor([[-1, 2, 0, -1], [-1, -1, 1, 0]], dtype=torch.int32)
    pages, offsets = torch.tensor([1, 2, 3, 0], dtype=torch.int32), torch.tensor([0, 15, 7, 3])
    found = find_places(frame_of, pages, offsets, 4, 16)
    assert found.dtype == torch.int64
    assert found.tolist() == [[32, 15, 55, 51], [48, 31, 7, 51]]
    assert frame_of.tolist() == [[-1, 2, 0, -1], [-1, -1, 1, 0]]


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("frame_of", torch.zeros(4).int(), r"^frame_of must have shape \(any, any\)"),
        ("frame_of", torch.zeros(2, 4).long(), "^frame_of must be torch.int32"),
        ("lane_pages", torch.zeros(1, 2).int(), r"^lane_pages must have shape \(any\)"),
        ("offsets", torch.zeros(3).int(), r"^offsets must have shape \(2\)"),
        ("offsets", torch.zeros(2), "^offsets must be int32 or int64"),
        ("offsets", torch.zeros(2).int().to("meta"), "^offsets must be on cpu"),
    ],
)
def test_bad_places_are_refused_by_name(name, wrong, message):
    good = {
        "frame_of": torch.zeros(2, 4).int(), "lane_pages": torch.zeros(2).int(),
        "offsets": torch.zeros(2).int(), "lane_frames": 4, "page_size": 16,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        find_places(**{**good, name: wrong})


@pytest.mark.parametrize("name", ["resolve_pages", "find_frames"])
def test_kernel_and_reference_are_called_alike(name):
    """The API hands the same positional arguments to whichever serves the device."""
    assert inspect.signature(getattr(kernel, name)) == inspect.signature(getattr(reference, name))


def test_the_api_resolves_and_finds():
    tables = build([Held({0: (2, 5)})], pages=4, frames=2)
    wanted, counts = torch.tensor([[2, 3]]), torch.zeros(5, dtype=torch.int64)
    found = resolve_pages(tables, wanted, None, torch.tensor(9), counts, groups=1)
    assert found.lane_frames.tolist() == [[0, 1]] and found.recalls.lane_pages.tolist() == [3]
    again = find_frames(tables.frame_of, wanted, torch.tensor([2]), scratch=2)
    assert torch.equal(again, found.lane_frames)
