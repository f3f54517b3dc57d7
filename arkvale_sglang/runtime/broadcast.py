"""What the cache does, told to those who listen: messages of the stream, counters for export."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.runtime.cache import PagedCache
from arkvale_sglang.runtime.counters import Snapshot
from arkvale_sglang.runtime.decode import DecodeStep
from arkvale_sglang.runtime.publish import PAGES, STATS, Publisher
from arkvale_sglang.runtime.watch import HostCopy, PageStates

STATS_SECONDS = 0.5
"""Least time between two ``STATS`` messages while passes run."""
EXPORT_SECONDS = 2.0
"""Least time between two exports of the counters."""
_PER_SECOND = ("pages_recalled", "bytes_recalled", "pages_evicted", "bytes_backed_up")
_WAITING = 64
"""Steps whose page states may be under way to the host."""
_LONG_AGO = -float("inf")


class Batch(NamedTuple):
    """A decode pass that just ran."""

    rids: list[str]
    """The engine's name of each row's request."""
    lengths: torch.Tensor
    """``[rows or more]`` integers on the host: tokens of each row, the new one included."""
    settings: list[ArkValeConfig] | None
    """Of each row, where some request brought its own."""
    step: DecodeStep


class _Steps(NamedTuple):
    """Decode passes since the start."""

    steps: int = 0
    calm: int = 0
    tokens: int = 0


class _Copied(NamedTuple):
    """Page states of a step on their way."""

    states: HostCopy
    rids: list[str]
    lengths: list[int]
    pages: list[int]
    waves: int
    time: float
    """On the monotonic clock, as everywhere here but in what is sent."""


class Broadcast:
    """Looks at the cache after passes and in idle moments.

    While nobody listens a pass costs a look at the clock and one at the socket; on a GPU, and where
    counters are exported, also a snapshot every ``STATS_SECONDS``.

    Args:
        publisher: of the stream; ``None`` where there is none.
        export: takes a snapshot and the messages dropped, every ``EXPORT_SECONDS`` at most.
    """

    def __init__(
        self,
        cache: PagedCache,
        publisher: Publisher | None,
        export: Callable[[Snapshot, int], None] | None = None,
    ):
        self._cache, self._publisher, self._export = cache, publisher, export
        self._pages = PageStates(cache)
        self._copied: collections.deque[_Copied] = collections.deque()
        self._steps = _Steps()
        self._rids: list[str] = []
        self._began: dict[str, tuple[float, int]] = {}
        """When each request's first decode pass ended, and its tokens then."""
        self._lengths = torch.zeros(0)
        self._settings: list[ArkValeConfig] | None = None
        self._idle = False
        self._taken = self._exported = _LONG_AGO
        self._due = False
        """Whether a snapshot was asked for that has not arrived yet."""
        self._sent: tuple[Snapshot, _Steps] | None = None
        """What the last ``STATS`` message told."""

    def after_pass(self, batch: Batch | None) -> None:
        """Call on the forward stream after each pass; ``batch`` is ``None`` if it was a prefill."""
        now = time.monotonic()
        self._idle = False
        if batch is not None:
            self._note(batch, now)
        came = self._publisher is not None and self._publisher.poll()
        self._watch_pages(batch, now)
        if (came or now - self._taken >= STATS_SECONDS) and self._listens():
            self._take(now)
        self._tell()

    def idle(self) -> None:
        """Call whenever there is nothing to run."""
        came = self._publisher is not None and self._publisher.poll()
        if not self._idle:
            self._idle, came = True, True
            self._rids, self._began, self._exported = [], {}, _LONG_AGO
        if came and self._listens():
            self._take(time.monotonic())
        self._send_pages()
        self._tell()

    def _note(self, batch: Batch, now: float) -> None:
        steps, calm, tokens = self._steps
        self._steps = _Steps(steps + 1, calm + batch.step.calm, tokens + len(batch.rids))
        self._lengths, self._settings = batch.lengths, batch.settings
        if batch.rids != self._rids:
            self._rids = list(batch.rids)
            began = zip(self._rids, batch.lengths.tolist(), strict=False)
            self._began = {rid: self._began.get(rid, (now, length)) for rid, length in began}

    def _listens(self) -> bool:
        """Whether anybody wants counters; on a GPU what they were last is told to all who ask."""
        if self._export is not None or self._cache.store.device.type != "cpu":
            return True
        return self._publisher is not None and self._publisher.wants(STATS)

    def _take(self, now: float) -> None:
        self._cache.snapshots.take(now)
        self._taken, self._due = now, True

    def _tell(self) -> None:
        """Pass on the snapshot that was asked for, once it is there."""
        if not self._due:
            return
        latest = self._cache.snapshots.latest()
        if latest.time < self._taken:
            return
        self._due = False
        dropped = self._publisher.dropped if self._publisher else 0
        if self._export is not None and latest.time - self._exported >= EXPORT_SECONDS:
            self._exported = latest.time
            self._export(latest, dropped)
        if self._publisher is None or not self._publisher.wants(STATS):
            self._sent = None
            return
        self._publisher.send(STATS, {**self._stats(latest), "dropped": dropped})
        self._sent = latest, self._steps

    def _stats(self, latest: Snapshot) -> dict[str, Any]:
        """A ``STATS`` message but for its sequence; see docs/metrics.md."""
        before, earlier = self._sent or (latest, self._steps)
        interval = latest.time - before.time
        grown = {name: latest.totals[name] - before.totals[name] for name in _PER_SECOND}
        steps, calm, tokens = (now - then for now, then in zip(self._steps, earlier, strict=True))
        grown |= {"steps": steps, "tokens": tokens}
        return {
            "time": _since_epoch(latest.time),
            "interval": interval,
            "idle": self._idle,
            "calm": calm / steps if steps else None,
            "hit_rate": latest.hit_rate(before),
            "per_second": {
                name: value / interval if interval > 0 else 0.0 for name, value in grown.items()
            },
            "totals": latest.totals,
            "levels": latest.levels,
            "layers": latest.layers,
            "requests": self._requests(latest.time),
        }

    def _requests(self, now: float) -> list[dict[str, Any]]:
        """The rows of the latest decode pass."""
        size = self._cache.config.page_size
        found = []
        for row, rid in enumerate(self._rids):
            began, first = self._began[rid]
            tokens = int(self._lengths[row])
            settings = self._settings[row] if self._settings else self._cache.config
            more = tokens - first
            found.append(
                {
                    "rid": rid,
                    "tokens": tokens,
                    "pages": -(-tokens // size),
                    "budget": None if settings.policy == "full" else settings.budget,
                    "ms_per_token": 1e3 * (now - began) / more if more else None,
                }
            )
        return found

    def _watch_pages(self, batch: Batch | None, now: float) -> None:
        if self._publisher is None or not self._publisher.wants(PAGES):
            self._pages.forget()
            self._copied.clear()
            return
        if batch is None:
            self._pages.note()
        else:
            size = self._cache.config.page_size
            lengths = batch.lengths[: len(batch.rids)].tolist()
            pages = [-(-length // size) for length in lengths]
            states = self._pages.of_step(batch.step, pages)
            if states is not None:
                waves = len(batch.step.waves)
                self._copied.append(_Copied(states, list(batch.rids), lengths, pages, waves, now))
        self._send_pages()

    def _send_pages(self) -> None:
        """Send what has arrived on the host, a message per step and request."""
        assert self._publisher is not None or not self._copied
        while len(self._copied) > _WAITING and self._publisher is not None:
            self._publisher.dropped += len(self._copied.popleft().rids)
        geometry = self._cache.plan.geometry
        layers = list(range(geometry.dense_layers, geometry.layers))
        while self._copied and self._copied[0].states.done and self._publisher is not None:
            copied = self._copied.popleft()
            when = _since_epoch(copied.time)
            for row, rid in enumerate(copied.rids):
                states = copied.states.tensor[:, row, :, : copied.pages[row]]
                header = {
                    "time": when,
                    "rid": rid,
                    "tokens": copied.lengths[row],
                    "layers": layers,
                    "shape": list(states.shape),
                    "waves": copied.waves,
                }
                self._publisher.send(PAGES, header, states.contiguous().numpy().tobytes())


def _since_epoch(moment: float) -> float:
    """Seconds since the epoch at a moment of the monotonic clock."""
    return time.time() - time.monotonic() + moment
