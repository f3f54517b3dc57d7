"""Public face of the digest op."""

from __future__ import annotations

import torch

from arkvale_kernels import checks
from arkvale_kernels.digest import reference

DIGEST_KINDS: tuple[str, ...] = ("cuboid-mean", "cuboid-max", "cuboid-center", "mean-std")


def build_digests(keys: torch.Tensor, kind: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Summarise full pages of keys.

    Args:
        keys: ``[pages, page_size, heads, head_dim]``, after RoPE, as stored.
        kind: one of ``DIGEST_KINDS`` (ArkVale section 5.2, equations 3 and 4).
        dtype: of the result; that of the keys if ``None``, else that or ``torch.float8_e4m3fn``,
            whose four significant bits serve the ranking and saturate at 448.

    Returns:
        ``[pages, 2, heads, head_dim]``; row 0 is the upper vector, row 1 the lower one, and
        upper >= lower in every channel.

    Raises:
        ValueError: unknown ``kind`` or ``dtype``, or ``keys`` not four-dimensional or empty pages.
    """
    dtype = keys.dtype if dtype is None else dtype
    check_kind(kind)
    checks.check_shape("keys", keys, (None, None, None, None))
    checks.check_dtype("keys", keys, *checks.FLOATS)
    checks.check_dense(keys=keys)
    if keys.shape[1] == 0:
        raise ValueError(f"keys must hold at least one token a page, got shape {tuple(keys.shape)}")
    if dtype not in (keys.dtype, torch.float8_e4m3fn):
        raise ValueError(f"dtype must be {keys.dtype} or torch.float8_e4m3fn, got {dtype}")
    if keys.is_cuda:
        from arkvale_kernels.digest import kernel

        return kernel.build_digests(keys, kind, dtype)
    return reference.build_digests(keys, kind, dtype)


def check_kind(kind: str) -> None:
    """Raise ``ValueError`` for an unknown digest kind."""
    if kind not in DIGEST_KINDS:
        raise ValueError(
            f"digest kind {kind!r} is unknown; choose one of {', '.join(DIGEST_KINDS)}"
        )
