"""Hooks that show what the cache does: after passes, in idle moments, on the decode log line."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from arkvale_sglang.config.settings import STREAM_OFF, ArkValeConfig
from arkvale_sglang.integration import compat, requests
from arkvale_sglang.integration.metrics import Exporter
from arkvale_sglang.runtime.broadcast import Batch, Broadcast
from arkvale_sglang.runtime.cache import PagedCache
from arkvale_sglang.runtime.counters import Snapshot
from arkvale_sglang.runtime.publish import Publisher

logger = logging.getLogger(__name__)


class Watching:
    """Wires one scheduler's cache to the stream, to Prometheus and to the log."""

    def __init__(self, config: ArkValeConfig):
        self._config = config
        self._leads = True
        self._labels: dict[str, Any] | None = None
        self._broadcast: Broadcast | None = None
        self._publisher: Publisher | None = None
        self.seconds = 0.0
        """Of this thread's processor time that telling after passes took so far."""

    @property
    def endpoint(self) -> str | None:
        """Of the stream, while this scheduler has one."""
        return self._publisher.endpoint if self._publisher else None

    def take_context(self, result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        """Learn who exports what: of several ranks only the first has a stream."""
        context = scheduler.metrics_collector_context
        self._leads = context.is_stats_logging_rank
        if context.current_scheduler_metrics_enabled:
            self._labels = context.collector.labels

    def start(self, cache: PagedCache) -> None:
        """Begin to look at the cache.

        Raises:
            ArkValeError: the stream's endpoint cannot be bound.
        """
        if self._leads and self._config.stream != STREAM_OFF:
            self._publisher = Publisher(self._config.stream)
        export = None
        if self._labels is not None:
            export = Exporter(self._labels, cache.plan.geometry).publish
        self._broadcast = Broadcast(cache, self._publisher, export)
        logging.getLogger(compat.DECODE_LOGGER).addFilter(DecodeLine(cache))

    def after_pass(
        self, result: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """After each forward pass, on its stream."""
        begin = time.thread_time()
        self._tell(lambda broadcast: _tell_pass(broadcast, runner, forward_batch))
        self.seconds += time.thread_time() - begin

    def before_idling(self, scheduler: Any) -> None:
        """Whenever the scheduler finds nothing to run, before it may sleep."""
        self._tell(Broadcast.idle)

    def _tell(self, what: Callable[[Broadcast], None]) -> None:
        """Requests must not end with what only shows them: after a failure nothing is told, and
        those who listen learn it from /server_info, which then names no stream."""
        if self._broadcast is None:
            return
        try:
            what(self._broadcast)
        except Exception:
            logger.exception("arkvale: metrics and stream end here; requests go on.")
            publisher, self._broadcast, self._publisher = self._publisher, None, None
            if publisher is not None:
                with contextlib.suppress(Exception):
                    publisher.close()


def _tell_pass(broadcast: Broadcast, runner: Any, forward_batch: Any) -> None:
    mode, rids = forward_batch.forward_mode, forward_batch.rids
    if mode.is_idle():
        return
    if not mode.is_decode():
        broadcast.after_pass(None)
    elif rids is not None:  # else a pass that only warms up
        lengths, settings = forward_batch.seq_lens_cpu, requests.settings_of(forward_batch)
        broadcast.after_pass(Batch(rids, lengths, settings, runner.attn_backend.forward_metadata))


class DecodeLine(logging.Filter):
    """Lets every line pass, and adds to SGLang's decode line what happened since the one before."""

    def __init__(self, cache: PagedCache):
        super().__init__()
        self._cache = cache
        self._before: Snapshot = cache.snapshots.latest()
        self._failed = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Add to the line, if it is one."""
        if self._failed or not isinstance(record.msg, str):
            return True
        if record.msg.startswith("Decode batch"):
            try:
                record.msg += self._words()
            except Exception:
                self._failed = True
                logger.exception("arkvale: the line about decoding goes on without its own words.")
        return True

    def _words(self) -> str:
        now, before = self._cache.snapshots.current(time.monotonic()), self._before
        self._before = now
        rate = now.hit_rate(before)
        seconds = max(now.time - before.time, 1e-9)
        recalled = (now.totals["bytes_recalled"] - before.totals["bytes_recalled"]) / seconds
        levels = now.levels
        return (
            f", arkvale hit rate: {'-' if rate is None else f'{rate:.2f}'}, "
            f"recall: {recalled / 1e6:.1f} MB/s, "
            f"frames: {levels['frames_used']}/{levels['frames_total']}"
        )
