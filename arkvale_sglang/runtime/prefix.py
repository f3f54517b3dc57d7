"""Attention over whole prefixes, wherever their pages are.

Every chunk of prefill is attended so, and the decode steps of requests that attend to everything:
each is an extension by one token, and needs no frame but that of the page it writes to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from arkvale_kernels.attend import merge_parts
from arkvale_sglang.core.sizing import STAGING_TOKENS
from arkvale_sglang.runtime.attention import Attention
from arkvale_sglang.runtime.cache import PagedCache
from arkvale_sglang.runtime.streams import PrefixBlock


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One request of a batch: its new tokens in the batch and the prefix before them."""

    tokens: slice
    prefix: list[PrefixBlock]
    ranked: tuple[torch.Tensor, torch.Tensor] | None = None
    """For rules that remember: ``[1]`` int64 request and ``[groups, pages]`` int32 lane pages, the
    sealed ones and one more."""


def prefix_blocks(cache: PagedCache, pages: torch.Tensor, prefix: int) -> list[PrefixBlock]:
    """Cut ``prefix`` tokens of a row's logical pages into blocks that fit the staging buffer."""
    size = cache.config.page_size
    blocks = []
    for start in range(0, prefix, STAGING_TOKENS):
        tokens = min(STAGING_TOKENS, prefix - start)
        block = pages[start // size : -(-(start + tokens) // size)]
        blocks.append(PrefixBlock(block, cache.lane_pages(block), tokens))
    cache.counters.streamed += prefix
    return blocks


def whole_rows(
    cache: PagedCache, pages: torch.Tensor, lengths: list[int], rows: slice
) -> list[Sequence]:
    """Rows of a decode batch, ``pages [rows, pages]`` and ``lengths`` tokens with the new one."""
    return [
        Sequence(slice(row, row + 1), prefix_blocks(cache, pages[row], lengths[row] - 1))
        for row in range(rows.start, rows.stop)
    ]


def attend_whole(
    cache: PagedCache,
    index: int,
    sequences: list[Sequence],
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of decode rows that follow each other in the batch, in one managed layer.

    Args:
        index: number of the layer among the managed ones.
        query, k, v: of the whole batch, shapes as in :func:`attend_sequences`.

    Returns:
        ``[rows of the sequences, query heads, head_dim]``.
    """
    # Other rows evict and recall in every layer, so nothing may be read ahead of its layer.
    cache.prefix.start([block for each in sequences for block in each.prefix], [index])
    read = functools.partial(cache.prefix.take, index)
    out = attend_sequences(cache.attention, sequences, query, k, v, scaling, read)
    return out[sequences[0].tokens.start : sequences[-1].tokens.stop]


def attend_sequences(
    attention: Attention,
    sequences: list[Sequence],
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    read: Callable[[PrefixBlock], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Merge each sequence's attention to its new tokens with that to the blocks of its prefix.

    Args:
        query: ``[tokens, query heads, head_dim]``; k, v: ``[tokens, KV heads, head_dim]``.
        read: K and V of a block, ``[tokens, KV heads, head_dim]``.

    Returns:
        ``[tokens, query heads, head_dim]``.
    """
    out = torch.empty_like(query)
    for sequence in sequences:
        tokens = sequence.tokens
        part = attention.chunk(query[tokens], k[tokens], v[tokens], scaling)
        for block in sequence.prefix:
            part = merge_parts(part, attention.part(query[tokens], *read(block), scaling))
        out[tokens] = part[0]
    return out
