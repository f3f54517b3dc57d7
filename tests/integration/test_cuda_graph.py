"""The hooks in SGLang's decode graph runner, on a runner that only takes notes."""

from __future__ import annotations

import types

import pytest

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.integration import compat, cuda_graph


@pytest.fixture
def hooks():
    found = {}
    cuda_graph.install(lambda point, kind, function: found.__setitem__(point, function))
    return found


def runner(fits=True):
    backend = types.SimpleNamespace(calm=False, fits_graph=lambda batch: fits)
    return types.SimpleNamespace(attn_backend=backend)


def test_each_batch_size_is_captured_twice_under_different_keys(hooks):
    noted, own = [], runner()

    def key(self, size, stream_idx=None, variant_label=None, attention_variant=None):
        return size, stream_idx, variant_label, attention_variant

    def capture(self, size, forward, stream_idx=None, variant_label=None):
        noted.append(hooks[compat.GRAPH_KEY](key, self, size, stream_idx, variant_label, None))

    hooks[compat.CAPTURE_GRAPH](capture, own, 8, "forward", None, "lora")
    assert noted == [(8, None, "lora", None), (8, None, "lora+calm", None)]
    own.attn_backend.calm = True
    assert hooks[compat.GRAPH_KEY](key, own, 4) == (4, None, "+calm", None)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_a_batch_that_attends_in_turns_runs_eagerly(hooks, fits, allowed):
    answer = hooks[compat.CAN_RUN_GRAPH](lambda self, batch: allowed, runner(fits), "batch")
    assert answer == (fits and allowed)


def choose(attention, *, head_dim=128, cap=None, device="cuda", available=True, monkeypatch):
    import torch

    from arkvale_kernels.attend import flashinfer
    from arkvale_sglang.integration.backend import choose_attention

    monkeypatch.setattr(flashinfer, "is_available", lambda: available)
    geometry = PageGeometry(32, 4, 1, 8, head_dim, 1, torch.bfloat16)
    config = ArkValeConfig(attention=attention, recall_cap=cap)
    return choose_attention(config, geometry, torch.device(device))


def test_flashinfer_attends_where_it_can_and_triton_elsewhere(monkeypatch):
    assert choose(None, monkeypatch=monkeypatch) == "flashinfer"
    assert choose("triton", monkeypatch=monkeypatch) == "triton"
    assert choose(None, available=False, monkeypatch=monkeypatch) == "triton"
    assert choose(None, head_dim=96, monkeypatch=monkeypatch) == "triton"
    assert choose(None, cap=4, monkeypatch=monkeypatch) == "triton"
    assert choose(None, device="cpu", monkeypatch=monkeypatch) == "torch"


def test_what_cannot_attend_is_refused_in_one_sentence(monkeypatch):
    with pytest.raises(ArkValeError, match=r"FlashInfer is not installed; use .* triton"):
        choose("flashinfer", available=False, monkeypatch=monkeypatch)
    with pytest.raises(ArkValeError, match="head_dim 96"):
        choose("flashinfer", head_dim=96, monkeypatch=monkeypatch)
    with pytest.raises(ArkValeError, match="needs a GPU"):
        choose("triton", device="cpu", monkeypatch=monkeypatch)
    with pytest.raises(ArkValeError, match="plans on lengths"):
        ArkValeConfig(attention="flashinfer", recall_cap=1)
