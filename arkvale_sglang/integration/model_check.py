"""Which models the policy serves, asked before the server starts and again once it has loaded."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import Memory, plan_pool

UNKNOWN = 1 << 60
"""Device bytes beyond any device."""


def check_before_start(config: ArkValeConfig, server_args: Any) -> None:
    """Refuse from the model's configuration and the machine alone, with nothing running yet.

    Raises:
        ArkValeError: the model or the machine cannot be served.
    """
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig

    model = ModelConfig.from_server_args(server_args)
    arch = model.attention_arch
    if arch != AttentionArch.MHA:
        raise _unsupported(f"{arch.name} attention")
    layer_types = getattr(model.hf_text_config, "layer_types", None) or ()
    if model.is_hybrid_swa or "sliding_attention" in layer_types:
        raise _unsupported("sliding-window layers")
    if getattr(model, "is_encoder_decoder", False):
        raise _unsupported("an encoder")
    geometry = geometry_of(config, model, model.num_hidden_layers, 1, model.dtype)
    host_free = psutil.virtual_memory().available
    # How much the device will hold is known once the weights are loaded, and checked then.
    memory = Memory(device=UNKNOWN, host_free=host_free, shared=False)
    plan_pool(config, geometry, memory, server_args.max_total_tokens)


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
    config: ArkValeConfig, model: Any, layers: int, tp_size: int, dtype: torch.dtype
) -> PageGeometry:
    """The page geometry of a model on one rank."""
    return PageGeometry(
        page_size=config.page_size,
        layers=layers,
        dense_layers=config.dense_layers,
        kv_heads=model.get_num_kv_heads(tp_size),
        head_dim=model.head_dim,
        groups=config.head_groups,
        dtype=dtype,
    )


def _unsupported(feature: str) -> ArkValeError:
    return ArkValeError(
        f"the model has {feature}, which --kv-policy arkvale cannot serve; use --kv-policy full."
    )
