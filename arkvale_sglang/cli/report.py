"""What the policy did, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = (
    ("pages sealed", "pages_sealed"),
    ("pages digested, over all lanes", "pages_digested"),
    ("pages backed up, over all lanes", "pages_backed_up"),
    ("pages recalled", "pages_recalled"),
    ("pages evicted", "pages_evicted"),
    ("page hits", "page_hits"),
    ("page misses", "page_misses"),
    ("  forced to fill lists", "forced_fills"),
    ("pages withheld by the cap", "pages_withheld"),
    ("hit rate", "hit_rate"),
    ("bytes backed up", "bytes_backed_up"),
    ("bytes recalled", "bytes_recalled"),
    ("frames used", "frames_used"),
    ("frames in all", "frames_total"),
    ("logical pages used", "logical_pages_used"),
    ("logical pages in all", "logical_pages_total"),
)


def table(report: Mapping[str, Any]) -> str:
    """The policy's part of ``/server_info`` as two columns."""
    lines = []
    for label, name in ROWS:
        value = report[name]
        if value is None:  # the hit rate before any page was wanted
            text = "-"
        else:
            text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        lines.append(f"  {label:32s} {text:>14s}")
    return "\n".join(lines)
