"""The tensors that all ops share: one layer's pages, its residency tables, the selection rule."""

from __future__ import annotations

from typing import NamedTuple

import torch

FREE = -1
"""Heat of a frame that holds no page."""
SCORE_BITS = 24
"""A used frame's heat is ``(clock << SCORE_BITS) | score``: 39 bits of clock outlast any server."""
PINNED = torch.iinfo(torch.int64).max
"""Heat of a frame whose page may not leave: it is open, or the frame is the scratch row."""

COPY_BYTES = 2 << 20
"""Most that a host reference copies at once of what it only reads through: the allocator returns
larger ones to the system each time, and touching fresh memory takes longer than the work on it."""


class Residency(NamedTuple):
    """The tables of one layer, or of all layers with a leading layer dimension."""

    frame_of: torch.Tensor
    """``[lane pages]`` int32: lane frame of a lane page, -1 if not resident."""
    page_in: torch.Tensor
    """``[lane frames + 1]`` int32: the inverse, -1 if free; the last entry is the scratch row."""
    heat: torch.Tensor
    """``[lane frames + 1]`` int64: who leaves first, see the residency op."""


class PagedLayer(NamedTuple):
    """One layer whose pages are evicted and recalled."""

    k_frames: torch.Tensor
    """``[lane frames + 1, page_size, lane heads, head_dim]``, device; the last row is scratch."""
    v_frames: torch.Tensor
    host: torch.Tensor
    """``[lane pages, 2, page_size, lane heads, head_dim]``, host memory (pinned if the device is
    not the host): K and V of a page lie together, so that a recall is one burst."""
    digests: torch.Tensor
    """``[lane pages, 2, lane heads, head_dim]``, device; upper and lower vector."""
    residency: Residency


class SelectionRule(NamedTuple):
    """How many pages a row attends to, and which of them need no good score (ArkVale 5.3).

    A row of ``n`` pages, the one being written included, attends to everything if ``n <= budget``.
    Else it attends to its ``sinks`` first and ``window`` last pages, the best ``must`` of the
    others whether resident or not, and of the rest the best resident ones until ``budget`` pages
    are chosen; only where those do not suffice are further pages recalled, so that the list is
    always full.  ``recall_cap`` bounds the pages recalled by score; the list may then be shorter.
    """

    budget: int
    must: int
    sinks: int
    window: int
    recall_cap: int | None = None

    def competing(self, page_counts: torch.Tensor, pages: int) -> torch.Tensor:
        """``[rows]`` pages of each row -> ``[rows, pages]`` bool: where the score decides."""
        counts = page_counts.unsqueeze(1)
        index = torch.arange(pages, device=page_counts.device)
        return (index >= self.sinks) & (index < counts - self.window) & (counts > self.budget)

    def check(self) -> None:
        """Raise ``ValueError`` if the parts do not fit the budget."""
        room = self.budget - self.sinks - self.window
        if min(self.sinks, self.window - 1, self.must) < 0 or self.must > room:
            raise ValueError(
                f"rule must have 0 <= must <= budget - sinks - window and window >= 1, got {self}"
            )
        if self.recall_cap is not None and self.recall_cap < 0:
            raise ValueError(f"rule.recall_cap must not be negative, got {self.recall_cap}")


class FrameLists(NamedTuple):
    """Where to write the frames of all rows one after the other, as FlashInfer wants them."""

    indices: torch.Tensor
    """``[capacity]`` int32."""
    starts: torch.Tensor
    """``[rows + 1]`` int32: row ``r`` owns ``indices[starts[r] : starts[r + 1]]``; entries without
    a frame are given the scratch row."""


class Recalls(NamedTuple):
    """Pages that took a frame and must be filled from their backup."""

    lane_pages: torch.Tensor
    """``[capacity]`` integer."""
    lane_frames: torch.Tensor
    """``[capacity]`` integer, beside ``lane_pages``."""
    counts: torch.Tensor | None = None
    """``[groups]`` int32: each lane owns an equal share of the list and fills so many entries of
    it; ``None`` where the whole list is filled."""

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and frames of the filled entries; their number is read from the device."""
        if self.counts is None:
            return self.lane_pages, self.lane_frames
        share = torch.arange(
            self.lane_pages.shape[0] // self.counts.shape[0], device=self.lane_pages.device
        )
        own = (share < self.counts.unsqueeze(1)).flatten()
        return self.lane_pages.masked_select(own), self.lane_frames.masked_select(own)


class NewTokens(NamedTuple):
    """One new token per row."""

    lane_pages: torch.Tensor
    """``[rows]`` integer page of the token, 0 for inert rows."""
    offsets: torch.Tensor
    """``[rows]`` integer place of the token in its page."""
    k: torch.Tensor
    """``[rows, lane heads, head_dim]``."""
    v: torch.Tensor
    places: torch.Tensor | None = None
    """``[rows]`` int64 index of each token among all that the frames hold: a hint to the reference,
    which else looks up frames."""
    fills: bool = True
    """Whether some token may fill its page: a hint to the reference, which else looks."""
