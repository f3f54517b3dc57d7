"""The policy's Prometheus metrics, on SGLang's own ``/metrics`` and with SGLang's labels.

SGLang exports in multiprocess mode, which prometheus_client decides when it is imported, so it is
imported here only once SGLang has set that up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.runtime.counters import LEVELS, TOTALS, Snapshot

PREFIX = "sglang:arkvale_"
PER_LAYER = {
    "page_hits": "Wanted pages that held a frame.",
    "page_misses": "Wanted pages that held none.",
    "pages_recalled": "Pages copied from the host to a frame, once for all rows that miss them.",
    "pages_evicted": "Pages that gave up their frame to another.",
    "pages_refused": "Missed pages for which no frame could be had.",
    "forced_fills": "Misses beyond the must pages, for want of resident pages to fill the list.",
    "pages_withheld": "Misses among the must pages that the recall cap gave up.",
    "pages_digested": "Pages summarised.",
    "pages_backed_up": "Pages copied to the host.",
    "bytes_recalled": "Bytes copied from the host to frames.",
    "bytes_backed_up": "Bytes copied to the host.",
}
"""Counters by layer, in pages of a lane; the exposed names end in ``_total``."""
OVERALL = {
    "pages_sealed": "Logical pages that were filled.",
    "tokens_streamed": "Prefix tokens that prefill and full requests read where they are, in each "
    "managed layer.",
    "stream_dropped": "Messages of the stream that some subscriber lost.",
}
"""Counters without a layer."""
LAYER_LEVELS = {
    "frames_free": "Frames that hold no page.",
    "frames_hot": "Frames whose page was used in one of the latest 4 passes or is being written.",
}
OVERALL_LEVELS = {
    "frames": "Frames of all lanes.",
    "logical_pages": "Logical pages, as many as the host backs up.",
    "logical_pages_used": "Logical pages held by requests or the radix tree.",
    "hit_rate": "Share of wanted pages that held a frame, since the last export.",
}
assert set(PER_LAYER) == set(TOTALS) and set(LAYER_LEVELS) == set(LEVELS)


class Exporter:
    """Publishes snapshots as metrics.

    Args:
        labels: SGLang's own, of this scheduler.
    """

    def __init__(self, labels: Mapping[str, Any], geometry: PageGeometry):
        from prometheus_client import Counter, Gauge

        own = {name: str(value) for name, value in labels.items()}
        layers = [str(number) for number in range(geometry.dense_layers, geometry.layers)]

        def made(kind: Any, names: Mapping[str, str], by_layer: bool, **options: Any) -> Any:
            found = {}
            for name, text in names.items():
                label_names = [*own, "layer"] if by_layer else [*own]
                metric = kind(PREFIX + name, text, labelnames=label_names, **options)
                found[name] = (
                    [metric.labels(**own, layer=layer) for layer in layers]
                    if by_layer
                    else metric.labels(**own)
                )
            return found

        recent = {"multiprocess_mode": "mostrecent"}
        self._by_layer = made(Counter, PER_LAYER, True)
        self._overall = made(Counter, OVERALL, False)
        self._layer_levels = made(Gauge, LAYER_LEVELS, True, **recent)
        self._levels = made(Gauge, OVERALL_LEVELS, False, **recent)
        self._before: Snapshot | None = None
        self._dropped = 0

    def publish(self, now: Snapshot, dropped: int) -> None:
        """Bring all metrics up to date; ``dropped`` are messages of the stream in all."""
        before = self._before
        for index, layer in enumerate(now.layers):
            earlier = before.layers[index] if before else dict.fromkeys(layer, 0)
            for name, counters in self._by_layer.items():
                if layer[name] > earlier[name]:
                    counters[index].inc(layer[name] - earlier[name])
            for name, gauges in self._layer_levels.items():
                if before is None or layer[name] != earlier[name]:
                    gauges[index].set(layer[name])
        for name in ("pages_sealed", "tokens_streamed"):
            grown = now.totals[name] - (before.totals[name] if before else 0)
            self._overall[name].inc(grown)
        self._overall["stream_dropped"].inc(dropped - self._dropped)
        self._levels["frames"].set(now.levels["frames_total"])
        self._levels["logical_pages"].set(now.levels["logical_pages_total"])
        self._levels["logical_pages_used"].set(now.levels["logical_pages_used"])
        rate = now.hit_rate(before)
        if rate is not None:
            self._levels["hit_rate"].set(rate)
        self._before, self._dropped = now, dropped
