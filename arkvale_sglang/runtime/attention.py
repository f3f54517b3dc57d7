"""Who computes attention once pages are chosen and read: the op's own kernels, or FlashInfer."""

from __future__ import annotations

from typing import Protocol

import torch

from arkvale_kernels.attend import attend_chunk, attend_part, flashinfer
from arkvale_kernels.layout import FrameLists
from arkvale_kernels.residency import find_frames

Part = tuple[torch.Tensor, torch.Tensor]
"""Output ``[tokens, heads, head_dim]`` and log-sum-exp ``[tokens, heads]`` float32."""


class DecodeAttention(Protocol):
    """Attention planned for the lengths of one batch, which all layers share."""

    lists: FrameLists
    """Filled in each layer before :meth:`run`."""

    def run(
        self,
        query: torch.Tensor,
        k_frames: torch.Tensor,
        v_frames: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """``[rows, query heads, head_dim]`` over the listed frames, in the same shape."""
        ...


class Attention:
    """The op's own kernels, which plan nothing: they read lengths on the device."""

    fixed = False
    """Whether plans are made for a captured graph: one set of buffers per number of rows."""

    def plan_lanes(self, lengths: list[int], wave: int) -> DecodeAttention | None:
        """Prepare managed layers: ``lengths`` are the tokens that each row of the batch attends
        to, ``wave`` the number of its wave."""
        return None

    def plan_dense(
        self, lengths: list[int], pages: torch.Tensor, page_counts: torch.Tensor
    ) -> DecodeAttention | None:
        """Prepare attention over whole rows, ``pages [rows, pages]``, ``page_counts [rows]``."""
        return None

    def chunk(self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> Part:
        """Causal attention of a chunk over itself."""
        return attend_chunk(query, k, v, scaling=scaling)

    def part(self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> Part:
        """Attention of a chunk over keys that all precede it."""
        return attend_part(query, k, v, scaling=scaling)


class FlashInferAttention(Attention):
    """FlashInfer, planned once per step: one plan serves all lanes of all managed layers."""

    def __init__(
        self,
        shape: flashinfer.AttentionShape,
        *,
        groups: int,
        budget_pages: int,
        logical_pages: int,
        row_pages: int,
        device: torch.device,
    ):
        """``shape`` is that of a whole layer; ``row_pages`` is the most pages a row can have."""
        self._dense_shape = shape
        self._lane_shape = shape._replace(
            query_heads=shape.query_heads // groups, kv_heads=shape.kv_heads // groups
        )
        self._groups, self._budget, self._row_pages = groups, budget_pages, row_pages
        self._workspace = torch.empty(flashinfer.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # A dense layer's page is its own frame.
        self._own_frame = torch.arange(logical_pages + 1, dtype=torch.int32, device=device)
        self._planned: dict[tuple[str, int, int], flashinfer.FlashInferDecode] = {}

    def plan_lanes(self, lengths: list[int], wave: int) -> DecodeAttention:
        """See :meth:`Attention.plan_lanes`."""
        by_lane = [length for length in lengths for _ in range(self._groups)]
        kind, row_pages = "lanes", self._budget
        if max(lengths, default=0) > self._budget * self._lane_shape.page_size:
            kind, row_pages = "whole", self._row_pages  # rows that attend to everything
        planned = self._wrapper(kind, self._lane_shape, len(by_lane), wave, row_pages)
        planned.plan(by_lane)
        return planned

    def plan_dense(
        self, lengths: list[int], pages: torch.Tensor, page_counts: torch.Tensor
    ) -> DecodeAttention:
        """See :meth:`Attention.plan_dense`."""
        planned = self._wrapper("dense", self._dense_shape, len(lengths), 0, self._row_pages)
        planned.plan(lengths)
        find_frames(self._own_frame, pages, page_counts, scratch=0, lists=planned.lists)
        return planned

    def _wrapper(
        self, kind: str, shape: flashinfer.AttentionShape, rows: int, wave: int, row_pages: int
    ) -> flashinfer.FlashInferDecode:
        """One per wave of a step; in graphs one per number of rows, kept for their replays."""
        capacity = rows if self.fixed else 1 << (rows - 1).bit_length()
        key = (kind, capacity if self.fixed else -capacity, wave)
        if key not in self._planned:
            self._planned[key] = flashinfer.FlashInferDecode(
                shape, capacity, capacity * row_pages, self._workspace, fixed=self.fixed
            )
        return self._planned[key]

    def chunk(self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> Part:
        """See :meth:`Attention.chunk`."""
        return flashinfer.attend_chunk(query, k, v, scaling)

    def part(self, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> Part:
        """See :meth:`Attention.part`."""
        return flashinfer.attend_part(query, k, v, scaling)
