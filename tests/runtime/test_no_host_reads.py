"""A decode step never reads device data on the host, or it could not be captured in a graph."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.runtime import attention, decode, prefix, streams
from arkvale_sglang.runtime import cache as cache_module
from arkvale_sglang.runtime.watch import PageStates
from support.engine import FakeEngine

aten = torch.ops.aten
READING_OPS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten.bincount,
}  # fmt: skip
"""Ops whose result, or its shape, the host learns from the data."""
INDEXING_OPS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
READING_METHODS = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__,
}  # fmt: skip
"""Reads that reach no op where the device is the host already."""


class HostRead(AssertionError):
    """Names the op that read."""


class _Ops(TorchDispatchMode):
    """Raises on ops that read, and on indexing by a boolean mask, which counts it."""

    def __init__(self):
        super().__init__()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        # repeat_interleave by a number is plain arithmetic and never arrives here as that op.
        reads = packet in READING_OPS
        if packet in INDEXING_OPS:
            masks = (torch.bool, torch.uint8)
            reads = any(index is not None and index.dtype in masks for index in args[1])
        if reads and not self.paused:
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Raises on methods that hand data to Python without an op."""

    def __init__(self, ops: _Ops):
        super().__init__()
        self._ops = ops

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING_METHODS and not self._ops.paused:
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch):
    """Forbid host reads in the runtime; the ops it calls are excused, since their references are
    what device kernels replace."""
    ops = _Ops()

    def excused(function):
        def call(*args, **kwargs):
            ops.paused = True
            try:
                return function(*args, **kwargs)
            finally:
                ops.paused = False

        return call

    with monkeypatch.context() as patch, _Methods(ops), ops:
        for module in (decode, cache_module, attention, prefix, streams):
            for name, value in list(vars(module).items()):
                is_function = isinstance(value, types.FunctionType)
                if is_function and value.__module__.startswith("arkvale_kernels"):
                    patch.setattr(module, name, excused(value))
        yield


READS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.any()),
    "int": lambda t: int(t.sum()),
    "index": lambda t: [0, 1, 2, 3, 4][t[1].long()],
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "cpu": lambda t: t.cpu(),
    "nonzero": lambda t: t.nonzero(),
    "masked_select": lambda t: t.masked_select(t > 1),
    "mask": lambda t: t[t > 1],
    "mask-write": lambda t: t.clone().__setitem__(t > 1, 0),
    "where": lambda t: torch.where(t > 1),
    "unique": lambda t: t.unique(),
    "equal": lambda t: torch.equal(t, t + 1),
    "repeat": lambda t: t.repeat_interleave(t.long()),
    "iterate": lambda t: [float(value) for value in t],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_the_guard_catches_a_read(read, monkeypatch):
    """Else the tests below would prove nothing."""
    numbers = torch.arange(4)
    read(numbers)
    with pytest.raises(HostRead), no_host_reads(monkeypatch):
        read(numbers)


def decode_once(
    fake: FakeEngine,
    rows: list[int],
    monkeypatch: pytest.MonkeyPatch,
    settings: list[ArkValeConfig] | None = None,
):
    """One decode step of all managed layers under the guard."""
    for row in rows:
        fake._grow(row, 1)
    lengths = [fake.rows[row].tokens for row in rows]
    heads = [fake.query_heads, *[fake.geometry.kv_heads] * 2]
    inputs = [torch.randn(len(rows), count, fake.geometry.head_dim) for count in heads]
    tables = torch.tensor(rows), torch.tensor(lengths)
    with no_host_reads(monkeypatch):
        step = decode.plan_decode(fake.cache, fake.slots, *tables, lengths, settings)
        for layer in range(fake.geometry.managed_layers):
            decode.decode_managed(fake.cache, layer, step, *inputs, fake.scaling)
        # What looks at the cache after a pass is queued behind it and must not wait either.
        fake.cache.snapshots.take(0.0)
        states = PageStates(fake.cache)
        states.note()
        assert states.of_step(step, [-(-length // 16) for length in lengths]) is not None
    return step


@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
@pytest.mark.parametrize(
    "frames, budget, prompts, waves",
    [(40, 20, [30, 30], 1), (40, 20, [30, 77, 160], 1), (14, 6, [200, 20, 15], 1),
     (14, 10, [135, 135, 135], 3)],
    ids=["same-length", "ragged", "over-budget", "in-turns"],
)  # fmt: skip
@pytest.mark.parametrize("reduce, cap", [("mean", None), ("softmax-mean", 1)], ids=str)
def test_a_decode_step_reads_nothing(
    frames, budget, prompts, waves, groups, reduce, cap, monkeypatch
):
    """Twenty steps each: pages fill, are sealed, open, are evicted and recalled, and die."""
    config = ArkValeConfig(
        page_size=16, budget=16 * budget, head_groups=groups, head_reduce=reduce, recall_cap=cap,
        dense_layers=0, oversubscription=4.0,
    )  # fmt: skip
    fake = FakeEngine(config, pages=40, frames=frames, layers=2)
    rows = [fake.add_row() for _ in prompts]
    for row, tokens in zip(rows, prompts, strict=True):
        fake.extend({row: tokens})
    spare = fake.add_row()
    fake.extend({spare: 1})
    fake.free(spare)
    seen = []
    for _ in range(20):
        step = decode_once(fake, rows, monkeypatch)
        assert len(step.waves) == waves
        seen.append(bool((step.offsets == config.page_size - 1).any()))
    assert any(seen) and not all(seen), "pages were sealed and opened on the way"
    assert fake.cache.store.violations() == []


@pytest.mark.parametrize("frames", [90, 14], ids=["calm", "pressed"])
def test_a_step_of_rows_that_are_full_reads_nothing(frames, monkeypatch):
    config = ArkValeConfig(page_size=16, budget=16 * 6, dense_layers=0, head_groups=2)
    fake = FakeEngine(config, pages=90, frames=frames, layers=2)
    settings = [config.for_request({"policy": "full"})] * 2 + [config]
    rows = [fake.add_row() for _ in settings]
    for row, tokens in zip(rows, [200, 300, 190], strict=True):
        fake.extend({row: tokens}, [settings[row]])
    for _ in range(3):
        step = decode_once(fake, rows, monkeypatch, settings)
        assert [wave.sequences is not None for wave in step.waves] == [frames < 90, False]
