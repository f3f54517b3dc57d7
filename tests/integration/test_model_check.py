"""Which models are refused before anything starts, from their configuration alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.integration import model_check, scheduler

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 4, "vocab_size": 300, "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_NEXT = {
    **LLAMA, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
    "full_attention_interval": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip
FALCON_H1 = {
    **LLAMA, "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1",
    "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_d_state": 16,
}  # fmt: skip


def check(folder, config: dict, *, dtype: str = "auto", kv: str = "auto", tp: int = 1) -> None:
    """ServerArgs itself refuses some of these on a CPU in 0.5.17, so only what is read is built."""
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(str(folder), dtype=dtype)
    settings = ArkValeConfig(host_memory=0.001, dense_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "from_server_args", lambda args: model)
        args = SimpleNamespace(kv_cache_dtype=kv, max_total_tokens=None, tp_size=tp)
        model_check.check_before_start(settings, args)


def sentence(refusal: pytest.ExceptionInfo) -> str:
    text = str(refusal.value)
    assert text.endswith(".") and text.count(". ") == 0 and "--kv-policy full" in text
    return text


def test_a_dense_model_passes(tmp_path):
    check(tmp_path, LLAMA)


@pytest.mark.parametrize("config", [QWEN3_NEXT, FALCON_H1], ids=["qwen3-next", "falcon-h1"])
def test_hybrid_models_are_refused(tmp_path, config):
    """Their attention layers alone look like any other model's."""
    with pytest.raises(ArkValeError) as refusal:
        check(tmp_path, config)
    assert "layers" in sentence(refusal)


def test_a_hybrid_is_recognised_by_its_configuration_class_alone(tmp_path, monkeypatch):
    """Where it lists no kinds of layers."""
    monkeypatch.setattr(model_check, "_layer_types", lambda config: set())
    with pytest.raises(ArkValeError, match="linear-attention or state-space layers"):
        check(tmp_path, QWEN3_NEXT)


@pytest.mark.parametrize(
    ("kind", "named"),
    [("linear_attention", "linear_attention"), ("mamba", "mamba"), ("chunked_attention", "chunked"),
     ("sliding_attention", "sliding-window")],
)  # fmt: skip
def test_layers_of_another_kind_are_refused_by_name(kind, named, tmp_path, monkeypatch):
    monkeypatch.setattr(model_check, "_layer_types", lambda config: {"full_attention", kind})
    with pytest.raises(ArkValeError) as refusal:
        check(tmp_path, LLAMA)
    assert named in sentence(refusal)


def test_full_attention_by_either_name_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(model_check, "_layer_types", lambda config: {"full_attention", "attention"})
    check(tmp_path, LLAMA)


def test_kinds_of_layers_are_read_under_either_name():
    for name in ("layer_types", "layers_block_type"):
        config = SimpleNamespace(**{name: ["full_attention", "mamba"]})
        assert model_check._layer_types(config) == {"full_attention", "mamba"}
    assert model_check._layer_types(SimpleNamespace(layer_types=None)) == set()


def test_a_cache_of_another_type_than_the_model_is_refused(tmp_path):
    check(tmp_path, LLAMA, dtype="bfloat16", kv="bf16")
    with pytest.raises(ArkValeError) as refusal:
        check(tmp_path, LLAMA, dtype="float16", kv="bf16")
    assert "bfloat16" in sentence(refusal) and "float16" in str(refusal.value)


@pytest.mark.parametrize(("tp", "heads"), [(1, 2), (2, 1), (4, 1)])
def test_ranks_share_the_kv_heads_or_have_copies_of_one(tp, heads, tmp_path):
    check(tmp_path, LLAMA, tp=tp)
    model = ModelConfig(str(tmp_path))
    geometry = model_check.geometry_of(ArkValeConfig(), model, 4, tp, torch.bfloat16)
    assert geometry.kv_heads == model.get_num_kv_heads(tp) == heads


def test_kv_heads_that_ranks_cannot_share_are_refused(tmp_path):
    with pytest.raises(ArkValeError, match=r"--tp-size 3 .* 2 KV heads evenly; choose a divisor"):
        check(tmp_path, LLAMA, tp=3)


def test_a_checkpoint_that_asks_for_an_fp8_cache_ends_the_server(monkeypatch, capsys):
    """Known once its weights are loaded, and refused when the cache is sized."""
    monkeypatch.setattr(scheduler.multiprocessing, "parent_process", lambda: None)
    monkeypatch.setattr(scheduler.ranks, "count", lambda: 1)
    model = SimpleNamespace(dtype=torch.bfloat16)
    kvc = SimpleNamespace(
        model_config=model, layer_info=SimpleNamespace(num_effective_layers=4), device="cpu",
        kv_cache_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    configurator = scheduler.Configurator(scheduler.Wiring(ArkValeConfig()), kvc)
    with pytest.raises(SystemExit) as ended:
        configurator.calculate_pool_sizes(1 << 30, 32)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: the KV cache would be kept in float8_e4m3fn")
