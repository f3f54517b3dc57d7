"""Transfers beside the computation: a stream of their own, and prefixes read ahead on it.

On a CPU there is one stream, and everything here happens in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from arkvale_kernels.transfer import gather_pages
from arkvale_sglang.core.sizing import STAGING_BUFFERS, STAGING_TOKENS

if TYPE_CHECKING:
    from arkvale_sglang.runtime.cache import PagedCache


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixBlock:
    """Pages of a prefix that are staged together; only the last may hold fewer tokens."""

    pages: torch.Tensor
    """``[pages]`` int32 logical pages, and their ``lane_pages`` ``[pages * groups]``."""
    lane_pages: torch.Tensor
    tokens: int


class TransferStream:
    """A side stream that starts after what the current stream was given so far."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._busy = False

    @contextlib.contextmanager
    def beside(self, *read: torch.Tensor) -> Iterator[None]:
        """Run the body on the side; ``read`` are tensors that it uses and others may free."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        for tensor in read:
            tensor.record_stream(self._stream)
        self._busy = True

    def mark(self) -> torch.cuda.Event | None:
        """Remember what the side stream was given so far."""
        return None if self._stream is None else self._stream.record_event()

    def join(self) -> None:
        """Let the current stream wait for everything on the side."""
        if self._stream is not None and self._busy:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._busy = False


@dataclasses.dataclass
class _Read:
    """One block of one layer on its way to a staging buffer."""

    layer: int
    block: PrefixBlock
    staged: tuple[torch.Tensor, torch.Tensor]
    done: torch.cuda.Event | None


class PrefixReader:
    """Reads the blocks of prefixes, each while the one before is attended.

    Layers take their blocks in a known order, so the next read is always known too: the next
    block of this layer, or the first of the next.
    """

    def __init__(self, cache: PagedCache):
        self._cache = cache
        self._order: list[tuple[int, PrefixBlock]] = []
        self._next = 0
        self._ahead: _Read | None = None
        self._buffers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * STAGING_BUFFERS

    def start(self, blocks: list[PrefixBlock], layers: Iterable[int]) -> None:
        """Note the blocks, in the order in which each of the managed layers takes them.

        What is read ahead is what the tables say then, so layers whose tables may change before
        they take their blocks are to be noted one by one.
        """
        self._order = [(layer, block) for layer in layers for block in blocks]
        self._next, self._ahead = 0, None

    def take(self, layer: int, block: PrefixBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a block in one managed layer, ``[tokens, KV heads, head_dim]``; valid until
        the block after the next is taken."""
        read = self._ahead
        if read is None or read.layer != layer or read.block is not block:
            self._next = self._order.index((layer, block))
            read = self._read()
        self._ahead = None
        if self._cache.store.device.type == "cuda" and self._next < len(self._order):
            self._ahead = self._read()
        if read.done is not None:
            torch.cuda.current_stream().wait_event(read.done)
        k, v = read.staged[0][: block.tokens], read.staged[1][: block.tokens]
        if self._cache.checksums is not None:
            self._cache.checksums.check_gathered(layer, block.lane_pages, k, v)
        return k, v

    def _read(self) -> _Read:
        """Start the next read.  Its buffer was attended two blocks ago, which the current stream
        has been given already, so starting after that stream is enough."""
        layer, block = self._order[self._next]
        with self._cache.transfers.beside():
            staged = gather_pages(
                self._cache.store.managed[layer],
                block.lane_pages,
                groups=self._cache.plan.geometry.groups,
                out=self._buffer(self._next % STAGING_BUFFERS),
            )
            done = self._cache.transfers.mark()
        self._next += 1
        return _Read(layer, block, staged, done)

    def _buffer(self, number: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A staging buffer, allocated at the first use and kept; a CPU allocates as it goes."""
        if self._cache.store.device.type != "cuda":
            return None
        buffer = self._buffers[number]
        if buffer is None:
            geometry = self._cache.plan.geometry
            shape = (STAGING_TOKENS, geometry.kv_heads, geometry.head_dim)
            k, v = (
                torch.empty(shape, dtype=geometry.dtype, device=self._cache.store.device)
                for _ in range(2)
            )
            buffer = self._buffers[number] = (k, v)
        return buffer
