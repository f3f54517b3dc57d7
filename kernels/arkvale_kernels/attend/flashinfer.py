"""FlashInfer as the attention over chosen frames, planned once for all layers of a step.

FlashInfer plans on lengths alone and reads page indices when it runs, so one plan serves every
layer of a step while each layer writes its own indices into the same buffer.
"""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch

from arkvale_kernels.layout import FrameLists

WORKSPACE_BYTES = 384 << 20
"""What FlashInfer asks for partial results of split rows."""
_TENSOR_CORE_RATIO = 4
"""Query heads per KV head from which FlashInfer's tensor-core path pays."""
HEAD_DIMS = (64, 128, 256)
"""Those FlashInfer compiles for both decode and prefill."""


class AttentionShape(NamedTuple):
    """What a plan needs besides lengths."""

    query_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    scaling: float


def is_available() -> bool:
    """Whether FlashInfer is installed and there is a GPU to run it on."""
    return torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None


class FlashInferDecode:
    """Decode attention of at most ``rows`` rows; with ``fixed``, of exactly so many, always in
    the same buffers, so that it can be captured in a CUDA graph."""

    def __init__(
        self,
        shape: AttentionShape,
        rows: int,
        entries: int,
        workspace: torch.Tensor,
        *,
        fixed: bool,
    ):
        import flashinfer

        self._shape, self._fixed = shape, fixed
        device = workspace.device
        self.lists = FrameLists(
            torch.zeros(entries, dtype=torch.int32, device=device),
            torch.zeros(rows + 1, dtype=torch.int32, device=device),
        )
        self._last = torch.ones(rows, dtype=torch.int32, device=device)
        buffers = {}
        if fixed:
            buffers = {
                "paged_kv_indptr_buffer": self.lists.starts,
                "paged_kv_indices_buffer": self.lists.indices,
                "paged_kv_last_page_len_buffer": self._last,
            }
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=fixed,
            use_tensor_cores=shape.query_heads // shape.kv_heads >= _TENSOR_CORE_RATIO,
            **buffers,
        )

    def plan(self, lengths: list[int]) -> None:
        """Prepare for rows of so many tokens; an inert row of 0 is given one token of whatever
        its index points to, and its result means nothing."""
        size = self._shape.page_size
        pages = [max(1, -(-length // size)) for length in lengths]
        ends = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        last = torch.tensor(
            [(length - 1) % size + 1 if length else 1 for length in lengths], dtype=torch.int32
        )
        if not self._fixed:
            starts = ends.pin_memory().to(self.lists.starts.device, non_blocking=True)
            self.lists = FrameLists(self.lists.indices, starts)
        total = int(ends[-1])
        if total > self.lists.indices.shape[0]:
            raise ValueError(
                f"lengths need {total} entries but the index buffer has "
                f"{self.lists.indices.shape[0]}"
            )
        self._wrapper.plan(
            ends,
            self.lists.indices[:total],
            last,
            self._shape.query_heads,
            self._shape.kv_heads,
            self._shape.head_dim,
            size,
            q_data_type=self._shape.dtype,
            kv_data_type=self._shape.dtype,
            sm_scale=self._shape.scaling,
        )

    def run(
        self, query: torch.Tensor, k_frames: torch.Tensor, v_frames: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """``[rows, query heads, head_dim]`` over the frames listed in :attr:`lists`."""
        if scaling != self._shape.scaling:
            raise ValueError(f"scaling was planned as {self._shape.scaling}, got {scaling}")
        return self._wrapper.run(query, (k_frames, v_frames))


def attend_chunk(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a chunk over itself, as :func:`arkvale_kernels.attend.attend_chunk`."""
    return _prefill(query, k, v, scaling, causal=True)


def attend_part(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk over earlier keys, as :func:`arkvale_kernels.attend.attend_part`."""
    return _prefill(query, k, v, scaling, causal=False)


def _prefill(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    import flashinfer

    out, lse = flashinfer.single_prefill_with_kv_cache(
        query, k, v, causal=causal, sm_scale=scaling, return_lse=True
    )
    return out, lse * math.log(2)  # FlashInfer's is to the base 2
