"""Constant load on a server whose pages come and go all the time: does anything grow?

    make soak                       an hour
    make soak ARGS="--minutes 10"

Once a minute every process of the server is sampled: resident memory, open file handles, threads;
and what the clients saw: the median time between tokens.  Writes ``soak.csv``, ``soak.png`` and
``soak.json`` under ``build/soak``; a run of an hour or more also ``benchmarks/results/soak.json``.
The first third of a run is warm-up; what grew from the middle third to the last by more than its
limit (``soak/trend.py``) makes the command fail.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

import figures
from arkvale_sglang.cli.launch import Server, leave_blocks_on_sigterm
from conditions import conditions
from soak import trend
from soak.load import CLIENTS, ENVIRONMENT, FLAGS, Load
from soak.processes import Watch
from tiny_model import make_model

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks/results/soak.json"
PLOTS = (
    ("rss_mib", "resident memory over its first minute, MiB"),
    ("files", "open file handles"),
    ("threads", "threads"),
    ("ms_per_token", "ms per token"),
)


def sampled(server: Server, minutes: float, every: float, seed: int) -> Iterator[dict[str, Any]]:
    """A row every so many seconds while the load runs."""
    with Load(server, seed) as load:
        watch, begin = Watch(server.pid), time.monotonic()
        recalled = server.arkvale()["pages_recalled"]
        for number in range(1, int(minutes * 60 / every) + 1):
            time.sleep(max(0.0, begin + number * every - time.monotonic()))
            seen = load.take()
            before, recalled = recalled, server.arkvale()["pages_recalled"]
            yield {
                "minute": round((time.monotonic() - begin) / 60, 2),
                **seen,
                "pages_recalled": recalled - before,
                **watch.sample(seen["tokens"]),
            }


def write_csv(samples: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(samples[0]))
        writer.writeheader()
        writer.writerows(samples)


def draw(samples: list[dict[str, Any]], path: Path) -> None:
    """Every judged column over time, a panel for each unit."""
    figure, panels = plt.subplots(len(PLOTS), 1, figsize=(7, 9), sharex=True)
    minutes = [sample["minute"] for sample in samples]
    for (unit, label), axes in zip(PLOTS, panels, strict=True):
        for column in samples[0]:
            if column.rpartition(" ")[2] in (unit, f"cpu_{unit}"):
                values = [sample[column] for sample in samples]
                start = values[0] if unit == "rss_mib" else 0
                name = column.rpartition(" ")[0] or column
                axes.plot(minutes, [value - start for value in values], label=name)
        axes.set_ylabel(label, fontsize=7)
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("minutes")
    figures.save(figure, path, samples)


def result(
    about: dict[str, Any], samples: list[dict[str, Any]], every: float, seed: int
) -> dict[str, Any]:
    """What ``soak.json`` holds."""
    judged = trend.judge(samples)
    others = sorted(sample["other_cores_busy"] for sample in samples)
    return {
        **about,
        "minutes": samples[-1]["minute"],
        "seconds_per_sample": every,
        "seed": seed,
        "clients": CLIENTS,
        "flags": " ".join(FLAGS),
        "requests": sum(sample["requests"] for sample in samples),
        "failed": sum(sample["failed"] for sample in samples),
        "tokens": sum(sample["tokens"] for sample in samples),
        "pages_recalled": sum(sample["pages_recalled"] for sample in samples),
        "cores_busy_with_other_work": {
            "median": others[len(others) // 2], "least": others[0], "most": others[-1],
        },
        "rule": trend.RULE,
        "judged": judged,
        "grew": [row["column"] for row in judged if row["grew"]],
    }  # fmt: skip


def tell(found: dict[str, Any]) -> int:
    """Print the verdict; returns the exit code: 1 if something grew or failed, 2 if something could
    not be told."""
    for row in found["judged"]:
        word = {True: "GREW", False: "ok", None: "not told: too much other work"}[row["grew"]]
        print(
            f"  {row['column']:32s} {row['middle']:10.2f} -> {row['last']:10.2f}  "
            f"(allowed +{row['allowed']:.2f})  {word}"
        )
    if found["failed"]:
        print(f"FAILED: {found['failed']} of {found['requests']} requests were not answered")
        return 1
    if not found["judged"]:
        print(f"no verdict: fewer than {trend.LEAST_SAMPLES} samples")
        return 2
    if found["grew"]:
        print(f"FAILED: {', '.join(found['grew'])} grew; see the plot for since when")
        return 1
    untold = [row["column"] for row in found["judged"] if row["grew"] is None]
    if untold:
        print(f"{', '.join(untold)}: not told, since other work kept cores busy most of the time")
    word = "nothing else grew" if untold else "nothing grew"
    print(f"{word} in {found['minutes']:.0f} minutes, {found['requests']:,} requests")
    return 2 if untold else 0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "build/soak")
    chosen = parser.parse_args()
    if chosen.every <= 0 or chosen.minutes * 60 < chosen.every:
        parser.error("--minutes must cover at least one sample of --every seconds")
    return chosen


def main() -> int:
    chosen, about = options(), conditions()
    leave_blocks_on_sigterm()
    chosen.out.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        print(f"seed {chosen.seed}: {chosen.minutes:g} minutes, starting a server", flush=True)
        with Server(model, FLAGS, log=chosen.out / "server.log", env=ENVIRONMENT) as server:
            for sample in sampled(server, chosen.minutes, chosen.every, chosen.seed):
                samples.append(sample)
                write_csv(samples, chosen.out / "soak.csv")
                total = sum(value for name, value in sample.items() if name.endswith(" rss_mib"))
                print(
                    f"  {sample['minute']:6.1f} min  {sample['requests']:5d} requests  "
                    f"{sample['ms_per_token']:7.2f} ms per token  "
                    f"{sample['pages_recalled']:7d} pages recalled  {total:8.1f} MiB  "
                    f"load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
    found = result(about, samples, chosen.every, chosen.seed)
    draw(samples, chosen.out / "soak.png")
    text = json.dumps(found, indent=1) + "\n"
    (chosen.out / "soak.json").write_text(text)
    if found["minutes"] >= 60:
        KEPT.write_text(text)
    print(chosen.out / "soak.csv", chosen.out / "soak.png", chosen.out / "soak.json", sep="\n")
    return tell(found)


if __name__ == "__main__":
    sys.exit(main())
