"""Which models the policy serves, asked before the server starts and again once it has loaded."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import Memory, plan_pool

FULL_ATTENTION = {"full_attention", "attention"}
"""How model configurations call a layer that attends to everything before it."""
UNKNOWN = 1 << 60
"""Device bytes beyond any device."""


def check_before_start(config: ArkValeConfig, server_args: Any) -> None:
    """Refuse from the model's configuration and the machine alone, with nothing running yet.

    Raises:
        ArkValeError: the model or the machine cannot be served.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig

    model = ModelConfig.from_server_args(server_args)
    arch = model.attention_arch
    if arch != AttentionArch.MHA:
        raise _unsupported(f"{arch.name} attention")
    others = _layer_types(model.hf_text_config) - FULL_ATTENTION
    if model.is_hybrid_swa or "sliding_attention" in others:
        raise _unsupported("sliding-window layers")
    if others:
        raise _unsupported(f"{min(others)} layers beside full attention")
    if mambaish_config(model) is not None:
        raise _unsupported("linear-attention or state-space layers")
    if getattr(model, "is_encoder_decoder", False):
        raise _unsupported("an encoder")
    if server_args.kv_cache_dtype in ("bf16", "bfloat16"):
        check_kv_dtype(model.dtype, torch.bfloat16)
    ranks = server_args.tp_size
    geometry = geometry_of(config, model, model.num_hidden_layers, ranks, model.dtype)
    host_free = psutil.virtual_memory().available
    # How much the device will hold is known once the weights are loaded, and checked then.
    memory = Memory(device=UNKNOWN, host_free=host_free, shared=False, ranks=ranks)
    plan_pool(config, geometry, memory, server_args.max_total_tokens)


def _layer_types(text_config: Any) -> set[str]:
    """Kinds of layers that a configuration lists; none where all layers are alike."""
    names = ("layer_types", "layers_block_type")
    return {str(kind) for name in names for kind in getattr(text_config, name, None) or ()}


def check_kv_dtype(model: torch.dtype, cache: torch.dtype) -> None:
    """Refuse a cache that would store keys and values in another type than the model computes.

    Raises:
        ArkValeError: the types differ.
    """
    if cache != model:
        kept, computed = (str(dtype).removeprefix("torch.") for dtype in (cache, model))
        raise ArkValeError(
            f"the KV cache would be kept in {kept} by --kv-cache-dtype or the checkpoint but the "
            f"model computes in {computed}, which --kv-policy arkvale cannot convert; make --dtype "
            "and --kv-cache-dtype agree or use --kv-policy full."
        )


def check_loaded(model: torch.nn.Module) -> None:
    """Refuse attention layers whose mask or reach the policy does not reproduce.

    Raises:
        ArkValeError: a layer has a sliding window, soft cap, cross attention or the like.
    """
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    for module in model.modules():
        if not isinstance(module, RadixAttention):
            continue
        window = module.sliding_window_size
        if window is not None and window > -1:
            raise _unsupported("sliding-window layers")
        if module.logit_cap:
            raise _unsupported("a soft cap on attention logits")
        if module.is_cross_attention or module.attn_type != AttentionType.DECODER:
            raise _unsupported("attention that is not causal self-attention")
        if module.qk_head_dim != module.v_head_dim or module.tp_k_head_num != module.tp_v_head_num:
            raise _unsupported("keys and values of different shape")


def geometry_of(
    config: ArkValeConfig, model: Any, layers: int, ranks: int, dtype: torch.dtype
) -> PageGeometry:
    """The page geometry of a model on one of so many ranks."""
    return PageGeometry.of(
        config,
        layers=layers,
        kv_heads=model.get_num_kv_heads(1),
        head_dim=model.head_dim,
        dtype=dtype,
        ranks=ranks,
    )


def _unsupported(feature: str) -> ArkValeError:
    return ArkValeError(
        f"the model has {feature}, which --kv-policy arkvale cannot serve; use --kv-policy full."
    )
