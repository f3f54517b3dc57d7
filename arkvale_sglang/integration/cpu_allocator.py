"""Slot allocation on a plain CPU."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import paged


class CpuPagedAllocator(paged.PagedTokenToKVPoolAllocator):
    """SGLang's paged allocator with torch in place of its two Triton kernels."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the new tokens of every row, or ``None`` if the pool is short."""
        pages = num_new_pages
        if pages is None:
            pages = paged.get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self._reserve(pages):
            return None
        out = torch.empty((extend_num_tokens,), dtype=torch.int64, device=self.device)
        paged.alloc_extend_naive(
            prefix_lens, seq_lens, last_loc, self.free_pages, out, self.page_size, self.device
        )
        self.free_pages = self.free_pages[pages:]
        return out

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot a row, opening a page where the last one is full, or ``None`` if short."""
        pages = paged.get_num_new_pages(
            seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True
        )
        if not self._reserve(pages):
            return None
        if pages == 0:
            return last_loc.long() + 1
        opens = (seq_lens - 1) % self.page_size == 0
        fresh = torch.zeros_like(last_loc, dtype=torch.int64)
        fresh[opens] = self.free_pages[:pages] * self.page_size
        self.free_pages = self.free_pages[pages:]
        return torch.where(opens, fresh, last_loc.long() + 1)

    def _reserve(self, pages: int) -> bool:
        if pages > len(self.free_pages):
            self.merge_and_sort_free()
        return pages <= len(self.free_pages)
