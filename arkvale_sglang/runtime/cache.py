"""The cache: one object that owns the store and runs every change to it in forward order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from arkvale_kernels.layout import PINNED, SCORE_BITS
from arkvale_kernels.residency import claim_frames, release_pages
from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.core.store import PageStore
from arkvale_sglang.policy.admission import FrameAdmission
from arkvale_sglang.runtime.attention import Attention
from arkvale_sglang.runtime.checksums import Checksums
from arkvale_sglang.runtime.counters import Counters
from arkvale_sglang.runtime.dropping import Dropping
from arkvale_sglang.runtime.streams import PrefixReader, TransferStream
from arkvale_sglang.runtime.watch import Snapshots


class PagedCache:
    """Store, counters and the queue of dead pages.

    Tables change on the forward stream only, in forward order: pages freed by the engine wait in
    a queue that :meth:`begin_step` drains before the next pass maps anything.
    """

    def __init__(self, config: ArkValeConfig, plan: PoolPlan, device: torch.device | str):
        self.config = config
        self.plan = plan
        self.store = PageStore(plan, device)
        self.counters = Counters(plan, self.store.device)
        self.admission = FrameAdmission(config, plan)
        self.attention = Attention()
        self.transfers = TransferStream(self.store.device)
        self.prefix = PrefixReader(self)
        self.checksums = Checksums(plan, self.store.device) if config.check_transfers else None
        self.dropping = Dropping(plan, config.sink_pages, self.store.device)
        self.clock = torch.zeros((), dtype=torch.int64, device=self.store.device)
        self._clock_span = 1
        self.live_pages: Callable[[], int] = lambda: plan.logical_pages
        """Logical pages the engine has handed out; set by the engine's allocator."""
        self.snapshots = Snapshots(self)
        self.pressed = False
        """Whether a page may lack a frame: more pages than frames were live since the last time
        none was.  While false, nothing is ever missing and steps skip looking."""
        self._dead: list[torch.Tensor] = []
        self._forget = False
        groups = plan.geometry.groups
        lanes = torch.arange(groups, device=self.store.device)
        self._lane_base = (lanes * self.store.page_stride).to(torch.int32)

    def release(self, pages: torch.Tensor) -> None:
        """Queue dead logical pages ``[pages]``; they keep their frames until the next step."""
        self._dead.append(pages)
        if self.live_pages() == 0:
            self.reset()

    def reset(self) -> None:
        """Forget every page at the next step; pages queued so far need no further word."""
        self._dead.clear()
        self._forget = True

    def settle(self) -> None:
        """Apply queued releases.  Call on the forward stream, between passes."""
        self.transfers.join()
        if self._forget:
            self.store.reset()
            self._forget = self.pressed = False
        if self._dead:
            if self.store.device.type == "cuda":
                for pages in self._dead:  # made on the scheduler's stream
                    pages.record_stream(torch.cuda.current_stream())
            dead = torch.cat(self._dead).long()
            self._dead.clear()
            release_pages(self.store.residency, dead, groups=self.plan.geometry.groups)
            self.store.sealed.index_fill_(0, dead, False)

    def begin_step(self) -> None:
        """Start a forward pass: apply releases, advance the clock, note the pressure."""
        self.settle()
        self.clock += self._clock_span
        self._clock_span = 1
        self.pressed = self._under_pressure()

    def in_one_wave(self, host_lengths: list[int]) -> bool:
        """Whether the next decode pass of rows of so many tokens can attend all at once."""
        if not self._under_pressure():
            return True
        page_counts = [-(-length // self.config.page_size) for length in host_lengths]
        return len(self.admission.waves(page_counts)) == 1

    def _under_pressure(self) -> bool:
        return self.pressed or self.live_pages() > self.plan.frames

    def waves(
        self, page_counts: list[int], settings: list[ArkValeConfig] | None
    ) -> list[tuple[int, int]]:
        """Cut a batch into runs of rows that attend together; each has its own time.

        Args:
            settings: of each row, where rows have their own; a run has one.
        """
        waves = [(0, len(page_counts))]
        limits = [own.frame_pages for own in settings] if settings else None
        if self.pressed:
            waves = self.admission.waves(page_counts, limits)
        if settings:
            cuts = {row for row in range(1, len(settings)) if settings[row] != settings[row - 1]}
            edges = sorted(cuts.union(*waves))
            waves = list(itertools.pairwise(edges))
        self._clock_span = len(waves)
        return waves

    def to_device(self, numbers: list[int]) -> torch.Tensor:
        """Host numbers as int64, without waiting for the device."""
        on_host = torch.tensor(numbers, pin_memory=self.store.device.type == "cuda")
        return on_host.to(self.store.device, non_blocking=True)

    def lane_pages(self, pages: torch.Tensor) -> torch.Tensor:
        """Logical pages ``[rows, ...]`` int32 -> lane pages ``[rows * groups, ...]``; 0 stays 0."""
        groups = self.plan.geometry.groups
        if groups == 1:
            return pages
        base = self._lane_base.view(groups, *[1] * (pages.dim() - 1))
        spread = pages.unsqueeze(1)
        return torch.where(spread > 0, spread + base, 0).to(torch.int32).flatten(0, 1)

    def claim(self, pages: torch.Tensor, is_open: torch.Tensor, evicting: int) -> None:
        """Give new logical pages ``[pages]`` a frame in every lane; open ones ``[pages]`` stay.

        Only the first ``evicting`` pages may evict others.
        """
        heat = torch.where(is_open, PINNED, self.clock << SCORE_BITS)
        groups = self.plan.geometry.groups
        evicted = claim_frames(
            self.store.residency, pages.long(), heat, groups=groups, evicting=evicting
        )
        if self.pressed:
            self.counters.add_evictions(evicted)

    def page_table(
        self, slots: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor, pages: int
    ) -> torch.Tensor:
        """Logical pages of each row, read from the engine's slot table.

        Args:
            slots: ``[requests, tokens]`` int32 slot of every token; rows: ``[rows]`` int64.
            lengths: ``[rows]`` int64 tokens of each row.
            pages: width of the result.

        Returns:
            ``[rows, pages]`` int32, 0 beyond the end of a row.
        """
        size = self.config.page_size
        table = slots[:, : pages * size : size].index_select(0, rows) >> (size.bit_length() - 1)
        table = table.to(torch.int32)
        starts = torch.arange(0, table.shape[1] * size, size, device=table.device)
        return table.masked_fill_(starts >= lengths.unsqueeze(1), 0)

    def report(self) -> dict[str, object]:
        """Settings, sizes and counters as plain values; waits for no pass.

        A pass may be under way on a GPU, so counters are the latest that arrived and queued
        releases are not applied there; what died since the last pass still counts as used.
        """
        if self.store.device.type == "cpu":
            self.settle()
        now = self.snapshots.current(time.monotonic())
        rate = now.hit_rate()
        return {
            "policy": "arkvale",
            "settings": {
                "budget_pages": self.config.budget_pages,
                "must_pages": self.config.must_pages,
                **{name: value for name, value in vars(self.config).items() if value is not None},
            },
            "sizes": self.plan.describe(),
            "bytes": self.plan.bytes,
            **now.levels,
            "logical_pages_used": self.live_pages(),
            **now.totals,
            "hit_rate": rate,
            "layers": now.layers,
            **({"violations": self.store.violations()} if self.config.check_invariants else {}),
        }
