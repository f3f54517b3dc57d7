"""Hooks of the scheduler process, called as SGLang calls them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_policy import AddReqResult

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.integration import compat, scheduler
from arkvale_sglang.integration.cpu_allocator import CpuPagedAllocator
from arkvale_sglang.integration.pool import allocator_class
from arkvale_sglang.policy.admission import FrameAdmission

SIZE, FRAMES, BUDGET = 16, 20, 6


class Passes:
    """A waiting queue and SGLang's adder around our hook: 20 frames, 6 pages of budget."""

    def __init__(self, frames: int = FRAMES):
        config = ArkValeConfig(page_size=SIZE, budget=SIZE * BUDGET, sink_pages=1, window_pages=1)
        geometry = PageGeometry(
            page_size=SIZE, layers=3, dense_layers=2, kv_heads=1, head_dim=8, groups=1,
            dtype=torch.float32,
        )  # fmt: skip
        self.wiring = scheduler.Wiring(config)
        admission = FrameAdmission(config, PoolPlan(geometry, 100, frames))
        self.wiring.pool = SimpleNamespace(cache=SimpleNamespace(admission=admission))
        self.running: list[SimpleNamespace] = []

    def admit(self, waiting, ratio: float = 0.0) -> list[SimpleNamespace]:
        """One pass over the queue; those that joined then run."""
        batch = SimpleNamespace(reqs=self.running)
        adder = SimpleNamespace(running_batch=batch, can_run_list=[], new_token_ratio=ratio)

        def add_one_req(adder, req, has_chunked_req, truncation_align_size):
            adder.can_run_list.append(req)
            return AddReqResult.CONTINUE

        for req in waiting:
            answer = self.wiring.add_request(
                add_one_req, adder, req, has_chunked_req=False, truncation_align_size=None
            )
            if answer != AddReqResult.CONTINUE:
                assert answer == AddReqResult.OTHER, "NO_TOKEN would mark the batch full"
                break
        self.running = [*self.running, *adder.can_run_list]
        return adder.can_run_list


def request(
    prompt: int, *, generated: int = 0, limit: int = 0, wishes: dict | None = None
) -> SimpleNamespace:
    return SimpleNamespace(
        origin_input_ids=[1] * prompt, output_ids=[1] * generated,
        sampling_params=SimpleNamespace(max_new_tokens=limit, custom_params={"arkvale": wishes}),
    )  # fmt: skip


def test_the_hook_point_is_what_we_think_it_is():
    assert compat.problem(compat.ADD_REQUEST) is None


def test_a_burst_of_short_chats_is_bounded_by_what_it_asks_for():
    """One page each, not a whole budget each."""
    assert len(Passes().admit([request(10) for _ in range(30)])) == FRAMES


def test_short_requests_join_once_they_are_first_though_a_long_one_did_not_fit():
    """No request has left in between: nothing may remember that the batch was full."""
    passes = Passes()
    assert len(passes.admit([request(1000) for _ in range(4)])) == 3
    assert passes.admit([request(1000), request(10)]) == [], "the queue keeps its order"
    assert len(passes.admit([request(10), request(10), request(10)])) == 2


def test_growth_counts_by_the_share_that_the_engine_expects():
    """15 tokens and 80 more to generate: 1 page now, 6 at full length, 4 at half of it."""
    waiting = [request(15, limit=80) for _ in range(30)]
    assert [len(Passes().admit(waiting, ratio)) for ratio in (0.0, 0.5, 1.0)] == [20, 5, 3]
    waiting = [request(15, generated=80, limit=80) for _ in range(30)]
    assert len(Passes().admit(waiting, 1.0)) == 3


def test_each_counts_by_its_own_settings():
    """20 frames: 3 at the server's budget of 6 pages, 5 at half of it, and 20 that are full."""
    small, full = {"budget": 4 * SIZE}, {"policy": "full"}
    for wishes, most in ((None, 3), (small, 5), (full, 20)):
        assert len(Passes().admit([request(1000, wishes=wishes) for _ in range(30)])) == most
    mixed = [request(1000, wishes=wishes) for wishes in (None, small, full, None, *[full] * 4)]
    assert len(Passes().admit(mixed)) == 7


def test_growth_of_each_retracts_by_its_own_settings():
    """Two at the server's budget and one that is full leave 7 of 20 frames to short ones."""
    wiring = Passes().wiring
    running = [request(1000), request(1000), request(1000, wishes={"policy": "full"})]
    for short, enough in ((7, True), (8, False)):
        batch = SimpleNamespace(reqs=[*running, *[request(3) for _ in range(short)]])
        assert wiring.check_decode_memory(lambda *_, **__: True, batch) is enough
    assert wiring.check_decode_memory(lambda *_, **__: True, batch, [0, 1, 2]) is True
    assert wiring.check_decode_memory(lambda *_, **__: False, batch, [0]) is False


def test_an_idle_server_admits_any_request():
    assert len(Passes(frames=BUDGET + 1).admit([request(10**5, limit=10**5)], 1.0)) == 1


def test_frames_for_everything_admit_everything():
    assert len(Passes(frames=100).admit([request(1000) for _ in range(50)])) == 50


@pytest.mark.parametrize(
    ("plain_cpu", "tp_size", "adjusted"), [(True, 2, True), (True, 4, False), (False, 4, True)]
)
def test_heads_are_padded_only_where_that_can_be_loaded(monkeypatch, plain_cpu, tp_size, adjusted):
    """Two heads, which two ranks share without padding."""
    platform = SimpleNamespace(is_out_of_tree=lambda: plain_cpu)
    monkeypatch.setattr(scheduler, "current_platform", platform)
    model = SimpleNamespace(get_num_kv_heads=lambda ranks: 2)
    asked = []
    result = scheduler._heads_as_they_are(lambda *args: asked.append(args), model, None, tp_size)
    assert bool(asked) == adjusted
    assert result is (None if adjusted else model)


@pytest.mark.parametrize("pages", [1, 3])
def test_live_pages_are_those_handed_out(pages):
    """By number as by count, and pages freed are no longer among them."""
    cache = SimpleNamespace(release=lambda pages: None, reset=lambda: None, live_pages=None)
    pool = SimpleNamespace(cache=cache)
    allocator = allocator_class(CpuPagedAllocator)(
        8 * SIZE, page_size=SIZE, dtype=torch.float32, device="cpu", kvcache=pool, need_sort=False
    )
    slots = allocator.alloc(pages * SIZE)
    assert allocator.live_page_ids() == set((slots // SIZE).tolist())
    assert len(allocator.live_page_ids()) == allocator.live_pages() == pages
    allocator.free(slots)
    assert allocator.live_page_ids() == set()
