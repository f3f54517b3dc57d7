"""Argument checks shared by the op APIs; every failure names the argument and what it should be.

Shapes, dtypes, strides and devices are always checked, once for every combination of them.  Checks
that read the device, such as page ids out of range, run only under ``ARKVALE_DEBUG=1``: they stall
a stream and forbid graph capture.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
DEBUG = os.environ.get("ARKVALE_DEBUG", "") not in ("", "0")
"""Whether ids are checked too."""

_REMEMBERED = 4096
"""Combinations kept for an op; a server meets a new one whenever a batch or a row grows."""


def by_layout(check: Callable[..., None]) -> Callable[..., None]:
    """Run an op's check only for arguments of a layout that has not passed before.

    What it asks is told by shape, stride, dtype, device and alignment of tensors (alone, in tuples,
    or absent) and by the other arguments themselves: in each layer of each step they are the same.
    """
    passed: set[Any] = set()

    @functools.wraps(check)
    def checked(*arguments: Any) -> None:
        layout = tuple(map(_layout, arguments))
        if DEBUG or layout not in passed:
            check(*arguments)
            if len(passed) >= _REMEMBERED:
                passed.clear()
            passed.add(layout)

    return checked


def _layout(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        place = argument.device, argument.data_ptr() % 16
        return argument.shape, argument.stride(), argument.dtype, *place
    return tuple(map(_layout, argument)) if isinstance(argument, tuple) else argument


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the expected shape (``None`` matches any size)."""
    shape = tensor.shape
    if len(shape) == len(expected):
        for have, want in zip(shape, expected, strict=True):
            if have != want and want is not None:
                break
        else:
            return
    wanted = ", ".join("any" if size is None else str(size) for size in expected)
    raise ValueError(f"{name} must have shape ({wanted}), got {tuple(shape)}")


def check_same_dtype(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise ``ValueError`` unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} is {tensor.dtype} but {other_name} is {other.dtype}")


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Raise ``ValueError`` unless ``tensor`` has one of the dtypes."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(
            f"{name} must be {wanted} with shape {tuple(tensor.shape)}, got {tensor.dtype}"
        )


def check_integers(**tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` unless all are int32 or int64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in INTEGERS:
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")


def check_dense(**tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` unless all are contiguous: kernels address them by shape alone."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous with shape {tuple(tensor.shape)}, got strides "
                f"{tensor.stride()}"
            )


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` unless there is a first row, and rows are contiguous in themselves."""
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} must have at least one row, got shape {tuple(tensor.shape)}")
    check_contiguous_last(name, tensor)


def check_contiguous_last(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` unless neighbours in the last dimension are neighbours in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {tensor.stride()} of "
            f"shape {tuple(tensor.shape)}"
        )


def check_device(like: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` unless all lie where ``like`` does."""
    for name, tensor in tensors.items():
        if tensor.device != like.device:
            raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def check_ids(
    name: str,
    ids: torch.Tensor,
    limit: int,
    least: int = 0,
    counts: torch.Tensor | None = None,
) -> None:
    """Under ``ARKVALE_DEBUG=1``: raise ``ValueError`` unless every id is in range; with ``counts
    [rows]``, only so many first ids of each row are ids at all."""
    if not DEBUG or ids.numel() == 0:
        return
    if counts is not None:
        index = torch.arange(ids.shape[1], device=ids.device)
        ids = ids.masked_fill(index >= counts.unsqueeze(1), least)
    low, high = (int(end) for end in ids.aminmax())
    if low < least or high >= limit:
        raise ValueError(f"{name} must hold ids from {least} to {limit - 1}, got {low} to {high}")


def check_same_device(
    name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor
) -> None:
    """Raise ``ValueError`` unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}")
