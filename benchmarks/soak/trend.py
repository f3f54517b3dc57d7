"""The verdict: what grew after the warm-up, by medians that a few odd minutes do not move."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limit:
    """Growth is allowed up to a share of what was there or up to ``least``, whichever is more."""

    share: float
    least: float

    def of(self, before: float) -> float:
        """The growth allowed over a median."""
        return max(self.share * before, self.least)


LIMITS = {
    "rss_mib": Limit(0.02, 8),
    "files": Limit(0, 2),
    "threads": Limit(0, 1),
    "cpu_ms_per_token": Limit(0.10, 0),
    "ms_per_token": Limit(0.25, 0),
}
"""By the last part of a column's name.  Step time as clients see it includes whatever else runs on
the machine; the scheduler's processor time per token does so less and is held tighter."""
TIMES = {"cpu_ms_per_token", "ms_per_token"}
OTHER, EQUAL = "other_cores_busy", 0.1
"""Times can be compared only while other work keeps as many cores busy, to so much of a core."""
LEAST_SAMPLES = 9
"""Fewer say nothing: the thirds would be of less than three."""


def limit_of(column: str) -> Limit | None:
    """What holds for a column; ``None`` for those that only inform."""
    return LIMITS.get(column.rpartition(" ")[2])


def judge(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare the last third of a run with the third before it; the first third is warm-up.

    Args:
        samples: rows of equal distance in time, each with the same columns.

    Returns:
        For every column with a limit its two medians, growth, what is allowed, and ``grew``:
        ``None`` for a time that cannot be told because other work on the machine changed.  An
        empty list if there are too few samples to tell.
    """
    third = len(samples) // 3
    if len(samples) < LEAST_SAMPLES:
        return []
    middle, last = samples[-2 * third : -third], samples[-third:]
    found = []
    before, after = (_median(part, OTHER) for part in (middle, last))
    comparable = abs(after - before) <= EQUAL
    for column in samples[-1]:
        limit = limit_of(column)
        if limit is None:
            continue
        before, after = (_median(part, column) for part in (middle, last))
        growth, allowed = after - before, limit.of(before)
        # A column that could not be read is no proof of health.
        grew: bool | None = not growth <= allowed
        if grew and column in TIMES and not (comparable or math.isnan(growth)):
            grew = None
        found.append(
            {
                "column": column,
                "middle": round(before, 3),
                "last": round(after, 3),
                "growth": round(growth, 3),
                "allowed": round(allowed, 3),
                "grew": grew,
            }
        )
    return found


def _median(samples: Sequence[Mapping[str, Any]], column: str) -> float:
    values = [float(sample[column]) for sample in samples]
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)
