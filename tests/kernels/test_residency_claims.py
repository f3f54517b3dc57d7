"""Claiming and releasing frames against a model in plain Python, and bad input to residency."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkvale_kernels import checks
from arkvale_kernels.layout import FREE, PINNED, SCORE_BITS, FrameLists, Residency
from arkvale_kernels.residency import claim_frames, find_frames, release_pages, resolve_pages
from support.tables import CLOCK, Held, assert_paired, build, copy, random_lane, same, stacked


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
    heat = torch.from_numpy(np.where(draw.random(new) < 0.5, PINNED, CLOCK << SCORE_BITS))
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
    assert same(tables, before)


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


# -- bad input -------------------------------------------------------------------------------

ONE = build([Held(), Held()], pages=4, frames=2)
ALL = stacked([ONE])


def resolving() -> dict:
    return {
        "residency": copy(ONE), "lane_pages": torch.ones(4, 2, dtype=torch.int32),
        "scores": torch.zeros(4, 2), "clock": torch.tensor(1),
        "counts": torch.zeros(5, dtype=torch.int64), "groups": 2,
        "lists": FrameLists(torch.zeros(8).int(), torch.zeros(5).int()),
    }  # fmt: skip


def finding() -> dict:
    return {
        "frame_of": ONE.frame_of, "lane_pages": torch.ones(4, 3, dtype=torch.int32),
        "page_counts": torch.tensor([3, 0, 1, 2], dtype=torch.int32), "scratch": 4,
        "lists": None,
    }  # fmt: skip


def claiming() -> dict:
    return {
        "residency": copy(ALL), "pages": torch.tensor([1]), "heat": torch.tensor([5]),
        "groups": 2, "evicting": 1,
    }  # fmt: skip


LISTS = resolving()["lists"]


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("residency", ALL, r"^frame_of must have shape \(any\)"),
        ("residency", ONE._replace(heat=ONE.heat[1:]), r"^heat must have shape \(5\)"),
        ("residency", ONE._replace(heat=ONE.heat.int()), "^heat must be torch.int64"),
        ("residency", ONE._replace(page_in=ONE.page_in.long()), "^page_in must be torch.int32"),
        ("residency", ONE._replace(frame_of=ONE.frame_of[::2]), "^frame_of must be contiguous"),
        ("residency", ONE._replace(page_in=ONE.page_in.to("meta")), "^page_in must be on cpu"),
        ("lane_pages", torch.ones(4).int(), r"^lane_pages must have shape \(any, any\)"),
        ("lane_pages", torch.ones(0, 2).int(), "^lane_pages must have at least one row"),
        ("lane_pages", torch.ones(4, 2), "^lane_pages must be int32 or int64"),
        ("lane_pages", torch.ones(4, 4).int()[:, :2], r"^lane_pages must be contiguous.*\(4, 2\)"),
        ("scores", torch.zeros(4, 3), r"^scores must have shape \(4, 2\)"),
        ("scores", torch.zeros(4, 2).half(), r"^scores must be torch.float32 with shape \(4, 2\)"),
        ("scores", torch.zeros(4, 4)[:, ::2], "^scores must be contiguous"),
        ("scores", torch.zeros(4, 2, device="meta"), "^scores must be on cpu, got meta"),
        ("clock", torch.tensor([1]), r"^clock must have shape \(\)"),
        ("clock", torch.tensor(1.0), "^clock must be torch.int64"),
        ("counts", torch.zeros(4).long(), r"^counts must have shape \(5\)"),
        ("counts", torch.zeros(5).int(), "^counts must be torch.int64"),
        ("counts", torch.zeros(5).long().to("meta"), "^counts must be on cpu, got meta"),
        ("groups", 3, "^groups must divide 4 rows, 10 lane pages and 4 lane frames, got 3"),
        ("groups", 0, "^groups must divide .*got 0"),
        ("lists", LISTS._replace(starts=torch.zeros(4).int()), r"^lists.starts must have shape"),
        ("lists", LISTS._replace(starts=torch.zeros(5)), "^lists.starts must be torch.int32"),
        ("lists", LISTS._replace(indices=torch.zeros(8)), "^lists.indices must be torch.int32"),
        ("lists", LISTS._replace(indices=LISTS.indices[::2]), "^lists.indices must be contiguous"),
        ("lists", LISTS._replace(indices=LISTS.indices.to("meta")), "^lists.indices must be on"),
    ],
)
def test_bad_input_to_resolve_is_refused_by_name(name, wrong, message):
    """A wrong argument is named, with what would be right."""
    with pytest.raises(ValueError, match=message):
        resolve_pages(**{**resolving(), name: wrong})


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("frame_of", ALL.frame_of, r"^frame_of must have shape \(any\)"),
        ("frame_of", ONE.frame_of.long(), "^frame_of must be torch.int32"),
        ("frame_of", ONE.frame_of.to("meta"), "^frame_of must be on cpu, got meta"),
        ("frame_of", ONE.frame_of[::2], "^frame_of must be contiguous"),
        ("lane_pages", torch.ones(0, 3).int(), "^lane_pages must have at least one row"),
        ("lane_pages", torch.ones(4, 3), "^lane_pages must be int32 or int64"),
        ("lane_pages", torch.ones(3, 4).int().T, "^lane_pages must be contiguous in its last"),
        ("page_counts", torch.ones(3).int(), r"^page_counts must have shape \(4\)"),
        ("page_counts", torch.ones(4), "^page_counts must be int32 or int64"),
        ("page_counts", torch.ones(8).int()[::2], "^page_counts must be contiguous"),
        ("page_counts", torch.ones(4).int().to("meta"), "^page_counts must be on cpu, got meta"),
        ("lists", LISTS._replace(starts=torch.zeros(6).int()), r"^lists.starts must have shape"),
    ],
)
def test_bad_input_to_find_is_refused_by_name(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        find_frames(**{**finding(), name: wrong})


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("residency", ONE, r"^frame_of must have shape \(any, any\)"),
        ("pages", torch.tensor([[1]]), r"^pages must have shape \(any\)"),
        ("pages", torch.tensor([1.0]), "^pages must be int32 or int64"),
        ("pages", torch.tensor([1]).to("meta"), "^pages must be on cpu, got meta"),
        ("heat", torch.tensor([1, 2]), r"^heat must have shape \(1\)"),
        ("heat", torch.tensor([1.0]), r"^heat must be torch.int64 with shape \(1,\)"),
        ("heat", torch.tensor([1]).to("meta"), "^heat must be on cpu, got meta"),
        ("groups", 4, "^groups must divide"),
        ("evicting", -1, "^evicting must not be negative, got -1"),
    ],
)
def test_bad_input_to_claim_and_release_is_refused_by_name(name, wrong, message):
    arguments = {**claiming(), name: wrong}
    with pytest.raises(ValueError, match=message):
        claim_frames(**arguments)
    if name not in ("heat", "evicting"):
        with pytest.raises(ValueError, match=message):
            release_pages(arguments["residency"], arguments["pages"], groups=arguments["groups"])


@pytest.mark.parametrize("page", [-1, 10])
def test_ids_out_of_range_are_refused_in_debug_mode_alone(page, monkeypatch):
    """Looking at ids would stall the device; what stands beyond a row's end is nobody's id."""
    monkeypatch.setattr(checks, "DEBUG", True)
    arguments = resolving()
    resolve_pages(**arguments)
    arguments["lane_pages"][3, 1] = page
    with pytest.raises(ValueError, match=r"^lane_pages must hold ids from 0 to 9, got"):
        resolve_pages(**arguments)
    arguments = finding()
    arguments["lane_pages"][1, 0] = page
    find_frames(**arguments)
    arguments["lane_pages"][0, 2] = page
    with pytest.raises(ValueError, match=r"^lane_pages must hold ids from 0 to 9, got"):
        find_frames(**arguments)
    arguments = claiming()
    arguments["pages"][0] = min(page, 5)
    with pytest.raises(ValueError, match=r"^pages must hold ids from 0 to 4, got"):
        claim_frames(**arguments)
    with pytest.raises(ValueError, match=r"^pages must hold ids from 0 to 4, got"):
        release_pages(copy(ALL), arguments["pages"], groups=2)
    arguments = finding()
    arguments["page_counts"][2] = 4
    with pytest.raises(ValueError, match=r"^page_counts must hold ids from 0 to 3, got 0 to 4"):
        find_frames(**arguments)
    monkeypatch.setattr(checks, "DEBUG", False)
    arguments["page_counts"][2] = 1
    find_frames(**arguments)
