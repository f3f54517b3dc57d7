"""What several kernels share: launch sizes, order-preserving bits, page digests, 8-bit floats."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

UNKNOWN_DEVICE_PROCESSORS = 132
"""Assumed where there is no CUDA device to ask: an H100."""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return UNKNOWN_DEVICE_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def as_bytes(digests: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes, which every architecture can load; others as they are."""
    return digests.view(torch.uint8) if digests.dtype.itemsize == 1 else digests


@triton.jit
def ordered_bits(score):
    """float32 -> int64 in [0, 2^32), larger for larger scores."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def page_bounds(values, inside, PAGE: tl.constexpr, KIND: tl.constexpr):
    """Upper and lower vector ``[dim]`` of a page's keys ``[PAGE, dim]`` float32 (ArkVale 5.2)."""
    if KIND == "mean-std":
        center = tl.sum(values, 0) / PAGE
        away = values - center[None, :]
        radius = tl.sqrt(tl.sum(away * away, 0) / PAGE)
    else:
        high = tl.max(values, 0)
        low = tl.min(values, 0)
        center = (low + high) * 0.5
        away = tl.abs(values - center[None, :])
        if KIND == "cuboid-mean":
            radius = tl.sum(away, 0) / PAGE
        elif KIND == "cuboid-center":
            radius = (tl.min(away, 0) + tl.max(away, 0)) * 0.5
        else:
            tl.static_assert(KIND == "cuboid-max")
            radius = high - center
    upper = center + radius
    lower = center - radius
    if KIND == "cuboid-max":
        upper = high
        lower = low
    return tl.where(inside, upper, 0.0), tl.where(inside, lower, 0.0)


@triton.jit
def encode_fp8(value):
    """float32 -> the byte of the nearest float8_e4m3fn, ties to even, saturating.

    float16 has four exponent values to spare on either side and the same layout otherwise, so a
    value rounded to three mantissa bits in float32 passes through it unharmed; conversions to
    8-bit floats themselves exist on newer architectures only.
    """
    clipped = tl.minimum(tl.maximum(value, -448.0), 448.0)
    bits = clipped.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # Below 2^-6 the steps are 2^-9: adding 1.5 * 2^23 of them rounds to whole steps.
    subnormal = (clipped + 24576.0) - 24576.0
    rounded = tl.where(tl.abs(clipped) < 0.015625, subnormal, normal.to(tl.float32, bitcast=True))
    half = (rounded * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (((half >> 8) & 0x80) | ((half >> 7) & 0x7F)).to(tl.uint8)


@triton.jit
def decode_fp8(byte):
    """The inverse: the byte of a float8_e4m3fn -> float32."""
    wide = byte.to(tl.int32)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def as_float(stored, FP8: tl.constexpr):
    """A loaded digest as float32."""
    if FP8:
        return decode_fp8(stored)
    else:
        return stored.to(tl.float32)


@triton.jit
def as_stored(value, like, FP8: tl.constexpr):
    """float32 as the element type that the pointer ``like`` holds."""
    if FP8:
        return encode_fp8(value)
    else:
        return value.to(like.dtype.element_ty)
