"""Looking at the cache after a pass, without holding it up.

Everything here is queued behind the pass on its stream and copied to pinned memory; it is read at a
later pass, once the copy is done.  On a CPU it is there at once.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

import torch

from arkvale_kernels.layout import FREE, PINNED, SCORE_BITS
from arkvale_sglang.runtime.counters import COUNTED, LEVELS, HostTotals, Snapshot

if TYPE_CHECKING:
    from arkvale_sglang.runtime.cache import PagedCache
    from arkvale_sglang.runtime.decode import DecodeStep

HOT_PASSES = 4
"""A frame is hot if its page was used in so many of the latest passes, or is being written."""
STATES = ("absent", "resident", "attended", "recalled")
"""What a step did to a page in a lane, as ``uint8``; a recalled page was attended too."""


class HostCopy:
    """A tensor on its way to the host; on a CPU the tensor itself, which nobody may write to."""

    def __init__(self, tensor: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream().record_event()

    @property
    def done(self) -> bool:
        """Whether it has arrived; never waits."""
        return self._event is None or self._event.query()

    @property
    def tensor(self) -> torch.Tensor:
        """The copy; only once it is done."""
        if not self.done:
            raise RuntimeError("the copy is still under way")
        return self._tensor


class Snapshots:
    """Takes snapshots of all counters and keeps the latest that has arrived."""

    def __init__(self, cache: PagedCache):
        self._cache = cache
        self._pending: collections.deque[tuple[HostCopy, HostTotals, int, float]] = (
            collections.deque(maxlen=4)
        )
        plan = cache.plan
        nothing = [*[0] * len(COUNTED), plan.frames * plan.geometry.groups, 0]
        rows = [nothing] * plan.geometry.managed_layers
        self._latest = Snapshot(plan, HostTotals(), rows, 0)

    def take(self, now: float) -> None:
        """Start one, of what the passes given to the current stream so far leave.

        ``now`` is on the monotonic clock.
        """
        cache = self._cache
        copied = HostCopy(torch.cat((cache.counters.device, self._levels()), 1))
        self._pending.append((copied, cache.counters.host, cache.live_pages(), now))

    def _levels(self) -> torch.Tensor:
        """``[managed layers, len(LEVELS)]`` int64."""
        heat = self._cache.store.residency.heat[:, :-1]
        oldest = (self._cache.clock - (HOT_PASSES - 1)).clamp_(min=0) << SCORE_BITS
        levels = [(heat == FREE).sum(1), (heat >= oldest).sum(1)]
        assert len(levels) == len(LEVELS)
        return torch.stack(levels, 1)

    def latest(self) -> Snapshot:
        """The newest that has arrived; never waits."""
        while self._pending and self._pending[0][0].done:
            copied, host, live, when = self._pending.popleft()
            self._latest = Snapshot(self._cache.plan, host, copied.tensor.tolist(), live, when)
        return self._latest

    def current(self, now: float) -> Snapshot:
        """On a CPU one of this moment, elsewhere the latest."""
        if self._cache.store.device.type == "cpu":
            self.take(now)
        return self.latest()


class PageStates:
    """What each decode step did to the pages of its requests, told from the tables after it.

    A page that several requests share has one state: it is attended if any of them attended to it.
    Of a step in several waves the tables tell what the last one left: what a later wave evicted
    reads as absent, although an earlier one attended to it.
    """

    def __init__(self, cache: PagedCache):
        self._cache = cache
        self._before: torch.Tensor | None = None

    def note(self) -> None:
        """Remember who is resident after a pass, for the next step to be compared with."""
        self._before = self._cache.store.residency.frame_of.clone()

    def forget(self) -> None:
        """Nobody asks any more."""
        self._before = None

    def of_step(self, step: DecodeStep, page_counts: list[int]) -> HostCopy | None:
        """States of all pages of a batch after the step that attended to them.

        Args:
            step: the pass that ran last.
            page_counts: pages of each row; entries beyond them are undefined.

        Returns:
            ``[managed layers, rows, groups, pages]`` uint8, see ``STATES``; ``None`` the first
            time, when what was resident before is not known.
        """
        before = self._before
        self.note()
        if before is None:
            return None
        cache, tables = self._cache, self._cache.store.residency
        rows, width = len(page_counts), max(page_counts)
        lane_rows = rows * cache.plan.geometry.groups
        lane_pages = cache.lane_pages(step.pages[:rows, :width].contiguous()).view(-1)
        frames = tables.frame_of.index_select(1, lane_pages)
        held = frames.clamp(min=0).long()
        heat = tables.heat.gather(1, held)
        resident = frames >= 0
        # Steps that choose nothing attend to everything and keep no heat.
        used = resident if step.calm else resident & (heat >= cache.clock << SCORE_BITS)
        moved = before.index_select(1, lane_pages) != frames
        recalled = used & moved & (heat != PINNED)  # a page that was just opened was never away
        states = resident.to(torch.uint8) + used + recalled
        for wave in step.waves:
            if wave.sequences is not None:  # full rows read what is away where it is
                states.view(-1, lane_rows, width)[:, wave.lane_rows] = STATES.index("attended")
        return HostCopy(states.view(-1, rows, cache.plan.geometry.groups, width))
