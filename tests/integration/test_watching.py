"""What shows the cache never ends what it shows."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import torch

from arkvale_sglang.config.settings import STREAM_OFF, ArkValeConfig
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.integration.watching import DecodeLine, Watching
from arkvale_sglang.runtime.broadcast import Broadcast
from arkvale_sglang.runtime.cache import PagedCache
from arkvale_sglang.runtime.counters import COUNTED
from arkvale_sglang.runtime.publish import Publisher


def started(stream: str | None) -> tuple[Watching, PagedCache]:
    config = ArkValeConfig(dense_layers=0, stream=stream)
    geometry = PageGeometry.of(config, layers=1, kv_heads=1, head_dim=8, dtype=torch.float32)
    watching, cache = Watching(config), PagedCache(config, PoolPlan(geometry, 8, 8), "cpu")
    watching.start(cache)
    return watching, cache


def test_a_failure_to_tell_is_logged_once_and_requests_go_on(monkeypatch, caplog):
    watching, _ = started(STREAM_OFF)
    calls = []

    def broken(broadcast, batch=None):
        calls.append(batch)
        raise OSError("no space left")

    monkeypatch.setattr(Broadcast, "after_pass", broken)
    mode = SimpleNamespace(is_idle=lambda: False, is_decode=lambda: False)
    batch = SimpleNamespace(forward_mode=mode, rids=None)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            watching.after_pass(None, None, batch)
        watching.before_idling(None)
    assert len(calls) == 1 and caplog.text.count("requests go on") == 1
    assert "no space left" in caplog.text


def test_the_time_that_telling_takes_is_told(monkeypatch):
    """Of the thread: a scheduler that is stopped or waits meanwhile spends none."""
    watching, _ = started(STREAM_OFF)
    clock = iter([1.0, 1.25, 7.0, 7.5])
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    mode = SimpleNamespace(is_idle=lambda: False, is_decode=lambda: False)
    for _ in range(2):
        watching.after_pass(None, None, SimpleNamespace(forward_mode=mode, rids=None))
    assert watching.seconds == 0.75


def test_a_stream_that_failed_is_closed_and_no_longer_named(monkeypatch):
    watching, _ = started(None)
    endpoint = watching.endpoint
    assert endpoint is not None
    monkeypatch.setattr(Broadcast, "idle", lambda broadcast: 1 / 0)
    watching.before_idling(None)
    assert watching.endpoint is None
    Publisher(endpoint).close()  # nobody else is there


def test_a_pass_that_cannot_be_described_ends_the_telling_and_not_the_pass(caplog):
    """Whatever SGLang's batch lacks of what is only shown."""
    watching, _ = started(None)
    mode = SimpleNamespace(is_idle=lambda: False, is_decode=lambda: True)
    watching.after_pass(None, None, SimpleNamespace(forward_mode=mode, rids=["one"]))
    assert watching.endpoint is None and caplog.text.count("requests go on") == 1


def test_a_decode_line_passes_when_its_own_words_fail(monkeypatch, caplog):
    _, cache = started(STREAM_OFF)
    line = DecodeLine(cache)
    monkeypatch.setattr(cache.snapshots, "current", lambda now: 1 / 0)
    for _ in range(2):
        record = logging.makeLogRecord({"msg": "Decode batch, #running-req: 1"})
        assert line.filter(record) and record.msg == "Decode batch, #running-req: 1"
    assert caplog.text.count("goes on without its own words") == 1


def test_a_decode_line_tells_rates_whatever_is_done_to_the_clock(monkeypatch):
    _, cache = started(STREAM_OFF)
    line = DecodeLine(cache)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    cache.counters.device[0, COUNTED.index("pages_recalled")] += 10**6
    record = logging.makeLogRecord({"msg": "Decode batch"})
    line.filter(record)
    recalled = float(record.msg.split("recall: ")[1].split(" MB/s")[0])
    assert 0 < recalled < 10**9, "seconds lie between, not none"
