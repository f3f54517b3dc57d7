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
OTHER, EQUAL = "other_cores_busy", 0.25
"""Times are compared over the samples in which other work kept fewest cores busy, or so much of a
core more: what it takes or leaves would else be told as growth, or hide it."""
RULE = (
    "median of the last third of the samples against the third before it; of times, of the samples "
    f"in which other work kept at most {EQUAL} of a core more busy than in the quietest quarter"
)
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
        ``None`` for a time of which one third has too few samples alike in other work.  An
        empty list if there are too few samples to tell.
    """
    third = len(samples) // 3
    if len(samples) < LEAST_SAMPLES:
        return []
    middle, last = samples[-2 * third : -third], samples[-third:]
    found = []
    enough = max(LEAST_SAMPLES // 3, third // 4)
    least = min(
        sorted(float(sample[OTHER]) for sample in part)[enough - 1] for part in (middle, last)
    )
    alike = [[s for s in part if float(s[OTHER]) <= least + EQUAL] for part in (middle, last)]
    told = min(map(len, alike)) >= enough
    for column in samples[-1]:
        limit = limit_of(column)
        if limit is None:
            continue
        parts = alike if column in TIMES and told else (middle, last)
        before, after = (_median(part, column) for part in parts)
        growth, allowed = after - before, limit.of(before)
        # A column that could not be read is no proof of health.
        missing = math.isnan(_median((*middle, *last), column))
        grew: bool | None = missing or growth > allowed
        if column in TIMES and not told and not missing:
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
