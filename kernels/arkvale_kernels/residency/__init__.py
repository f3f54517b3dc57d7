"""Residency op: which logical pages of a lane hold a frame, who gets one, who gives one up."""

from arkvale_kernels.residency.api import (
    COUNTED,
    Resolution,
    claim_frames,
    find_frames,
    find_places,
    release_pages,
    resolve_pages,
)

__all__ = [
    "COUNTED",
    "Resolution",
    "claim_frames",
    "find_frames",
    "find_places",
    "release_pages",
    "resolve_pages",
]
