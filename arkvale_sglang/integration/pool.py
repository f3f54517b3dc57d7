"""What SGLang sees of the cache: a pool of logical slots and the allocator that hands them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.allocator import paged

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.runtime.cache import PagedCache


class ArkValeKVPool(memory_pool.MHATokenToKVPool):
    """A KV pool whose slots are logical: only the arkvale backend knows where a page is."""

    def __init__(self, size: int, *args: Any, plan: PoolPlan, config: ArkValeConfig, **kwargs: Any):
        if size != plan.logical_tokens:
            raise RuntimeError(
                f"SGLang asks for {size} slots but {plan.logical_tokens} were planned; report this "
                "with the SGLang version."
            )
        self._plan, self._config = plan, config
        self.cache: PagedCache
        super().__init__(size, *args, **kwargs)

    def _create_buffers(self) -> None:
        self.k_buffer: list[torch.Tensor] = []
        self.v_buffer: list[torch.Tensor] = []
        self.cache = PagedCache(self._config, self._plan, self.device)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Device bytes of the whole cache, halved between K and V for the log."""
        half = self._plan.device_bytes // 2
        return half, half

    def _no_buffer(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "KV pages of the arkvale policy have no fixed place on the device; read and write them "
            "through its attention backend."
        )

    get_key_buffer = _no_buffer
    get_value_buffer = _no_buffer
    get_kv_buffer = _no_buffer
    set_kv_buffer = _no_buffer
    move_kv_cache = _no_buffer
    get_contiguous_buf_infos = _no_buffer
    get_cpu_copy = _no_buffer
    load_cpu_copy = _no_buffer


class LogicalAllocator(paged.PagedTokenToKVPoolAllocator):
    """A paged allocator of logical slots: pages die here."""

    _kvcache: ArkValeKVPool

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.cache.live_pages = self.live_pages

    @property
    def cache(self) -> PagedCache:
        """The cache behind the slots."""
        return self._kvcache.cache

    def live_pages(self) -> int:
        """Logical pages handed out, to requests or to the radix tree."""
        return (self.size - self.available_size()) // self.page_size

    def live_page_ids(self) -> set[int]:
        """The same, one by one (reads the device)."""
        free = [pages for pages in (self.free_pages, self.release_pages) if pages is not None]
        return set(range(1, self.num_pages + 1)).difference(torch.cat(free).tolist())

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        super()._release_page_ids(*page_ids)
        for ids in page_ids:
            self.cache.release(ids)

    def clear(self) -> None:
        """Forget all pages; also part of the base class's construction."""
        super().clear()
        self.cache.reset()


def allocator_class(base: type[paged.PagedTokenToKVPoolAllocator]) -> type:
    """The logical allocator over the platform's own paged allocator."""
    if base is paged.PagedTokenToKVPoolAllocator:
        return LogicalAllocator
    return type("ArkValeAllocator", (LogicalAllocator, base), {})


def expected_tokens(requests: Sequence[Any], ratio: float) -> Iterator[int]:
    """Tokens that each request may come to hold, if it grows by a share of what it may still
    generate."""
    for request, held in zip(requests, tokens_of(requests), strict=True):
        left = max(0, request.sampling_params.max_new_tokens - len(request.output_ids))
        yield held + int(ratio * left)


def tokens_of(requests: Iterable[Any]) -> list[int]:
    """Tokens that each request holds in the cache so far."""
    return [len(request.origin_input_ids) + len(request.output_ids) for request in requests]
