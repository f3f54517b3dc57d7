"""The shape of a page and what it costs in bytes."""

from __future__ import annotations

import dataclasses

import torch

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError


@dataclasses.dataclass(frozen=True)
class PageGeometry:
    """Sizes fixed by the model and the settings; everything else is derived.

    A *lane* is one KV-head group of one managed layer: it decides alone which logical pages hold
    a frame.
    """

    page_size: int
    layers: int
    """All attention layers of the model on this rank."""
    dense_layers: int
    """The first layers, unmanaged."""
    kv_heads: int
    """On this rank."""
    head_dim: int
    groups: int
    """Lanes per managed layer."""
    dtype: torch.dtype
    digest_dtype: torch.dtype | None = None
    """Of the digests; ``None`` stores them as the keys are."""

    @classmethod
    def of(
        cls,
        config: ArkValeConfig,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        ranks: int = 1,
    ) -> PageGeometry:
        """What the settings make of a model's shape on one rank.

        Args:
            kv_heads: of the whole model, shared by ``ranks`` of tensor parallelism; where there
                are more ranks than heads, each head lives on several.

        Raises:
            ArkValeError: the heads cannot be shared evenly.
        """
        if kv_heads % ranks and ranks % kv_heads:
            raise ArkValeError(
                f"--tp-size {ranks} does not share the model's {kv_heads} KV heads evenly; choose "
                f"a divisor or a multiple of {kv_heads}."
            )
        return cls(
            page_size=config.page_size,
            layers=layers,
            dense_layers=config.dense_layers,
            kv_heads=max(1, kv_heads // ranks),
            head_dim=head_dim,
            groups=config.head_groups,
            dtype=dtype,
            digest_dtype=torch.float8_e4m3fn if config.digest_dtype == "fp8" else None,
        )

    @property
    def managed_layers(self) -> int:
        """Layers whose pages are evicted and recalled."""
        return self.layers - self.dense_layers

    @property
    def lanes(self) -> int:
        """Lanes of all managed layers."""
        return self.managed_layers * self.groups

    @property
    def lane_heads(self) -> int:
        """KV heads of one lane."""
        return self.kv_heads // self.groups

    @property
    def lane_page_bytes(self) -> int:
        """K and V of one page in one lane: what one recall moves."""
        return 2 * self.page_size * self.lane_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_host_bytes(self) -> int:
        """Backup of one logical page over all lanes."""
        return self.lanes * self.lane_page_bytes

    @property
    def page_dense_bytes(self) -> int:
        """One logical page in the dense layers, on the device."""
        return self.dense_layers * self.groups * self.lane_page_bytes

    @property
    def page_digest_bytes(self) -> int:
        """Digests of one logical page over all lanes: two vectors per KV head."""
        itemsize = (self.digest_dtype or self.dtype).itemsize
        return self.lanes * 2 * self.lane_heads * self.head_dim * itemsize

    @property
    def page_table_bytes(self) -> int:
        """Table entries of one logical page: an int32 per lane and the sealed bit."""
        return 4 * self.lanes + 1

    @property
    def frame_bytes(self) -> int:
        """One frame in every lane, with its two table entries."""
        return self.page_host_bytes + 12 * self.lanes
