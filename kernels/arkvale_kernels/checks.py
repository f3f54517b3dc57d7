"""Argument checks shared by the op APIs; every failure names the argument and both shapes."""

from __future__ import annotations

import torch


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the expected shape (``None`` matches any size)."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        want is not None and have != want for have, want in zip(shape, expected, strict=True)
    ):
        want = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({want}), got {tuple(shape)}")


def check_same_dtype(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise ``ValueError`` unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} is {tensor.dtype} but {other_name} is {other.dtype}")
