"""SGLang's attention backend interface over the cache's decode and extend steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from arkvale_sglang.integration.pool import ArkValeKVPool
from arkvale_sglang.runtime.decode import DecodeStep, decode_dense, decode_managed, plan_decode
from arkvale_sglang.runtime.prefill import ExtendStep, extend_dense, extend_managed, plan_extend

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class ArkValeBackend(AttentionBackend):
    """Turns a forward batch into one plan, and each layer's attention into one call."""

    needs_cpu_seq_lens = True

    def __init__(self, runner: ModelRunner):
        super().__init__()
        self.device = runner.device
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool: ArkValeKVPool = runner.token_to_kv_pool
        self.cache = self.token_to_kv_pool.cache
        self.dense_layers = self.cache.plan.geometry.dense_layers
        self.first_layer = self.token_to_kv_pool.start_layer
        self.forward_metadata: Any = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the pass; no layer reads SGLang's tables after this."""
        mode = forward_batch.forward_mode
        slots = self.req_to_token_pool.req_to_token
        if mode.is_idle():
            self.forward_metadata = None
        elif mode.is_decode():
            self.forward_metadata = plan_decode(
                self.cache,
                slots,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                forward_batch.seq_lens_cpu.tolist(),
            )
        else:
            self.forward_metadata = plan_extend(
                self.cache,
                slots,
                forward_batch.req_pool_indices,
                forward_batch.out_cache_loc,
                [int(length) for length in forward_batch.extend_prefix_lens_cpu],
                [int(length) for length in forward_batch.extend_seq_lens_cpu],
            )

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[rows, heads * head_dim]`` each; see :func:`decode_managed`."""
        query, k, v = _by_head(q, k, v, layer)
        step: DecodeStep = self.forward_metadata
        index = layer.layer_id - self.first_layer
        if index < self.dense_layers:
            groups = self.cache.plan.geometry.groups
            dense = self.cache.store.dense[index]
            out = decode_dense(dense, step, query, k, v, groups, layer.scaling)
        else:
            managed = index - self.dense_layers
            out = decode_managed(self.cache, managed, step, query, k, v, layer.scaling)
        return out.reshape(query.shape[0], -1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[tokens, heads * head_dim]`` each; see :func:`extend_managed`."""
        query, k, v = _by_head(q, k, v, layer)
        step: ExtendStep = self.forward_metadata
        index = layer.layer_id - self.first_layer
        if index < self.dense_layers:
            out = extend_dense(self.cache.store.dense[index], step, query, k, v, layer.scaling)
        else:
            managed = index - self.dense_layers
            out = extend_managed(self.cache, managed, step, query, k, v, layer.scaling)
        return out.reshape(query.shape[0], -1)

    def support_triton(self) -> bool:
        """Whether SGLang may run its own Triton helpers around attention."""
        return str(self.device) != "cpu"


def _by_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[tokens, heads, head_dim]``, contiguous, so that lanes are views."""
    return (
        q.reshape(-1, layer.tp_q_head_num, layer.head_dim).contiguous(),
        k.reshape(-1, layer.tp_k_head_num, layer.head_dim).contiguous(),
        v.reshape(-1, layer.tp_v_head_num, layer.head_dim).contiguous(),
    )
