"""What the policy did, counted where it happens."""

from __future__ import annotations

import torch

from arkvale_kernels.residency import COUNTED
from arkvale_sglang.core.sizing import PoolPlan


class Counters:
    """Totals since the start; a *page* is a lane page except in ``pages_sealed``.

    What depends on device data is added up on the device and read only by :meth:`report`.
    """

    def __init__(self, plan: PoolPlan, device: torch.device):
        self._plan = plan
        self._device = torch.zeros(
            plan.geometry.managed_layers, len(COUNTED), dtype=torch.int64, device=device
        )
        self.sealed = 0
        """Logical pages sealed, hence digested and backed up once in every lane."""
        self.resident_hits = 0
        """Hits of steps in which nothing could be missing, counted on the host."""
        self.streamed = 0
        """Prefix tokens that prefill and full rows read where they are, per managed layer."""

    def of_layer(self, layer: int) -> torch.Tensor:
        """``[5]`` int64 totals of one layer, for the residency op to add to."""
        return self._device[layer]

    def add_evictions(self, evicted: torch.Tensor) -> None:
        """Add ``[layers]`` pages evicted to make room for new pages."""
        self._device[:, COUNTED.index("pages_evicted")] += evicted

    def report(self) -> dict[str, int | float | list[dict[str, int]]]:
        """All totals by name, with bytes and the hit rate (reads the device)."""
        geometry = self._plan.geometry
        by_layer = self._device.tolist()
        totals = dict(zip(COUNTED, map(sum, zip(*by_layer, strict=True)), strict=True))
        totals["page_hits"] += self.resident_hits
        lane_pages = self.sealed * geometry.lanes
        wanted = totals["page_hits"] + totals["page_misses"]
        return {
            "pages_sealed": self.sealed,
            "pages_digested": lane_pages,
            "pages_backed_up": lane_pages,
            **totals,
            "hit_rate": totals["page_hits"] / wanted if wanted else 1.0,
            "bytes_recalled": totals["pages_recalled"] * geometry.lane_page_bytes,
            "bytes_backed_up": lane_pages * geometry.lane_page_bytes,
            "tokens_streamed": self.streamed,
            "layers": [dict(zip(COUNTED, row, strict=True)) for row in by_layer],
        }
