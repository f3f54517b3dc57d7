"""Sizing: plans stay within the memory named, use it up, and refuse what cannot work."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import GIB, Memory, PoolPlan, plan_pool
from arkvale_sglang.core.store import PageStore

MIB = 1 << 20


def geometry(**changes) -> PageGeometry:
    """4 layers, 1 dense, 4 KV heads of 64 in bfloat16: 16 KiB a page in one layer."""
    base = PageGeometry(
        page_size=16, layers=4, dense_layers=1, kv_heads=4, head_dim=64, groups=1,
        dtype=torch.bfloat16,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def config(**values) -> ArkValeConfig:
    return ArkValeConfig(**{"page_size": 16, "budget": 16 * 8, "dense_layers": 1, **values})


def memory(device=64 * MIB, host_free=256 * MIB, shared=False) -> Memory:
    return Memory(device=device, host_free=host_free, shared=shared)


def refusal(*arguments) -> str:
    """The message of a plan that must fail: one sentence with a remedy."""
    with pytest.raises(ArkValeError) as caught:
        plan_pool(*arguments)
    message = str(caught.value)
    assert message.endswith(".") and "; " in message and "\n" not in message
    return message


@pytest.mark.parametrize("groups", [1, 2, 4], ids="groups{}".format)
def test_bytes_of_a_page_are_what_arithmetic_says(groups):
    """K and V of 16 tokens, 4 heads of 64, 2 bytes each: 16 KiB in each of 3 managed layers, in
    however many lanes it is cut; two digest vectors stand for each 16 tokens."""
    shape = geometry(groups=groups)
    assert (shape.managed_layers, shape.lanes, shape.lane_heads) == (3, 3 * groups, 4 // groups)
    assert shape.lane_page_bytes == 16384 // groups
    assert (shape.page_host_bytes, shape.page_dense_bytes) == (3 * 16384, 16384)
    assert shape.page_digest_bytes == 3 * 1024
    assert shape.page_table_bytes == 4 * 3 * groups + 1
    assert shape.frame_bytes == 3 * 16384 + 12 * 3 * groups


@pytest.mark.parametrize("groups", [1, 4], ids="groups{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_promises_the_bytes_that_the_store_takes(groups, dtype):
    """Up to the two table entries of the scratch row, 12 bytes a layer, which no plan counts."""
    plan = PoolPlan(geometry(groups=groups, dtype=dtype), logical_pages=20, frames=7)
    store = PageStore(plan, "cpu")
    assert plan.host_bytes == store.host.nbytes
    assert plan.digest_bytes == store.digests.nbytes
    assert plan.dense_bytes == sum(part.nbytes for layer in store.dense for part in layer)
    tables = sum(table.nbytes for table in store.residency[1:])
    frames = store.k_frames.nbytes + store.v_frames.nbytes + tables
    assert plan.frame_bytes == frames - 12 * plan.geometry.managed_layers
    per_page = store.residency.frame_of.nbytes + store.sealed.nbytes
    assert plan.device_bytes == (
        plan.digest_bytes + plan.dense_bytes + plan.frame_bytes + per_page + plan.staging_bytes
    )


def test_staging_holds_two_blocks_of_one_layer():
    """8192 tokens, K and V, 4 heads of 64, 2 bytes: 8 MiB a block, whatever the groups."""
    for groups in (1, 2, 4):
        assert PoolPlan(geometry(groups=groups), 100, 10).staging_bytes == 16 * MIB


@settings(max_examples=150, deadline=None)
@given(
    device=st.integers(8 * MIB, 200 * MIB),
    host_free=st.integers(1 * MIB, 400 * MIB),
    shared=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    dense=st.integers(0, 3),
    host_memory=st.none() | st.floats(0.001, 0.4),
    device_tokens=st.none() | st.integers(16, 4000),
    max_tokens=st.none() | st.integers(16, 10**5),
)
def test_a_plan_stays_within_memory_and_leaves_no_room_for_another_frame(
    device, host_free, shared, groups, dense, host_memory, device_tokens, max_tokens
):
    """Whatever is named: a plan is kept or refused, and frames are as many as fit."""
    options = config(host_memory=host_memory, device_tokens=device_tokens, head_groups=groups)
    shape = geometry(groups=groups, dense_layers=dense)
    try:
        plan = plan_pool(options, shape, memory(device, host_free, shared), max_tokens)
    except ArkValeError:
        assume(False)
    room = device - (plan.host_bytes if shared else 0)
    assert plan.device_bytes <= room
    assert plan.logical_pages >= 1 and 1 <= plan.frames <= plan.logical_pages
    assert plan.host_bytes <= (host_free if host_memory or not shared else device)
    if host_memory is not None:
        assert plan.host_bytes <= host_memory * GIB
    if max_tokens is not None:
        assert plan.logical_tokens <= max_tokens
    if device_tokens is not None:
        assert plan.frames == min(device_tokens // 16, plan.logical_pages)
    elif not plan.fits:
        assert plan.device_bytes + shape.frame_bytes > room
    assert plan.fits or plan.frames >= options.budget_pages + 1


def test_host_memory_sets_the_logical_pages_and_the_padding_page_is_paid_for():
    """10 MiB hold 213 pages of 48 KiB, of which one is padding."""
    plan = plan_pool(config(host_memory=10 / 1024), geometry(), memory())
    assert plan.logical_pages == 10 * MIB // (48 * 1024) - 1
    assert plan.logical_tokens == plan.logical_pages * 16


@pytest.mark.parametrize("host_memory", [10 / 1024, None], ids=["named", "half of what is free"])
def test_ranks_share_the_host_memory_of_the_server(host_memory):
    """Each has half of the heads, so pages of half the bytes, and as many of them as one rank."""
    options, device = config(host_memory=host_memory), 64 * MIB
    alone = plan_pool(options, geometry(), Memory(device, 30 * MIB, False))
    each = plan_pool(options, geometry(kv_heads=2), Memory(device, 30 * MIB, False, ranks=2))
    assert each.logical_pages == alone.logical_pages == (213 if host_memory else 320) - 1
    assert 2 * each.host_bytes == alone.host_bytes


def test_more_host_memory_than_is_free_is_refused_by_what_the_ranks_hold_together():
    options = config(host_memory=30 / 1024)
    message = refusal(options, geometry(), Memory(64 * MIB, 20 * MIB, False, ranks=2))
    assert "--arkvale-host-memory asks for 0.0292969 GiB" in message
    options = config(host_memory=150 / 1024**2)
    message = refusal(options, geometry(), Memory(64 * MIB, GIB, False, ranks=2))
    assert "0.0001 GiB of host memory on each of 2 ranks holds no page" in message


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_a_rank_has_its_share_of_the_heads_or_a_copy_of_one(ranks, heads):
    shape = functools.partial(
        PageGeometry.of, config(), layers=4, kv_heads=4, head_dim=64, dtype=torch.bfloat16
    )
    assert shape(ranks=ranks).kv_heads == heads
    with pytest.raises(ArkValeError, match=r"--tp-size 3 .* a divisor or a multiple of 4"):
        shape(ranks=3)


def test_max_total_tokens_caps_the_logical_pages():
    """The engine's own limit in tokens wins over memory, rounded down to pages."""
    assert plan_pool(config(), geometry(), memory(), 1000).logical_pages == 62


def test_a_cache_that_fits_needs_no_frame_beyond_its_pages():
    """Frames never exceed logical pages, and then nothing is ever evicted."""
    plan = plan_pool(config(), geometry(), memory(), 20 * 16)
    assert (plan.logical_pages, plan.frames, plan.fits) == (20, 20, True)
    tight = plan_pool(config(device_tokens=16 * 9), geometry(), memory(), 20 * 16)
    assert (tight.frames, tight.fits) == (9, False)


def test_the_start_up_line_names_pages_tokens_frames_and_lanes():
    """What an operator needs to see once."""
    line = PoolPlan(geometry(groups=2), 100, 10).describe()
    for part in ("100 logical pages of 16 tokens", "1600 tokens", "10 frames in each of 6 lanes"):
        assert part in line
    assert "\n" not in line


def test_more_host_memory_than_is_free_is_refused():
    """Naming what was asked, what there is, and the flag."""
    message = refusal(config(host_memory=1.0), geometry(), memory(host_free=GIB // 2))
    assert "--arkvale-host-memory asks for 1 GiB" in message and "0.5 GiB free" in message


def test_host_memory_below_one_page_is_refused():
    """One page and the padding page take 96 KiB."""
    message = refusal(config(host_memory=90 / 1024**2), geometry(), memory())
    assert "no page" in message and "49152 bytes" in message
    assert "raise --arkvale-host-memory" in message
    options = config(host_memory=96 / 1024**2, device_tokens=16)
    assert plan_pool(options, geometry(), memory()).logical_pages == 1


def test_a_token_limit_below_one_page_is_refused_by_its_own_name():
    """Host memory is plentiful there, so raising it would not help."""
    message = refusal(config(), geometry(), memory(), 15)
    assert "--max-total-tokens" in message and "host-memory" not in message


def test_a_device_too_small_for_any_page_is_refused_by_its_own_name():
    """The pages' digests and tables live on the device; more host memory would not help."""
    message = refusal(config(), geometry(), memory(device=20_000))
    assert "device memory" in message and "raise --arkvale-host-memory" not in message


def test_a_model_of_dense_layers_only_is_refused():
    """There would be nothing left to manage."""
    message = refusal(config(), geometry(dense_layers=4), memory())
    assert "--arkvale-dense-layers 4" in message and "below 4" in message


def test_groups_that_do_not_divide_the_heads_are_refused():
    """Every lane must hold the same number of heads."""
    message = refusal(config(head_groups=3), geometry(), memory())
    assert "--arkvale-head-groups 3" in message and "divisor of 4" in message


def test_a_pool_larger_than_the_device_is_refused_with_its_parts():
    """Device tokens are the user's word, so they are not lowered silently."""
    message = refusal(config(device_tokens=16 * 2000), geometry(), memory())
    assert "device memory" in message and "0.06 GiB are left" in message
    for flag in ("--arkvale-host-memory", "--arkvale-device-tokens", "--arkvale-dense-layers"):
        assert flag in message.partition("; ")[2]


def test_frames_for_less_than_one_request_are_refused_with_the_least_that_works():
    """A budget of 8 pages and the page being written by a prefill: 9 frames."""
    message = refusal(config(device_tokens=16 * 8), geometry(), memory())
    assert "at least 144" in message and "128 budget tokens" in message
    assert plan_pool(config(device_tokens=144), geometry(), memory()).frames == 9
