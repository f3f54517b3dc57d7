"""What FlashInfer is told, on a stand-in that takes notes: it runs on GPUs alone."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from arkvale_kernels.attend.flashinfer import AttentionShape, FlashInferDecode
from arkvale_sglang.runtime.attention import FlashInferAttention

SHAPE = AttentionShape(8, 2, 64, 16, torch.bfloat16, 0.125)


class Wrapper:
    def __init__(self, workspace, layout, **options):
        self.options, self.planned = options, []

    def plan(self, *arguments, **options):
        self.planned.append((*arguments, options))

    def run(self, query, cache):
        return query


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch):
    module = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)


def attention(groups=2):
    planner = FlashInferAttention(
        SHAPE, groups=groups, budget_pages=4, logical_pages=30, row_pages=9,
        device=torch.device("cpu"),
    )  # fmt: skip
    planner.fixed = True
    return planner


def test_lengths_become_pages_and_inert_rows_one_token():
    decode = FlashInferDecode(SHAPE, 4, 20, torch.empty(8, dtype=torch.uint8), fixed=True)
    decode.plan([33, 16, 0, 1])
    ends, indices, last, *heads, options = decode._wrapper.planned[-1]
    assert ends.tolist() == [0, 3, 4, 5, 6] and last.tolist() == [1, 16, 1, 1]
    assert heads == [8, 2, 64, 16] and options["sm_scale"] == 0.125
    assert indices.data_ptr() == decode.lists.indices.data_ptr(), "layers rewrite what it reads"
    assert decode._wrapper.options["paged_kv_indptr_buffer"] is decode.lists.starts
    with pytest.raises(ValueError, match="need 24 entries but the index buffer has 20"):
        decode.plan([16 * 24, 0, 0, 0][:1])
    with pytest.raises(ValueError, match="planned as"):
        decode.run(torch.zeros(4, 8, 64), torch.zeros(1), torch.zeros(1), 0.5)


def test_lanes_are_rows_with_fewer_heads_and_graphs_keep_their_buffers():
    planner = attention()
    first = planner.plan_lanes([40, 64], 0)
    ends, _, _, query_heads, kv_heads, *_ = first._wrapper.planned[-1]
    assert ends.tolist() == [0, 3, 6, 10, 14] and (query_heads, kv_heads) == (4, 1)
    assert planner.plan_lanes([1, 2], 0) is first, "a replay finds the buffers of its capture"
    assert planner.plan_lanes([1, 2, 3], 0) is not first
    assert planner.plan_lanes([1, 2], 1) is not first, "waves are planned side by side"


def test_rows_beyond_the_budget_have_buffers_that_hold_all_their_pages():
    """Two groups; 4 pages of budget, 9 at most: full rows are planned beside those that choose."""
    planner = attention()
    choosing, full = planner.plan_lanes([64, 64], 0), planner.plan_lanes([16 * 9, 16 * 8], 0)
    assert full is not choosing
    assert (choosing.lists.indices.numel(), full.lists.indices.numel()) == (4 * 4, 4 * 9)
    assert full._wrapper.planned[-1][0].tolist() == [0, 9, 18, 26, 34]


def test_dense_layers_list_the_pages_of_each_row():
    pages = torch.tensor([[5, 9, 2], [7, 99, 99], [99, 99, 99]], dtype=torch.int32)
    counts = torch.tensor([3, 1, 0], dtype=torch.int32)
    planner = attention()
    planned = planner._wrapper("dense", SHAPE, 3, 0, 9)
    planned.lists.starts.copy_(torch.tensor([0, 3, 4, 5]))
    assert planner.plan_dense([48, 16, 0], pages, counts) is planned
    assert planned.lists.indices[:5].tolist() == [5, 9, 2, 7, 0]
