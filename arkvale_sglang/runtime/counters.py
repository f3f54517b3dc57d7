"""What the policy did, counted where it happens and read without waiting for the device."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import NamedTuple

import torch

from arkvale_kernels import residency, select
from arkvale_sglang.core.sizing import PoolPlan

COUNTED = (*select.COUNTED, *residency.COUNTED, "")
"""Columns of the device's totals; the last is unused, so that both ops' parts begin on 16 bytes in
every layer and a kernel is compiled once for all."""
TOTALS = (
    *residency.COUNTED,
    *select.COUNTED,
    "pages_digested",
    "pages_backed_up",
    "bytes_recalled",
    "bytes_backed_up",
)
"""What is counted for every managed layer since the start; pages are lane pages."""
LEVELS = ("frames_free", "frames_hot")
"""What is measured of every managed layer at one moment, over its lanes."""


class HostTotals(NamedTuple):
    """What the host knows without the device."""

    sealed: int = 0
    """Logical pages sealed, hence digested and backed up once in every lane."""
    resident_hits: int = 0
    """Hits of steps in which nothing could be missing, over all lanes."""
    streamed: int = 0
    """Prefix tokens that prefill and full rows read where they are, per managed layer."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All counters at one moment, as plain values."""

    plan: PoolPlan
    host: HostTotals
    rows: list[list[int]]
    """Of every managed layer: the device's totals, then ``LEVELS``."""
    logical_pages_used: int
    time: float = dataclasses.field(default_factory=time.monotonic)
    """On the monotonic clock, so that what lies between two is right whatever sets the other."""

    @functools.cached_property
    def layers(self) -> list[dict[str, int]]:
        """``TOTALS`` and ``LEVELS`` of every managed layer, with its number in the model."""
        geometry = self.plan.geometry
        page = geometry.lane_page_bytes
        sealed = self.host.sealed * geometry.groups
        found = []
        for index, row in enumerate(self.rows):
            counted = dict(zip((*COUNTED, *LEVELS), row, strict=True))
            del counted[""]
            counted["page_hits"] += self.host.resident_hits // geometry.managed_layers
            found.append(
                {
                    "layer": geometry.dense_layers + index,
                    **counted,
                    "pages_digested": sealed,
                    "pages_backed_up": sealed,
                    "bytes_recalled": counted["pages_recalled"] * page,
                    "bytes_backed_up": sealed * page,
                }
            )
        return found

    @functools.cached_property
    def totals(self) -> dict[str, int]:
        """``TOTALS`` over all layers, and what is not told by layer."""
        return {
            "pages_sealed": self.host.sealed,
            "tokens_streamed": self.host.streamed,
            **{name: sum(layer[name] for layer in self.layers) for name in TOTALS},
        }

    @functools.cached_property
    def levels(self) -> dict[str, int]:
        """Frames of all lanes and logical pages: in all, and how many are in use."""
        frames = self.plan.frames * self.plan.geometry.lanes
        free, hot = (sum(layer[name] for layer in self.layers) for name in LEVELS)
        return {
            "frames_total": frames,
            "frames_used": frames - free,
            "frames_free": free,
            "frames_hot": hot,
            "logical_pages_total": self.plan.logical_pages,
            "logical_pages_used": self.logical_pages_used,
        }

    def hit_rate(self, since: Snapshot | None = None) -> float | None:
        """Hits among the pages wanted, since another snapshot or the start; ``None`` if none was
        wanted."""
        hits, misses = (
            self.totals[name] - (since.totals[name] if since else 0)
            for name in ("page_hits", "page_misses")
        )
        return hits / (hits + misses) if hits + misses else None


class Counters:
    """Totals since the start; a *page* is a lane page except in ``sealed``.

    What depends on device data is added up on the device.
    """

    def __init__(self, plan: PoolPlan, device: torch.device):
        self.device = torch.zeros(
            plan.geometry.managed_layers, len(COUNTED), dtype=torch.int64, device=device
        )
        """``[managed layers, len(COUNTED)]`` int64."""
        sizes = (len(select.COUNTED), len(residency.COUNTED), 1)
        self._of_layer = [row.split(sizes)[:2] for row in self.device]
        self._evicted = self.device[:, COUNTED.index("pages_evicted")]
        self.sealed = self.resident_hits = self.streamed = 0

    @property
    def host(self) -> HostTotals:
        """What the host counted so far."""
        return HostTotals(self.sealed, self.resident_hits, self.streamed)

    def of_layer(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Totals of one layer for the ops to add to: ``[2]`` int64 for select, ``[5]`` for
        residency."""
        return self._of_layer[layer]

    def add_evictions(self, evicted: torch.Tensor) -> None:
        """Add ``[layers]`` pages evicted to make room for new pages."""
        self._evicted += evicted
