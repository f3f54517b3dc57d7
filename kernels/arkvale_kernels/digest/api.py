"""Public face of the digest op."""

from __future__ import annotations

import torch

from arkvale_kernels.checks import check_shape
from arkvale_kernels.digest import reference

DIGEST_KINDS: tuple[str, ...] = ("cuboid-mean", "cuboid-max", "cuboid-center", "mean-std")


def build_digests(keys: torch.Tensor, kind: str) -> torch.Tensor:
    """Summarise full pages of keys.

    Args:
        keys: ``[pages, page_size, heads, head_dim]``, after RoPE, as stored.
        kind: one of ``DIGEST_KINDS`` (ArkVale section 5.2, equations 3 and 4).

    Returns:
        ``[pages, 2, heads, head_dim]`` in the dtype of ``keys``; row 0 is the upper
        vector, row 1 the lower one, and upper >= lower in every channel.

    Raises:
        ValueError: unknown ``kind`` or ``keys`` not four-dimensional.
    """
    if kind not in DIGEST_KINDS:
        raise ValueError(
            f"digest kind {kind!r} is unknown; choose one of {', '.join(DIGEST_KINDS)}"
        )
    check_shape("keys", keys, (None, None, None, None))
    return reference.build_digests(keys, kind)
