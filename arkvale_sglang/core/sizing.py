"""How much is held where: host bytes set the logical pages, device bytes the frames."""

from __future__ import annotations

import dataclasses

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.geometry import PageGeometry

GIB = 1 << 30
HOST_SHARE = 0.5
"""Share of the free host memory taken for backups when the user names no figure."""
STAGING_TOKENS = 8192
"""Tokens of one layer that exact prefill stages at a time; bounds its device memory."""
STAGING_BUFFERS = 2
"""One is attended while the other is read."""


@dataclasses.dataclass(frozen=True)
class PoolPlan:
    """Sizes of the cache; ``logical_pages`` excludes the padding page 0."""

    geometry: PageGeometry
    logical_pages: int
    frames: int
    """Frames per lane, never more than logical pages."""

    @property
    def logical_tokens(self) -> int:
        """What the engine may fill."""
        return self.logical_pages * self.geometry.page_size

    @property
    def fits(self) -> bool:
        """Whether every logical page has a frame, so that nothing is ever evicted."""
        return self.frames >= self.logical_pages

    @property
    def host_bytes(self) -> int:
        """All backups."""
        return (self.logical_pages + 1) * self.geometry.page_host_bytes

    @property
    def digest_bytes(self) -> int:
        """All digests, on the device."""
        return (self.logical_pages + 1) * self.geometry.page_digest_bytes

    @property
    def dense_bytes(self) -> int:
        """Every page of the dense layers, on the device."""
        return (self.logical_pages + 1) * self.geometry.page_dense_bytes

    @property
    def frame_bytes(self) -> int:
        """All frames with their table entries, scratch rows included."""
        scratch = self.geometry.managed_layers * self.geometry.lane_page_bytes
        return self.frames * self.geometry.frame_bytes + scratch

    @property
    def staging_bytes(self) -> int:
        """Most device memory exact prefill stages at once: K and V of a layer's blocks."""
        geometry = self.geometry
        block = STAGING_TOKENS // geometry.page_size * geometry.groups * geometry.lane_page_bytes
        return STAGING_BUFFERS * block

    @property
    def device_bytes(self) -> int:
        """All of the above that lives on the device, and the page tables."""
        tables = (self.logical_pages + 1) * self.geometry.page_table_bytes
        held = self.digest_bytes + self.dense_bytes + self.frame_bytes
        return held + tables + self.staging_bytes

    @property
    def bytes(self) -> dict[str, int]:
        """Everything that is held, by name."""
        parts = ("host", "digest", "dense", "frame", "staging", "device")
        return {part: getattr(self, f"{part}_bytes") for part in parts}

    def describe(self) -> str:
        """One line for the start-up log."""
        page_size = self.geometry.page_size
        return (
            f"{self.logical_pages} logical pages of {page_size} tokens "
            f"({self.logical_tokens} tokens, {self.host_bytes / GIB:.3f} GiB host), "
            f"{self.frames} frames in each of {self.geometry.lanes} lanes "
            f"({self.frames * page_size} tokens, {self.frame_bytes / GIB:.3f} GiB device), "
            f"digests {self.digest_bytes / GIB:.3f} GiB, "
            f"{self.geometry.dense_layers} dense layers {self.dense_bytes / GIB:.3f} GiB, "
            f"prefill staging {self.staging_bytes / GIB:.3f} GiB"
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes the cache of one rank may use; ranks of one server plan from equal numbers."""

    device: int
    """What the engine would give the KV pool of a rank."""
    host_free: int
    """Of the whole machine."""
    shared: bool
    """Whether device and host are the same memory, as on a CPU."""
    ranks: int = 1
    """Ranks of tensor parallelism, each of which takes an equal share of the host memory."""


def plan_pool(
    config: ArkValeConfig,
    geometry: PageGeometry,
    memory: Memory,
    max_tokens: int | None = None,
) -> PoolPlan:
    """Turn memory into logical pages and frames.

    Args:
        max_tokens: cap on the logical capacity in tokens (the engine's ``--max-total-tokens``).

    Raises:
        ArkValeError: the memory named does not exist or does not suffice.
    """
    check_model(config, geometry)
    pages = _logical_pages(config, geometry, memory, max_tokens)
    plan = PoolPlan(geometry, pages, 0)
    host = plan.host_bytes if memory.shared else 0
    room = memory.device - host - plan.device_bytes
    if config.device_tokens is not None:
        frames = min(config.device_tokens // geometry.page_size, pages)
    else:
        frames = min(max(room, 0) // geometry.frame_bytes, pages)
    plan = dataclasses.replace(plan, frames=frames)
    _check_fits(config, plan, memory.device - host)
    return plan


def _logical_pages(
    config: ArkValeConfig, geometry: PageGeometry, memory: Memory, max_tokens: int | None
) -> int:
    """The tightest of what host, device and the engine's own cap allow, told apart if too tight."""
    if config.host_memory is not None:
        host = int(config.host_memory * GIB) // memory.ranks
    else:
        share = memory.device if memory.shared else memory.host_free // memory.ranks
        host = int(HOST_SHARE * share)
    if config.host_memory is not None and config.host_memory * GIB > memory.host_free:
        raise ArkValeError(
            f"--arkvale-host-memory asks for {config.host_memory:g} GiB but this machine has "
            f"{memory.host_free / GIB:.1f} GiB free; lower it or free memory."
        )
    pages = host // geometry.page_host_bytes - 1
    if pages < 1:
        where = f" on each of {memory.ranks} ranks" if memory.ranks > 1 else ""
        raise ArkValeError(
            f"{host / GIB:.4f} GiB of host memory{where} holds no page "
            f"({geometry.page_host_bytes} bytes each); raise --arkvale-host-memory."
        )
    if config.host_memory is None:
        # Digests, tables and dense layers of every logical page live on the device: leave them
        # half of it at most.
        resident = (
            geometry.page_digest_bytes + geometry.page_dense_bytes + geometry.page_table_bytes
        )
        room = memory.device - (host if memory.shared else 0)
        pages = min(pages, room // 2 // resident)
        if pages < 1:
            raise ArkValeError(
                f"{memory.device / GIB:.4f} GiB of device memory holds no page of the dense layers "
                "and digests; lower --arkvale-dense-layers or free device memory."
            )
    if max_tokens is not None and max_tokens < geometry.page_size:
        raise ArkValeError(
            f"--max-total-tokens {max_tokens} is less than one page of {geometry.page_size} "
            "tokens; raise it."
        )
    return pages if max_tokens is None else min(pages, max_tokens // geometry.page_size)


def check_model(config: ArkValeConfig, geometry: PageGeometry) -> None:
    """Raise ``ArkValeError`` where settings and the shape of the model do not fit."""
    if geometry.managed_layers < 1:
        raise ArkValeError(
            f"--arkvale-dense-layers {geometry.dense_layers} leaves none of the model's "
            f"{geometry.layers} layers to manage; lower it below {geometry.layers}."
        )
    if geometry.kv_heads % config.head_groups:
        raise ArkValeError(
            f"--arkvale-head-groups {config.head_groups} does not divide the model's "
            f"{geometry.kv_heads} KV heads per rank; choose a divisor of {geometry.kv_heads}."
        )


def _check_fits(config: ArkValeConfig, plan: PoolPlan, device: int) -> None:
    page_size = plan.geometry.page_size
    if plan.device_bytes > device:
        raise ArkValeError(
            f"{plan.logical_tokens} logical and {plan.frames * page_size} frame tokens need "
            f"{plan.device_bytes / GIB:.2f} GiB of device memory (digests "
            f"{plan.digest_bytes / GIB:.2f}, dense layers {plan.dense_bytes / GIB:.2f}, frames "
            f"{plan.frame_bytes / GIB:.2f}) but {max(device, 0) / GIB:.2f} GiB are left for them; "
            "lower --arkvale-host-memory, --arkvale-device-tokens or --arkvale-dense-layers."
        )
    need = min(config.budget_pages, plan.logical_pages) + 1
    if not plan.fits and plan.frames < need:
        raise ArkValeError(
            f"frames for {plan.frames * page_size} tokens cannot hold one request of "
            f"{config.budget} budget tokens and the page being written; raise "
            f"--arkvale-device-tokens to at least {need * page_size} or lower --arkvale-budget."
        )
