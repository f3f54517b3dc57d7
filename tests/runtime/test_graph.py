"""Steps over a graph's fixed buffers do what steps planned on the spot do."""

from __future__ import annotations

import copy

import pytest
import torch

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.runtime import decode
from arkvale_sglang.runtime.graph import DecodeGraph
from support.engine import FakeEngine

PADDING = 3


def twins(prompts, *, frames, budget, groups=1):
    """Two engines in the same state, and their rows."""
    config = ArkValeConfig(
        page_size=16, budget=16 * budget, head_groups=groups, dense_layers=1, top_k=16
    )
    fakes = [FakeEngine(config, pages=60, frames=frames, layers=3, seed=5) for _ in range(2)]
    for fake in fakes:
        for tokens in prompts:
            fake.extend({fake.add_row(): tokens})
    return fakes


def planned(fake: FakeEngine, rows: list[int], padding: int):
    lengths = [fake.rows[row].tokens for row in rows] + [0] * padding
    indices = torch.tensor(rows + [0] * padding)
    return decode.plan_decode(fake.cache, fake.slots, indices, torch.tensor(lengths), lengths)


def outputs(fake: FakeEngine, step, inputs):
    rows = step.lengths.shape[0]
    query, k, v = (
        torch.nn.functional.pad(part, (0, 0, 0, 0, 0, rows - len(part))) for part in inputs
    )
    results = [decode.decode_dense(fake.cache.store.dense[0], step, query, k, v, fake.scaling)]
    for layer in range(fake.geometry.managed_layers):
        results.append(decode.decode_managed(fake.cache, layer, step, query, k, v, fake.scaling))
    return results


@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
@pytest.mark.parametrize(
    "prompts, frames, budget, calm",
    [([30, 77, 160], 60, 20, True), ([30, 77, 160], 60, 20, False), ([200, 20, 300], 24, 8, False)],
    ids=["calm", "calm-in-the-general-graph", "over-budget"],
)
def test_replayed_steps_equal_eager_ones(prompts, frames, budget, calm, groups):
    """Padded with inert rows, in buffers that hold what longer rows left."""
    eager, graphed = twins(prompts, frames=frames, budget=budget, groups=groups)
    rows = list(range(len(prompts)))
    graph = DecodeGraph(graphed.cache, len(rows) + PADDING, 60)
    for values in vars(graph).values():
        if isinstance(values, torch.Tensor):
            values.fill_(11)
    seen = {}
    for _ in range(20):
        for fake in (eager, graphed):
            for row in rows:
                fake._grow(row, 1)
        inputs = [
            torch.randn(len(rows), heads, eager.geometry.head_dim)
            for heads in (eager.query_heads, *[eager.geometry.kv_heads] * 2)
        ]
        expected = outputs(eager, planned(eager, rows, 0), inputs)
        step = graph.load(planned(graphed, rows, PADDING), calm=calm)
        for name in ("pages", "lengths", "slots", "open_lane_pages", "offsets"):
            address = getattr(step, name).data_ptr()
            assert seen.setdefault(name, address) == address, "a graph reads fixed addresses"
        for found, wanted in zip(outputs(graphed, step, inputs), expected, strict=True):
            torch.testing.assert_close(found[: len(rows)], wanted, rtol=0, atol=1e-6)
        for fake in (eager, graphed):
            assert fake.cache.store.violations() == []
    reports = [fake.cache.report() for fake in (eager, graphed)]
    for name in ("pages_sealed", "pages_recalled", "pages_evicted", "pages_refused"):
        assert reports[0][name] == reports[1][name], name
    assert (reports[0]["pages_recalled"] > 0) == (budget == 8)


def test_a_step_that_chooses_is_not_replayed_as_a_calm_one():
    fake, _ = twins([300], frames=24, budget=8)
    fake._grow(0, 1)
    step = planned(fake, [0], 0)
    assert not step.calm
    with pytest.raises(RuntimeError, match="not planned for the graph"):
        DecodeGraph(fake.cache, 1, 60).load(step, calm=True)


def test_passes_that_warm_up_on_the_padding_page_leave_no_trace():
    """A server runs dummy batches before the first request, all on slot 0."""
    fake, _ = twins([], frames=24, budget=8)
    before = copy.deepcopy(fake.cache.store.residency)
    for length in (1, 16, 17):
        step = decode.plan_decode(
            fake.cache, torch.zeros_like(fake.slots), torch.tensor([0, 0]),
            torch.tensor([length, length + 1]), [length, length + 1],
        )  # fmt: skip
        inputs = [torch.randn(2, heads, 8) for heads in (4, 2, 2)]
        outputs(fake, step, inputs)
    assert fake.cache.store.violations() == []
    for table, was in zip(fake.cache.store.residency, before, strict=True):
        assert torch.equal(table[:, :-1], was[:, :-1])
