"""Hooks in SGLang's decode graph runner: which batches are replayed, and two graphs per size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from arkvale_sglang.integration import compat


def install(hook: compat.Hook) -> None:
    """Register the hooks with ``hook(point, kind, function)``."""
    hook(compat.CAN_RUN_GRAPH, HookType.AROUND, _can_run_graph)
    hook(compat.CAPTURE_GRAPH, HookType.AROUND, _capture_one_shape)
    hook(compat.GRAPH_KEY, HookType.AROUND, _make_graph_key)


def _can_run_graph(original: Callable[..., bool], runner: Any, forward_batch: Any) -> bool:
    return original(runner, forward_batch) and runner.attn_backend.fits_graph(forward_batch)


def _capture_one_shape(
    original: Callable[..., None], runner: Any, size: int, *args: Any, **kwargs: Any
) -> None:
    """Capture the general graph of a batch size, then the calm one."""
    for calm in (False, True):
        runner.attn_backend.calm = calm
        original(runner, size, *args, **kwargs)


def _make_graph_key(
    original: Callable[..., Any],
    runner: Any,
    size: int,
    stream_idx: int | None = None,
    variant_label: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Tell the two graphs of a batch size apart; asked after the pass has been planned."""
    if runner.attn_backend.calm:
        variant_label = f"{variant_label or ''}+calm"
    return original(runner, size, stream_idx, variant_label, *args, **kwargs)
