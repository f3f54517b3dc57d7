"""The tensors of the cache: pages, digests, backups, tables, and the laws they obey."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch

from arkvale_kernels.layout import FREE, PINNED, PagedLayer, Residency
from arkvale_sglang.config.settings import ArkValeError
from arkvale_sglang.core.sizing import PoolPlan


class DenseLayer(NamedTuple):
    """One unmanaged layer: every logical page has its place, so page id and frame agree."""

    k_frames: torch.Tensor
    """``[logical pages + 1, page_size, heads, head_dim]``."""
    v_frames: torch.Tensor


class PageStore:
    """Everything the cache holds, allocated once.

    Logical page 0 is the engine's padding page: it has table entries that stay empty and is
    never sealed, recalled or attended in a managed layer.
    """

    def __init__(self, plan: PoolPlan, device: torch.device | str):
        geometry = plan.geometry
        self.plan = plan
        self.device = torch.device(device)
        self.page_stride = plan.logical_pages + 1
        lane_pages = geometry.groups * self.page_stride
        lane_frames = geometry.groups * plan.frames + 1
        page = (geometry.page_size, geometry.lane_heads, geometry.head_dim)
        layers = geometry.managed_layers
        allocate = functools.partial(_zeros, dtype=geometry.dtype, device=self.device)
        self.k_frames = allocate((layers, lane_frames, *page))
        self.v_frames = allocate((layers, lane_frames, *page))
        digest_dtype = geometry.digest_dtype or geometry.dtype
        self.digests = _zeros((layers, lane_pages, 2, *page[1:]), digest_dtype, self.device)
        self.host = _host_zeros((layers, lane_pages, 2, *page), geometry.dtype, self.device)
        tables = functools.partial(torch.full, device=self.device)
        self.residency = Residency(
            frame_of=tables((layers, lane_pages), -1, dtype=torch.int32),
            page_in=tables((layers, lane_frames), -1, dtype=torch.int32),
            heat=tables((layers, lane_frames), FREE, dtype=torch.int64),
        )
        self.sealed = torch.zeros(self.page_stride, dtype=torch.bool, device=self.device)
        self.managed = [
            PagedLayer(k, v, host, digests, Residency(*tables_of_layer))
            for k, v, host, digests, *tables_of_layer in zip(
                self.k_frames, self.v_frames, self.host, self.digests, *self.residency, strict=True
            )
        ]
        whole = (self.page_stride, geometry.page_size, geometry.kv_heads, geometry.head_dim)
        self.dense = [
            DenseLayer(allocate(whole), allocate(whole)) for _ in range(geometry.dense_layers)
        ]
        self.reset()

    def reset(self) -> None:
        """Forget every page."""
        self.residency.frame_of.fill_(-1)
        self.residency.page_in.fill_(-1)
        self.residency.heat.fill_(FREE)
        self.residency.heat[:, -1] = PINNED
        self.sealed.fill_(False)

    def frames_used(self) -> int:
        """Frames that hold a page, over all lanes (reads the device)."""
        return int((self.residency.page_in >= 0).sum())

    def violations(self, live: Collection[int] | None = None) -> list[str]:
        """Laws of the tables that do not hold, one sentence each (reads the device).

        Args:
            live: logical pages the engine has handed out; ``None`` if the caller cannot say.
        """
        found = [
            f"layer {index}: {law}"
            for index, layer in enumerate(self.managed)
            for law in self._broken(*(table.long() for table in layer.residency))
        ]
        if self.sealed[0]:
            found.append("the padding page is sealed")
        if live is not None:
            resident = (self.residency.frame_of >= 0).nonzero()[:, 1] % self.page_stride
            sealed = self.sealed.nonzero()[:, 0]
            for what, pages in (("resident", resident), ("sealed", sealed)):
                if not set(pages.tolist()) <= {0, *live}:
                    found.append(f"a {what} page is not live")
        return found

    def _broken(
        self, frame_of: torch.Tensor, page_in: torch.Tensor, heat: torch.Tensor
    ) -> Iterator[str]:
        """Laws that the tables of one layer break."""
        stride, last = self.page_stride, page_in.shape[0] - 1
        pages = (frame_of >= 0).nonzero().squeeze(1)
        if (frame_of > last).any():
            yield "a page's frame does not hold that page"
            return
        frames = frame_of[pages]
        if not torch.equal(page_in[frames], pages):
            yield "a page's frame does not hold that page"
        if int((page_in >= 0).sum()) != pages.numel():
            yield "frames and pages are not paired one to one"
        if not torch.equal(pages // stride, frames // self.plan.frames):
            yield "a page holds a frame of another lane"
        frames_per_lane = self.plan.frames
        occupied, free = (page_in[:last] >= 0).long(), (heat[:last] == FREE).long()
        lanes = (occupied + free).split(frames_per_lane)
        if any(int(lane.sum()) != frames_per_lane for lane in lanes):
            yield "frames used and free do not add up"
        if not torch.equal(heat[:last] == FREE, page_in[:last] < 0):
            yield "a free frame holds a page or a used one is free"
        if heat[last] != PINNED or page_in[last] != -1:
            yield "the scratch row is in use"
        if (pages % stride == 0).any():
            yield "the padding page holds a frame"
        is_open = ~self.sealed[pages % stride]
        if (is_open != (heat[frames] == PINNED)).any():
            yield "an open page may be evicted or a sealed one may not"


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that, on a CPU, take memory only once they are written.

    Frames must never hold NaN: the unwritten tail of an open page is masked, not skipped, and
    zero times NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape)


def _host_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Pinned where the device is not the host.  Torch's own pinned allocations are rounded up to a
    power of two, which for most of a machine's memory is more than it has."""
    zeros = _zeros(shape, dtype, torch.device("cpu"))
    if device.type == "cuda":
        error = torch.cuda.cudart().cudaHostRegister(zeros.data_ptr(), zeros.nbytes, 0)
        if int(error) != 0:
            raise ArkValeError(
                f"CUDA cannot pin {zeros.nbytes / (1 << 30):.1f} GiB of host memory (error "
                f"{int(error)}); lower --arkvale-host-memory."
            )
    return zeros
