"""On which machines our CPU platform stands in, and where SGLang's own stays."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from arkvale_sglang.integration import cpu_platform

OURS = "arkvale_sglang.integration.cpu_platform:CpuPlatform"


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)


def test_a_plain_cpu_gets_the_platform():
    assert cpu_platform.activate() == OURS


@pytest.mark.parametrize(("value", "ours"), [("1", None), ("0", OURS)])
def test_sglangs_cpu_engine_is_left_alone_where_it_is_asked_for(monkeypatch, value, ours):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", value)
    assert cpu_platform.activate() == ours


@pytest.mark.parametrize("ops", [["convert_weight_packed"], []], ids=["cpu", "cuda"])
def test_cpu_kernels_keep_us_out_and_a_cuda_wheel_without_gpu_does_not(monkeypatch, ops):
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(
        torch.ops.__dict__, "sgl_kernel", SimpleNamespace(**dict.fromkeys(ops, print))
    )
    assert cpu_platform.activate() == (None if ops else OURS)


def test_any_accelerator_keeps_us_out(monkeypatch):
    """Ones that torch knows by name, and ones that register themselves."""
    monkeypatch.setattr(torch, "npu", SimpleNamespace(), raising=False)
    assert cpu_platform.activate() is None
    monkeypatch.delattr(torch, "npu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert cpu_platform.activate() is None
