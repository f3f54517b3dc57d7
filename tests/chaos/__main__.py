"""Random events until something breaks, or a hundred thousand have passed.

    make chaos                          100,000 events
    make chaos ARGS="--seed 7"          the same events again
    make chaos ARGS="--world 7000012"   one world of a run on the cache, event by event
    make chaos ARGS="--storm 7-3"       one storm on a server

A world replays exactly.  A storm sends the same calls, but how its clients interleave is the
machine's; its calls are listed in ``build/chaos``.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from arkvale_sglang.cli.launch import Server
from chaos import storms, worlds
from chaos.storms import Storm
from tiny_model import make_model

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/chaos"
ACTS = 500
"""Of one storm."""
WORLDS = 1_000_000
"""Worlds of one seed, so that each has a number of its own."""
WEATHERS = (storms.TURNS, storms.GROUPS)
Counts = collections.Counter[str]


class Clock:
    """Says how far a run is, and whether its time is up."""

    def __init__(self, minutes: float | None):
        self._begin, self._minutes = time.monotonic(), minutes

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._begin) / 60

    def up(self, share: float = 1.0) -> bool:
        return self._minutes is not None and self.minutes > share * self._minutes

    def say(self, line: str) -> None:
        print(f"  {self.minutes:5.1f} min  {line}", flush=True)


def on_the_cache(seed: int, events: int, clock: Clock) -> Counts:
    """Worlds in a process per core until so many events have passed.

    Raises:
        SystemExit: a law broke; says how to see it again.
    """
    counts: Counts = collections.Counter()
    done, said = 0, 0.0
    cores = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(cores, spawn) as pool:
        seeds = itertools.count(seed * WORLDS)
        running = {pool.submit(worlds.one_world, next(seeds)) for _ in range(2 * cores)}
        while running:
            finished, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                world, passed, broken = future.result()
                if broken:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise SystemExit(
                        f"{broken}\nFAILED in world {world}, event {passed.total() - 1}; see it "
                        f'again by\n\n    make chaos ARGS="--world {world}"'
                    )
                counts += passed
                done += 1
                expected = counts.total() + len(running) * worlds.EVENTS
                if expected < events and not clock.up(0.7):
                    running.add(pool.submit(worlds.one_world, next(seeds)))
            if clock.minutes - said > 0.25 or not running:
                said = clock.minutes
                clock.say(f"{counts.total():7,} of {events:,} events on the cache, {done} worlds")
    return counts


def on_servers(seed: int, number: int, clock: Clock) -> Counts:
    """So many storms, in turn by server; see :func:`on_the_cache` for what it raises."""
    counts: Counts = collections.Counter()
    for index, weather in enumerate(WEATHERS):
        own = range(index, number, len(WEATHERS))
        if own and not clock.up():
            for storm in blow(weather, [f"{seed}-{one}" for one in own], ACTS, clock):
                counts += storm.counts
    return counts


def blow(weather: storms.Weather, seeds: list[str], acts: int, clock: Clock) -> Iterator[Storm]:
    """Storms on one server, each told and checked."""
    OUT.mkdir(parents=True, exist_ok=True)
    log = OUT / f"server-{weather.name.replace(' ', '-').replace(',', '')}.log"
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", dtype="float32")
        clock.say(f"starting a server: {weather.name}")
        with Server(model, weather.command, log=log, env=storms.ENVIRONMENT) as server:
            expected = storms.answers(server)
            for seed in seeds:
                if clock.up():
                    return
                storm = Storm(server, weather, seed, acts)
                listed = OUT / f"storm-{seed}.txt"
                listed.write_text("\n".join(storm.events()) + "\n")
                try:
                    storm.run(expected)
                except Exception as error:
                    raise SystemExit(
                        f"{error}\nFAILED in storm {seed}, whose calls are listed in {listed} (the "
                        f"server's log: {log}); send them again by\n\n"
                        f'    make chaos ARGS="--storm {seed}"'
                    ) from error
                clock.say(
                    f"storm {seed}: {storm.counts.total()} calls, "
                    f"{storm.counts.total() / storm.seconds:.1f} per second, {storm.retracted} "
                    "retracted; nothing leaked, answers as before"
                )
                yield storm


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="of all events (default: any)")
    parser.add_argument("--events", type=int, default=100_000, help="in all")
    parser.add_argument("--storms", type=int, default=12, help=f"of {ACTS} of these events each")
    parser.add_argument("--minutes", type=float, help="stop after so long, however many passed")
    parser.add_argument("--world", type=int, metavar="SEED", help="replay one world")
    parser.add_argument("--storm", metavar="SEED", help="one storm again")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    clock = Clock(chosen.minutes)
    if chosen.world is not None:
        worlds.World(chosen.world, log=print).run()
        print("the world is sound")
        return 0
    if chosen.storm is not None:
        weather = WEATHERS[int(chosen.storm.rpartition("-")[2]) % len(WEATHERS)]
        for storm in blow(weather, [chosen.storm], ACTS, clock):
            tell(storm.ends)
        return 0
    seed = random.SystemRandom().randrange(10**4) if chosen.seed is None else chosen.seed
    print(f'seed {seed}; all events again by  make chaos ARGS="--seed {seed}"', flush=True)
    cache = on_the_cache(seed, chosen.events - chosen.storms * ACTS, clock)
    server = on_servers(seed, chosen.storms, clock)
    print(f"\n{cache.total():,} events on the cache:")
    tell(cache)
    print(f"{server.total():,} events on servers:")
    tell(server)
    total = cache.total() + server.total()
    print(f"{total:,} events in {clock.minutes:.1f} minutes with seed {seed}:")
    print("no law broken, nothing leaked, every answer as it was")
    return 0


def tell(counts: Counts) -> None:
    for name, count in counts.most_common():
        print(f"  {name:32s} {count:7,}")


if __name__ == "__main__":
    sys.exit(main())
