"""Ranks of a server plan the same sizes, whatever each of them measured."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.sizing import GIB, Memory
from arkvale_sglang.integration import ranks, scheduler
from arkvale_sglang.policy.admission import FrameAdmission

CONFIG = ArkValeConfig(budget=512, dense_layers=1, head_groups=2)
MEASURED = ((6 * GIB, 9 * GIB), (5 * GIB, 11 * GIB))
"""Device and host bytes that each rank finds free."""


class Model(SimpleNamespace):
    """What SGLang says of a model of 4 KV heads."""

    def get_num_kv_heads(self, tp_size: int) -> int:
        return max(1, 4 // tp_size)


def plan_on(rank: int, store: str, answers, device: str) -> None:
    """Size the pools of one rank, as SGLang asks for it: twice."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    group = SimpleNamespace(world_size=2, cpu_group=dist.group.WORLD)
    ranks.parallel_state.get_tp_group = lambda: group
    ranks.get_cpu_ids_by_node = lambda: ["0,1"]
    kvc = SimpleNamespace(
        model_config=Model(dtype=torch.bfloat16, head_dim=64), device=device,
        layer_info=SimpleNamespace(num_effective_layers=4), kv_cache_dtype=torch.bfloat16,
    )  # fmt: skip
    wiring = scheduler.Wiring(CONFIG)
    available, wiring.host_free = MEASURED[rank]
    for _ in range(2):
        configurator = scheduler.Configurator(wiring, kvc)
        tokens = configurator.calculate_pool_sizes(available, 32).max_total_num_tokens
    admission = FrameAdmission(CONFIG, wiring.plan)
    answers.put(
        (rank, tokens, wiring.plan.logical_pages, wiring.plan.frames, admission.promised,
         admission.most_requests, wiring.plan.host_bytes)
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_that_measure_different_memory_plan_the_same(device, tmp_path):
    """Half of 9 GiB of host memory between two ranks, or half of what each has of 5 GiB that are
    both host and device."""
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    workers = [
        fork.Process(target=plan_on, args=(rank, str(tmp_path / "store"), answers, device))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        found = sorted(answers.get(timeout=60) for _ in workers)
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    (_, *first), (_, *second) = found
    assert first == second
    tokens, pages, frames, *_, host_bytes = first
    share = (9 * GIB if device == "cuda" else 5 * GIB) // 2 // 2
    page = 32 * 2 * 2 * 64 * 2 * 3  # tokens, K and V, 2 heads of 64, bfloat16, managed layers
    assert share - page < host_bytes <= share and tokens == 32 * pages and frames > 0


def test_one_rank_keeps_what_it_measured(monkeypatch):
    monkeypatch.setattr(ranks.parallel_state, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    assert ranks.agree(5, 7, True) == Memory(5, 7, True)


@pytest.mark.parametrize(("nodes", "device"), [(1, 25), (2, 50), (3, 50), (4, 100)])
def test_ranks_on_one_node_of_a_cpu_divide_its_memory(nodes, device, monkeypatch):
    """SGLang counts all that is free on a node for each rank."""
    group = SimpleNamespace(world_size=4, cpu_group=None)
    monkeypatch.setattr(ranks.parallel_state, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(ranks, "get_cpu_ids_by_node", lambda: ["0"] * nodes)
    assert ranks.agree(100, 900, shared=True) == Memory(device, 900, True, 4)
    assert ranks.agree(100, 900, shared=False) == Memory(100, 900, False, 4)
