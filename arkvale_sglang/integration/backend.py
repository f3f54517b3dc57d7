"""SGLang's attention backend interface over the cache's decode and extend steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from arkvale_kernels.attend import flashinfer
from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.integration import requests
from arkvale_sglang.integration.pool import ArkValeKVPool
from arkvale_sglang.runtime.attention import FlashInferAttention
from arkvale_sglang.runtime.decode import DecodeStep, decode_dense, decode_managed, plan_decode
from arkvale_sglang.runtime.graph import DecodeGraph
from arkvale_sglang.runtime.prefill import ExtendStep, extend_dense, extend_managed, plan_extend

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def choose_attention(config: ArkValeConfig, geometry: PageGeometry, device: torch.device) -> str:
    """``torch`` on a CPU, else ``flashinfer`` or ``triton``.

    Raises:
        ArkValeError: the setting asks for what is not there.
    """
    if device.type == "cpu":
        if config.attention is not None:
            raise ArkValeError(
                f"--arkvale-attention {config.attention} needs a GPU; leave it out on a CPU."
            )
        return "torch"
    known = geometry.head_dim in flashinfer.HEAD_DIMS and geometry.dtype.itemsize == 2
    usable = known and config.recall_cap is None and flashinfer.is_available()
    if config.attention == "flashinfer" and not usable:
        what = "is not installed"
        if not known:
            what = f"does not know head_dim {geometry.head_dim} in {geometry.dtype}"
        raise ArkValeError(
            f"--arkvale-attention flashinfer cannot be used because FlashInfer {what}; use "
            "--arkvale-attention triton."
        )
    return config.attention or ("flashinfer" if usable else "triton")


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
        size = self.cache.config.page_size
        self.row_pages = -(-self.req_to_token_pool.req_to_token.shape[1] // size)
        self.graph: DecodeGraph | None = None
        self.calm = False
        """Which of a batch size's two graphs is being captured, or is to be replayed."""
        geometry = self.cache.plan.geometry
        if choose_attention(self.cache.config, geometry, self.cache.store.device) == "flashinfer":
            self.cache.attention = self._flashinfer(runner)

    def _flashinfer(self, runner: ModelRunner) -> FlashInferAttention:
        geometry = self.cache.plan.geometry
        layer = next(part for part in runner.model.modules() if hasattr(part, "tp_q_head_num"))
        shape = flashinfer.AttentionShape(
            layer.tp_q_head_num,
            geometry.kv_heads,
            geometry.head_dim,
            geometry.page_size,
            geometry.dtype,
            layer.scaling,
        )
        return FlashInferAttention(
            shape,
            groups=geometry.groups,
            budget_pages=self.cache.config.budget_pages,
            logical_pages=self.cache.plan.logical_pages,
            row_pages=self.row_pages,
            device=self.cache.store.device,
        )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the pass; no layer reads SGLang's tables after this."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = None
        elif mode.is_decode():
            self.forward_metadata = self._plan_decode(forward_batch, padding=0)
        else:
            self.forward_metadata = plan_extend(
                self.cache,
                self.req_to_token_pool.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.out_cache_loc,
                [int(length) for length in forward_batch.extend_prefix_lens_cpu],
                [int(length) for length in forward_batch.extend_seq_lens_cpu],
                requests.settings_of(forward_batch),
            )

    def _plan_decode(self, forward_batch: ForwardBatch, padding: int) -> DecodeStep:
        """The last ``padding`` rows only fill up the batch of a captured graph."""
        lengths, host_lengths = forward_batch.seq_lens, forward_batch.seq_lens_cpu.tolist()
        if padding:
            real = len(host_lengths) - padding
            host_lengths = host_lengths[:real] + [0] * padding
            lengths = torch.nn.functional.pad(lengths[:real], (0, padding))
        return plan_decode(
            self.cache,
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            lengths,
            host_lengths,
            requests.settings_of(forward_batch),
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured decode passes read."""
        self.graph = DecodeGraph(self.cache, max_bs, self.row_pages)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length that SGLang gives rows of a dummy batch."""
        return 1

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Plan the pass that a graph is captured over, with inert rows, or is about to replay."""
        assert self.graph is not None
        rows = len(forward_batch.seq_lens)
        padding = rows if in_capture else forward_batch.num_padding
        self.cache.attention.fixed = True
        try:
            step = self._plan_decode(forward_batch, padding)
        finally:
            self.cache.attention.fixed = False
        if not in_capture:
            self.calm = step.calm
        self.forward_metadata = self.graph.load(step, calm=self.calm)

    def fits_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether a decode batch can be replayed: rows that attend in turns run eagerly."""
        if requests.settings_of(forward_batch) is not None:
            return False
        return self.cache.in_one_wave(forward_batch.seq_lens_cpu.tolist())

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
        _refuse_extras(save_kv_cache, kwargs)
        query, k, v = _by_head(q, k, v, layer)
        step: DecodeStep = self.forward_metadata
        index = layer.layer_id - self.first_layer
        if index < self.dense_layers:
            out = decode_dense(self.cache.store.dense[index], step, query, k, v, layer.scaling)
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
        _refuse_extras(save_kv_cache, kwargs)
        query, k, v = _by_head(q, k, v, layer)
        step: ExtendStep = self.forward_metadata
        index = layer.layer_id - self.first_layer
        if index < self.dense_layers:
            dense = self.cache.store.dense[index]
            out = extend_dense(self.cache, dense, step, query, k, v, layer.scaling)
        else:
            managed = index - self.dense_layers
            out = extend_managed(self.cache, managed, step, query, k, v, layer.scaling)
        return out.reshape(query.shape[0], -1)

    def support_triton(self) -> bool:
        """Whether SGLang may run its own Triton helpers around attention."""
        return str(self.device) != "cpu"


def _refuse_extras(save_kv_cache: bool, extras: dict[str, Any]) -> None:
    """What the model asks of attention beyond plain attention must not be dropped in silence."""
    asked = [name for name, value in extras.items() if value is not None]
    if asked or not save_kv_cache:
        what = f"{asked[0]}=" if asked else "save_kv_cache=False"
        raise NotImplementedError(
            f"this model calls attention with {what}, which --kv-policy arkvale does not know; "
            "serve it with --kv-policy full."
        )


def _by_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[tokens, heads, head_dim]``, contiguous, so that lanes are views."""
    return (
        q.reshape(-1, layer.tp_q_head_num, layer.head_dim).contiguous(),
        k.reshape(-1, layer.tp_k_head_num, layer.head_dim).contiguous(),
        v.reshape(-1, layer.tp_v_head_num, layer.head_dim).contiguous(),
    )
