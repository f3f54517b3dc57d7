"""Names for the parts of a step, for whoever attaches torch's profiler."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def part(name: str) -> AbstractContextManager[object]:
    """Show what runs inside as ``arkvale.NAME``; next to nothing while no profiler is attached."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"arkvale.{name}")
    return _NOTHING
