"""Checksums of backed-up pages: what comes back from the host is what was sent there.

A debug mode (``--arkvale-check-transfers``): it reads the device in every layer that recalls, so
steps cannot be captured in a graph.  A page's checksum is made on the device from what its frame or
its chunk held when it was sealed, never from the backup.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from arkvale_kernels.layout import NewTokens, PagedLayer, Recalls
from arkvale_sglang.config.settings import ArkValeError
from arkvale_sglang.core.sizing import PoolPlan

_STEP, _MIX = -7046029254386353131, -4658895280553007687
"""Odd, so that multiplying by them loses no bit (golden ratio; a constant of SplitMix64)."""


class TransferError(ArkValeError):
    """A page came back from the host other than it was sent there."""


class Checksums:
    """One checksum of 64 bits for every lane page, on the device.

    Words are mixed with their place and added up: any change of one word changes the sum for
    certain, and words that change places or pages that change owners do but for one case in 2^64.
    """

    def __init__(self, plan: PoolPlan, device: torch.device):
        geometry = plan.geometry
        pages = geometry.groups * (plan.logical_pages + 1)
        shape = (geometry.managed_layers, pages)
        self._sums = torch.zeros(shape, dtype=torch.int64, device=device)
        self._groups, self._dense = geometry.groups, geometry.dense_layers
        self._page_size, self._stride = geometry.page_size, plan.logical_pages + 1
        self.fail: Callable[[TransferError], None] | None = None
        """Told of a mismatch in place of raising it; must not return."""

    def of_chunk(
        self,
        layer: int,
        lane_pages: torch.Tensor,
        first_tokens: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        """Remember pages that a chunk holds whole; arguments as of ``seal_pages``."""
        within = torch.arange(self._page_size, device=k.device)
        tokens = (first_tokens.unsqueeze(1) + within).flatten()
        self._keep(layer, lane_pages, *(self._by_lane(part[tokens]) for part in (k, v)))

    def of_frames(self, index: int, layer: PagedLayer, lane_pages: torch.Tensor) -> None:
        """Remember pages ``[pages]`` that have just become full in their frames."""
        frames = layer.residency.frame_of.index_select(0, lane_pages).long()
        self._keep(index, lane_pages, layer.k_frames[frames], layer.v_frames[frames])

    def after_move(
        self, index: int, layer: PagedLayer, new: NewTokens | None, recalls: Recalls | None
    ) -> None:
        """Remember the pages that one decode step filled, compare those that it recalled; arguments
        as of ``move_pages``, which must have run.

        Raises:
            TransferError: a page is not what was sealed.
        """
        if new is not None and new.fills:
            full = (new.offsets == self._page_size - 1) & (new.lane_pages > 0)
            self.of_frames(index, layer, new.lane_pages[full])
        if recalls is not None:
            self._check_recalls(index, layer, recalls)

    def _check_recalls(self, index: int, layer: PagedLayer, recalls: Recalls) -> None:
        pages, frames = recalls.filled()
        self._compare(index, pages, layer.k_frames[frames.long()], layer.v_frames[frames.long()])

    def check_gathered(
        self, layer: int, lane_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Compare the full pages among ``k`` and ``v`` ``[tokens, KV heads, head_dim]``, gathered
        for ``lane_pages [pages * groups]``; the last page may have fewer tokens and be open.

        Raises:
            TransferError: a page is not what was sealed.
        """
        full = k.shape[0] // self._page_size
        whole = (self._by_lane(part[: full * self._page_size]) for part in (k, v))
        self._compare(layer, lane_pages[: full * self._groups], *whole)

    def _by_lane(self, part: torch.Tensor) -> torch.Tensor:
        """``[pages * page_size, KV heads, head_dim]`` -> ``[pages * groups, page_size, lane heads,
        head_dim]``, the groups of a page side by side."""
        pages = part.unflatten(0, (-1, self._page_size)).unflatten(2, (self._groups, -1))
        return pages.transpose(1, 2).flatten(0, 1)

    def _keep(self, layer: int, pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._sums[layer].index_copy_(0, pages.long(), checksum(k, v))

    def _compare(self, layer: int, pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        wrong = pages[self._sums[layer].index_select(0, pages.long()) != checksum(k, v)]
        if wrong.numel() == 0:
            return
        group, page = divmod(int(wrong[0]), self._stride)
        error = TransferError(
            f"page {page} of layer {layer + self._dense} (head group {group}) came back from host "
            "memory other than it was sent there, so no answer was made from it; the machine's "
            "memory is bad or this is a bug: test the memory, restart the server, and report it "
            "with this line."
        )
        if self.fail is not None:
            self.fail(error)
        raise error


def checksum(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[pages]`` int64 of pages whose keys and values are ``[pages, ...]`` each."""
    words = torch.cat([_words(k), _words(v)], 1)
    place = torch.arange(1, words.shape[1] + 1, device=words.device) * _STEP
    mixed = (words ^ place) * _MIX
    mixed = (mixed ^ _shifted(mixed, 31)) * _STEP
    return (mixed ^ _shifted(mixed, 29)).sum(1)


def _words(pages: torch.Tensor) -> torch.Tensor:
    """``[pages, ...]`` as rows of 8 bytes; a page of 16 tokens or more divides into them."""
    return pages.flatten(1).contiguous().view(torch.int64)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros from the left: torch's shift repeats the sign, which would lose a bit."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
