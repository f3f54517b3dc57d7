"""What shows the cache never ends what it shows."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import torch

from arkvale_sglang.config.settings import STREAM_OFF, ArkValeConfig
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.integration.watching import Watching
from arkvale_sglang.runtime.broadcast import Broadcast
from arkvale_sglang.runtime.cache import PagedCache


def test_a_failure_to_tell_is_logged_once_and_requests_go_on(monkeypatch, caplog):
    config = ArkValeConfig(dense_layers=0, stream=STREAM_OFF)
    geometry = PageGeometry.of(config, layers=1, kv_heads=1, head_dim=8, dtype=torch.float32)
    watching = Watching(config)
    watching.start(PagedCache(config, PoolPlan(geometry, 8, 8), "cpu"))
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
