"""The digests in plain torch (ArkVale section 5.2).

All kinds but ``mean-std`` share the centre c = (min + max) / 2 of the page's bounding box.
Arithmetic is float32; the one rounding is the cast of the two results to the key dtype, so
``cuboid-max`` is exact and bounds every score from above.
"""

from __future__ import annotations

import torch

STD_SCALE = 1.0
"""Half-width of a ``mean-std`` digest in standard deviations (population form)."""


FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def build_digests(keys: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """``[pages, page_size, heads, head_dim]`` -> ``[pages, 2, heads, head_dim]``."""
    upper, lower = _bounds(keys.float(), kind)
    digests = torch.stack((upper, lower), 1)
    if dtype == torch.float8_e4m3fn:
        digests = digests.clamp_(-FP8_MAX, FP8_MAX)  # the cast would turn what is larger into NaN
    return digests.to(dtype)


def _bounds(values: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "mean-std":
        center = values.mean(1)
        radius = STD_SCALE * values.std(1, correction=0)
        return center + radius, center - radius
    low, high = values.amin(1), values.amax(1)  # aminmax(dim=1) takes ten times as long
    if kind == "cuboid-max":
        return high, low
    center = (low + high) * 0.5
    deviation = (values - center.unsqueeze(1)).abs_()
    if kind == "cuboid-mean":
        radius = deviation.mean(1)
    elif kind == "cuboid-center":
        radius = (deviation.amin(1) + deviation.amax(1)) * 0.5
    else:
        raise ValueError(f"digest kind {kind!r} has no reference")
    return center + radius, center - radius


def sphere_digests(keys: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's other family (equations 1 and 2), kept for studies; never served.

    Returns:
        Centres ``[pages, heads, head_dim]`` and radii ``[pages, heads]``, float32.
    """
    values = keys.float()
    low, high = values.aminmax(dim=1)
    center = (low + high) * 0.5
    distance = (values - center.unsqueeze(1)).norm(dim=-1)
    radii = {
        "sphere-max": lambda: distance.amax(1),
        "sphere-center": lambda: (distance.amin(1) + distance.amax(1)) * 0.5,
        "sphere-mean": lambda: distance.mean(1),
    }
    if kind not in radii:
        raise ValueError(f"sphere digest {kind!r} is unknown; choose one of {', '.join(radii)}")
    return center, radii[kind]()


def sphere_scores(query: torch.Tensor, center: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """``q . c + r * |q|`` per page and head: ``[heads, head_dim]`` -> ``[pages, heads]``."""
    query = query.float()
    return torch.einsum("hd,phd->ph", query, center) + radius * query.norm(dim=-1)
