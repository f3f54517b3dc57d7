"""The store: what a fresh one looks like, and that every kind of damage is reported by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from arkvale_kernels.layout import FREE, PINNED
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.core.store import PageStore

PAGES, FRAMES, GROUPS = 10, 4, 2
STRIDE = PAGES + 1


def build(dense_layers: int = 1) -> PageStore:
    """Two managed layers of two lanes; lane 0 of layer 1 holds pages 3 (sealed) and 7 (open),
    lane 1 holds page 7 (open)."""
    geometry = PageGeometry(
        page_size=16, layers=2 + dense_layers, dense_layers=dense_layers, kv_heads=4, head_dim=8,
        groups=GROUPS, dtype=torch.float16,
    )  # fmt: skip
    store = PageStore(PoolPlan(geometry, PAGES, FRAMES), "cpu")
    place(store, page=3, frame=1, heat=5 << 32)
    place(store, page=7, frame=2, heat=PINNED)
    place(store, page=STRIDE + 7, frame=FRAMES + 2, heat=PINNED)
    store.sealed[3] = True
    return store


def place(store: PageStore, *, page: int, frame: int, heat: int, layer: int = 1) -> None:
    store.residency.frame_of[layer, page] = frame
    store.residency.page_in[layer, frame] = page
    store.residency.heat[layer, frame] = heat


def test_a_healthy_store_has_no_violations():
    """Empty, in use, and after it forgot everything."""
    store = build()
    assert store.violations() == [] and store.frames_used() == 3
    store.reset()
    assert store.violations() == [] and store.frames_used() == 0
    assert (store.residency.frame_of == -1).all() and not store.sealed.any()
    assert (store.residency.heat[:, :-1] == FREE).all()


@pytest.mark.parametrize("dense_layers", [0, 1, 2])
def test_tensors_have_the_shapes_they_are_documented_with(dense_layers):
    """Lanes of a layer side by side, the scratch row behind the frames, host pages whole."""
    store = build(dense_layers)
    assert len(store.managed) == 2 and len(store.dense) == dense_layers
    for layer in store.managed:
        assert layer.k_frames.shape == layer.v_frames.shape == (GROUPS * FRAMES + 1, 16, 2, 8)
        assert layer.host.shape == (GROUPS * STRIDE, 2, 16, 2, 8)
        assert layer.digests.shape == (GROUPS * STRIDE, 2, 2, 8)
        assert layer.residency.frame_of.shape == (GROUPS * STRIDE,)
        assert layer.residency.page_in.shape == layer.residency.heat.shape == (GROUPS * FRAMES + 1,)
    for layer in store.dense:
        assert layer.k_frames.shape == layer.v_frames.shape == (STRIDE, 16, 4, 8)


def test_layers_are_views_so_that_ops_change_the_store():
    """A write through one layer shows in the stacked tensor and in no other layer."""
    store = build()
    store.managed[0].k_frames[2] = 1.0
    store.managed[0].residency.heat[3] = 77
    assert store.k_frames[0, 2].eq(1).all() and not store.k_frames[1].any()
    assert store.residency.heat[0, 3] == 77 and store.residency.heat[1, 3] == FREE


def test_all_memory_starts_as_zeros():
    """Frames and digests are read before they are written: masked, but never as NaN."""
    store = build()
    parts = [store.k_frames, store.v_frames, store.digests, store.host]
    parts += [part for layer in store.dense for part in layer]
    assert not any(part.any() for part in parts)


def page_holds_a_frame_of_another_page(store):
    store.residency.page_in[1, 1] = 4


def frame_is_forgotten_by_its_page(store):
    store.residency.frame_of[1, 3] = -1


def two_pages_hold_one_frame(store):
    store.residency.frame_of[1, 4] = 1


def page_holds_a_frame_of_another_lane(store):
    place(store, page=5, frame=FRAMES + 1, heat=PINNED)


def free_frame_holds_a_page(store):
    store.residency.heat[1, 1] = FREE


def empty_frame_is_not_free(store):
    store.residency.heat[0, 0] = 8 << 32


def scratch_row_may_be_claimed(store):
    store.residency.heat[0, -1] = FREE


def scratch_row_holds_a_page(store):
    store.residency.page_in[1, -1] = 5


def padding_page_holds_a_frame(store):
    place(store, page=0, frame=0, heat=PINNED)


def padding_page_of_another_lane_holds_a_frame(store):
    place(store, page=STRIDE, frame=FRAMES, heat=PINNED)


def open_page_may_be_evicted(store):
    store.residency.heat[1, 2] = 9 << 32


def sealed_page_is_pinned(store):
    store.residency.heat[1, 1] = PINNED


def page_is_sealed_that_is_pinned(store):
    store.sealed[7] = True


def padding_page_is_sealed(store):
    store.sealed[0] = True


def plan_speaks_of_other_frames(store):
    store.plan = dataclasses.replace(store.plan, frames=FRAMES + 1)


def used_frame_counts_as_neither(store):
    store.residency.heat[0, 3] = 8 << 32


def used_frame_counts_as_both(store):
    store.residency.heat[1, FRAMES + 2] = FREE


def page_holds_a_frame_that_does_not_exist(store):
    store.residency.frame_of[1, 3] = GROUPS * FRAMES + 50


UNPAIRED = "layer 1: frames and pages are not paired one to one"
DAMAGE = {
    page_holds_a_frame_of_another_page: "layer 1: a page's frame does not hold that page",
    frame_is_forgotten_by_its_page: UNPAIRED,
    two_pages_hold_one_frame: UNPAIRED,
    page_holds_a_frame_of_another_lane: "layer 1: a page holds a frame of another lane",
    free_frame_holds_a_page: "layer 1: a free frame holds a page or a used one is free",
    empty_frame_is_not_free: "layer 0: a free frame holds a page or a used one is free",
    scratch_row_may_be_claimed: "layer 0: the scratch row is in use",
    scratch_row_holds_a_page: "layer 1: the scratch row is in use",
    padding_page_holds_a_frame: "layer 1: the padding page holds a frame",
    padding_page_of_another_lane_holds_a_frame: "layer 1: the padding page holds a frame",
    open_page_may_be_evicted: "layer 1: an open page may be evicted or a sealed one may not",
    sealed_page_is_pinned: "layer 1: an open page may be evicted or a sealed one may not",
    page_is_sealed_that_is_pinned: "layer 1: an open page may be evicted or a sealed one may not",
    padding_page_is_sealed: "the padding page is sealed",
    plan_speaks_of_other_frames: "layer 0: frames used and free do not add up",
    used_frame_counts_as_neither: "layer 0: frames used and free do not add up",
    used_frame_counts_as_both: "layer 1: frames used and free do not add up",
    page_holds_a_frame_that_does_not_exist: "layer 1: a page's frame does not hold that page",
}


@pytest.mark.parametrize(
    "damage, sentence", DAMAGE.items(), ids=[damage.__name__ for damage in DAMAGE]
)
def test_damage_is_reported_by_name(damage, sentence):
    """One broken entry, and the report names the law and the layer."""
    store = build()
    damage(store)
    assert sentence in store.violations()


def test_pages_that_died_must_have_left():
    """A caller that knows which pages live learns of others that are resident or sealed."""
    store = build()
    assert store.violations({3, 7}) == store.violations({3, 7, 9}) == []
    assert store.violations({3}) == ["a resident page is not live"]
    store.sealed[8] = True
    assert store.violations({3, 7}) == ["a sealed page is not live"]


def test_damage_of_one_layer_is_not_blamed_on_another():
    """Each layer is judged alone."""
    store = build()
    open_page_may_be_evicted(store)
    assert all(found.startswith("layer 1:") for found in store.violations())
