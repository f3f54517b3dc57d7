"""The soak run's verdict on samples made up here; the run itself is tested in tests/e2e."""

from __future__ import annotations

import math
import random

import pytest

from soak import trend

SOUND = {
    "minute": 0.0,
    "requests": 300,
    "scheduler rss_mib": 1100.0,
    "python files": 38,
    "scheduler threads": 35,
    "cpu_ms_per_token": 4.0,
    "ms_per_token": 9.0,
    "other_cores_busy": 0.5,
}


def run(minutes: int, **growth: float) -> list[dict[str, float]]:
    """Samples of a run whose columns grow by so much a minute, with noise and a warm-up."""
    rng = random.Random(1)
    samples = []
    for minute in range(minutes):
        sample = dict(SOUND, minute=minute)
        sample["scheduler rss_mib"] += rng.uniform(-2, 2) + 300 * (1 - math.exp(-minute / 2))
        sample["cpu_ms_per_token"] *= rng.uniform(0.96, 1.04)
        sample["ms_per_token"] *= rng.uniform(0.8, 1.2)
        for column, each in growth.items():
            sample[column.replace("__", " ")] += each * minute
        samples.append(sample)
    return samples


def grew(samples: list[dict[str, float]]) -> set[str]:
    return {row["column"] for row in trend.judge(samples) if row["grew"]}


def test_noise_and_warm_up_are_no_growth():
    judged = trend.judge(run(60))
    assert {row["column"] for row in judged} == set(SOUND) - {
        "minute",
        "requests",
        "other_cores_busy",
    }
    assert not grew(run(60))


@pytest.mark.parametrize(
    ("column", "each"),
    [
        ("scheduler rss_mib", 2.0),
        ("python files", 0.2),
        ("scheduler threads", 0.1),
        ("cpu_ms_per_token", 0.03),
        ("ms_per_token", 0.3),
    ],
)
def test_a_leak_is_found(column, each):
    assert grew(run(60, **{column.replace(" ", "__"): each})) == {column}


def test_times_are_not_told_while_other_work_changes():
    """Memory still is."""
    samples = run(60, ms_per_token=0.3, scheduler__rss_mib=2.0)
    for sample in samples[40:]:
        sample["other_cores_busy"] = 1.5
    verdict = {row["column"]: row["grew"] for row in trend.judge(samples)}
    assert verdict["ms_per_token"] is None and verdict["scheduler rss_mib"] is True


def test_other_work_for_a_while_neither_hides_growth_nor_looks_like_it():
    """Only the minutes without it are compared."""
    for growth, found in ((0.0, set()), (1.5, {"ms_per_token"})):
        for busy in (slice(20, 33), slice(47, 60)):
            samples = run(60, ms_per_token=growth)
            for sample in samples[busy]:
                sample["other_cores_busy"] = 1.5
                sample["ms_per_token"] *= 2
            assert grew(samples) == found


def test_a_few_odd_minutes_do_not_decide():
    samples = run(60)
    for sample in samples[-5:]:
        sample["ms_per_token"] *= 10
        sample["scheduler rss_mib"] += 500
    assert not grew(samples)


def test_what_could_not_be_measured_is_no_proof_of_health():
    samples = run(12)
    samples[-1]["cpu_ms_per_token"] = math.nan
    assert grew(samples) == {"cpu_ms_per_token"}


def test_too_few_samples_make_no_verdict():
    assert trend.judge(run(trend.LEAST_SAMPLES - 1)) == []
