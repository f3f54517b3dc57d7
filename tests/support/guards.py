"""Tensors between guard bands: whatever a kernel writes where it must not is found out.

Shares no code with the implementation and imports none of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

BAND = 256
"""Bytes before and behind a tensor; a multiple of every alignment that kernels rely on."""
_NAN, _ODD = 0xFF, 0x5A
"""Bytes that make a NaN of every float, and an integer that is no id, place or mark."""


@dataclasses.dataclass
class _Held:
    whole: torch.Tensor
    before: torch.Tensor
    writable: torch.Tensor


class Guards:
    """Hands out tensors inside larger allocations and remembers what these looked like."""

    def __init__(self) -> None:
        self._held: list[_Held] = []

    def empty(
        self, *shape: int, dtype: torch.dtype = torch.float32, row_stride: int | None = None
    ) -> torch.Tensor:
        """NaN or odd integers between bands; rows may lie further apart than they are wide."""
        rows, width = shape[:-1], shape[-1]
        stride = width if row_stride is None else row_stride
        count = torch.Size(rows).numel() * stride
        fill = _NAN if dtype.is_floating_point else _ODD
        whole = torch.full((count * dtype.itemsize + 2 * BAND,), fill, dtype=torch.uint8)
        allowed = torch.zeros_like(whole, dtype=torch.bool)
        allowed[BAND:-BAND].view(*rows, stride * dtype.itemsize)[..., : width * dtype.itemsize] = 1
        self._held.append(_Held(whole, whole.clone(), allowed))
        return whole[BAND:-BAND].view(dtype).view(*rows, stride)[..., :width]

    def hold(
        self, tensor: torch.Tensor, *, frozen: bool = False, row_stride: int | None = None
    ) -> torch.Tensor:
        """The same values between bands; a frozen tensor must keep them."""
        copy = self.empty(*tensor.shape, dtype=tensor.dtype, row_stride=row_stride)
        copy.copy_(tensor)
        if frozen:
            held = self._held[-1]
            held.before.copy_(held.whole)
            held.writable.zero_()
        return copy

    def refreeze(self) -> None:
        """Take all frozen tensors as they are now."""
        for held in self._held:
            if not held.writable.any():
                held.before.copy_(held.whole)

    def check(self) -> None:
        """Fail if anything changed outside what could be written."""
        for held in self._held:
            changed = (held.whole != held.before) & ~held.writable
            assert not changed.any(), f"bytes {changed.nonzero().flatten()[:8].tolist()} changed"

    @property
    def count(self) -> int:
        """Tensors handed out so far."""
        return len(self._held)


class GuardedTorch:
    """Stands in for ``torch`` in a kernel module: its ``empty`` comes from guards."""

    def __init__(self, guards: Guards) -> None:
        self._guards = guards

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(
        self, shape: int | tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """What a launcher allocates for its kernel to fill."""
        assert device.type == "cpu"
        return self._guards.empty(*((shape,) if isinstance(shape, int) else shape), dtype=dtype)
