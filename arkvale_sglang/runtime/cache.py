"""The cache: one object that owns the store and runs every change to it in forward order."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arkvale_kernels.digest import build_digests
from arkvale_kernels.residency import PINNED, claim_frames, release_pages
from arkvale_kernels.transfer import back_up_pages
from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.core.store import ManagedLayer, PageStore
from arkvale_sglang.policy.admission import FrameAdmission
from arkvale_sglang.runtime.counters import Counters


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
        self.clock = torch.zeros((), dtype=torch.int64, device=self.store.device)
        self.live_pages: Callable[[], int] = lambda: plan.logical_pages
        """Logical pages the engine has handed out; set by the engine's allocator."""
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
        if self._forget:
            self.store.reset()
            self._forget = self.pressed = False
        if self._dead:
            dead = torch.cat(self._dead).long()
            self._dead.clear()
            release_pages(self.store.residency, dead, groups=self.plan.geometry.groups)
            self.store.sealed.index_fill_(0, dead, False)

    def begin_step(self) -> None:
        """Start a forward pass: apply releases, advance the clock, note the pressure."""
        self.settle()
        self.clock += 1
        self.pressed = self.pressed or self.live_pages() > self.plan.frames

    def lane_pages(self, pages: torch.Tensor) -> torch.Tensor:
        """Logical pages ``[rows, ...]`` int32 -> lane pages ``[rows * groups, ...]``; 0 stays 0."""
        groups = self.plan.geometry.groups
        if groups == 1:
            return pages
        base = self._lane_base.view(groups, *[1] * (pages.dim() - 1))
        spread = pages.unsqueeze(1)
        return torch.where(spread > 0, spread + base, 0).flatten(0, 1)

    def claim(self, pages: torch.Tensor, is_open: torch.Tensor, evicting: int) -> None:
        """Give new logical pages ``[pages]`` a frame in every lane; open ones ``[pages]`` stay.

        Only the first ``evicting`` pages may evict others.
        """
        heat = torch.where(is_open, PINNED, self.clock << 32)
        groups = self.plan.geometry.groups
        evicted = claim_frames(
            self.store.residency, pages.long(), heat, groups=groups, evicting=evicting
        )
        if self.pressed:
            self.counters.add_evictions(evicted)

    def mark_sealed(self, pages: torch.Tensor) -> None:
        """Note logical pages ``[pages]`` int64 that this pass seals in every layer."""
        self.store.sealed.index_fill_(0, pages, True)
        self.counters.sealed += pages.shape[0]

    def seal(
        self, layer: ManagedLayer, lane_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Digest and back up full pages of one layer, once in their life.

        Args:
            lane_pages: ``[pages]`` int64; k, v: ``[pages, page_size, lane heads, head_dim]``.
        """
        layer.digests.index_copy_(0, lane_pages, build_digests(k, self.config.digest))
        back_up_pages(layer.host, lane_pages, k, v)

    def seal_frames(
        self, layer: ManagedLayer, lane_pages: torch.Tensor, lane_frames: torch.Tensor
    ) -> None:
        """Seal open pages that just became full in their frames, which may leave from now on."""
        k = layer.k_frames.index_select(0, lane_frames)
        v = layer.v_frames.index_select(0, lane_frames)
        self.seal(layer, lane_pages, k, v)
        layer.residency.heat.index_copy_(
            0, lane_frames.long(), (self.clock << 32).expand(lane_frames.shape[0])
        )

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
        starts = torch.arange(0, table.shape[1] * size, size, device=table.device)
        return table.masked_fill_(starts >= lengths.unsqueeze(1), 0)

    def report(self) -> dict[str, object]:
        """Settings, sizes and counters as plain values (reads the device; call between passes)."""
        self.settle()
        return {
            "policy": "arkvale",
            "settings": {
                "budget_pages": self.config.budget_pages,
                "must_pages": self.config.must_pages,
                **{name: value for name, value in vars(self.config).items() if value is not None},
            },
            "sizes": self.plan.describe(),
            "frames_total": self.plan.frames * self.plan.geometry.lanes,
            "frames_used": self.store.frames_used(),
            "logical_pages_total": self.plan.logical_pages,
            "logical_pages_used": self.live_pages(),
            **self.counters.report(),
            **({"violations": self.store.violations()} if self.config.check_invariants else {}),
        }
