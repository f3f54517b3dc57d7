"""Random tensors, their values in float64, and the rounding bounds that tolerances are made of.

Shares no code with the implementation and imports none of it.
"""

from __future__ import annotations

import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN everywhere, so that whatever reads an element it should not is found out."""
    return torch.full(shape, torch.nan, dtype=dtype)


def float64(tensor: torch.Tensor) -> np.ndarray:
    """The exact values of a tensor."""
    return tensor.detach().double().numpy().copy()


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: the largest relative error of one rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def gamma(roundings: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of a chain of roundings, hence of a sum or dot product of so many terms in
    any order, relative to the sum of absolute terms (Higham, section 3.1)."""
    error = roundings * unit(dtype)
    return error / (1 - error)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equality that counts a NaN as equal to itself."""
    views = {2: torch.int16, 4: torch.int32}
    kind = views[first.dtype.itemsize]
    return torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))
