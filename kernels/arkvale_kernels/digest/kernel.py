"""Digests of full pages: one program reads one head of one page once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arkvale_kernels.triton_helpers import as_bytes, as_stored, page_bounds


@triton.jit
def _build_digests(keys, digests, heads: tl.constexpr, head_dim: tl.constexpr, PAGE: tl.constexpr,
                   DIM: tl.constexpr, KIND: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    page, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, DIM)
    inside = dim < head_dim
    token = tl.arange(0, PAGE)
    places = ((page * PAGE + token) * heads + head)[:, None] * head_dim + dim[None, :]
    values = tl.load(keys + places, mask=inside[None, :], other=0.0).to(tl.float32)
    upper, lower = page_bounds(values, inside, PAGE, KIND)
    out = digests + (page * 2 * heads + head) * head_dim + dim
    tl.store(out, as_stored(upper, digests, FP8), mask=inside)
    tl.store(out + heads * head_dim, as_stored(lower, digests, FP8), mask=inside)


def build_digests(keys: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`arkvale_kernels.digest.api.build_digests`."""
    pages, page_size, heads, head_dim = keys.shape
    digests = torch.empty((pages, 2, heads, head_dim), dtype=dtype, device=keys.device)
    if pages:
        dim = triton.next_power_of_2(head_dim)
        _build_digests[(pages, heads)](
            keys,
            as_bytes(digests),
            heads,
            head_dim,
            PAGE=page_size,
            DIM=dim,
            KIND=kind,
            FP8=dtype.itemsize == 1,
            num_warps=max(1, page_size * dim // 2048),
        )
    return digests
