"""Storms on a real server: many clients at once, and what must hold when they are gone."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence

from arkvale_sglang.cli.launch import Server
from chaos.acts import SAMPLING, Draw
from support.serving import generate, prompt, wait_idle

CLIENTS = 8
REFERENCES = tuple((length, 300 + length) for length in (40, 333, 480))
"""Length and seed of prompts whose answers must not change, whatever happens between."""
NEW = 24

STREAMED = frozenset({"finish", "hang up", "abort"})
ENDS: dict[str, frozenset[str]] = {
    "generate": STREAMED,
    "several prompts": frozenset({"200"}),
    "completion": frozenset({"200"}),
    "prompt log-probabilities": frozenset({"200"}),
    "endless answer": STREAMED | {"400"},  # some ask for more than the model's context
    "prompt beyond capacity": frozenset({"400"}),
    "nonsense settings": frozenset({"400"}),
    "giant body": frozenset({"400"}),
    "half a request": frozenset({"closed"}),
    "abort": frozenset({"200"}),
    "look": frozenset({"200"}),
    "flush": frozenset({"200", "400"}),  # SGLang declines while requests run
}
"""How these may end: what fits the server waits its turn and is served, what never can is refused.
All others may end in any way but a failure of the server."""


def sound(end: str) -> bool:
    """Whether an act may end so; takes its name and its end, as a storm counts them."""
    name, _, how = end.partition(": ")
    if name in ENDS:
        return how.removesuffix(", retracted") in ENDS[name]
    return SAMPLING in how or not how.rpartition(" ")[2].startswith("5")


@dataclasses.dataclass(frozen=True)
class Weather:
    """A server that is hard pressed: its name, page size, budget and capacity in tokens."""

    name: str
    page: int
    budget: int
    tokens: int
    flags: tuple[str, ...]

    @property
    def command(self) -> tuple[str, ...]:
        """All flags of the server."""
        return (
            "--kv-policy", "arkvale", "--page-size", str(self.page),
            "--arkvale-budget", str(self.budget), "--max-total-tokens", str(self.tokens),
            "--arkvale-host-memory", "0.25", "--arkvale-check-invariants",
            "--chunked-prefill-size", "128", "--max-running-requests", "16",
            "--random-seed", "1", "--dtype", "float32", "--log-level", "info",
            "--sleep-on-idle", *self.flags,
        )  # fmt: skip


TURNS = Weather(
    "rows take turns, checked transfers", 16, 512, 160 * 16,
    ("--arkvale-device-tokens", "768", "--arkvale-oversubscription", "6",
     "--arkvale-dense-layers", "1", "--arkvale-check-transfers"),
)  # fmt: skip
GROUPS = Weather(
    "lanes by KV head", 32, 512, 96 * 32,
    ("--arkvale-device-tokens", "1024", "--arkvale-head-groups", "2",
     "--arkvale-dense-layers", "0"),
)  # fmt: skip
ENVIRONMENT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_TEST_RETRACT": "1",  # retracts a running request every few passes
    "SGLANG_TEST_RETRACT_INTERVAL": "11",
    "OMP_NUM_THREADS": "1",
}


def answers(server: Server) -> list[list[int]]:
    """What the reference prompts are answered with."""
    return [generate(server, prompt(*which), NEW)["output_ids"] for which in REFERENCES]


@dataclasses.dataclass
class Storm:
    """So many acts by several clients; the acts are drawn from the seed, their order in time is
    the machine's."""

    server: Server
    weather: Weather
    seed: str
    acts: int
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0

    def run(self, expected: Sequence[list[int]], log: Callable[[str], None] = print) -> None:
        """Let it pass and check what is left.

        Raises:
            AssertionError: an answer that is none, or a law that does not hold afterwards.
        """
        begin = time.monotonic()
        failures = []
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            futures = {pool.submit(self._one, number): number for number in range(self.acts)}
            for done in concurrent.futures.as_completed(futures):
                try:
                    name, end = done.result()
                except Exception as error:  # a client that was left alone
                    failures.append(f"event {self.seed}-{futures[done]}: {error!r}")
                    if len(failures) > CLIENTS:
                        pool.shutdown(wait=False, cancel_futures=True)
                        break
                    continue
                self.counts[name] += 1
                self.ends[f"{name}: {end}"] += 1
        self.seconds = time.monotonic() - begin
        assert not failures, "\n".join([*failures, self.server.tail(40)])
        self._check(expected)

    @property
    def retracted(self) -> int:
        """Streamed requests that were sent back to the queue at least once."""
        return sum(count for end, count in self.ends.items() if end.endswith("retracted"))

    def events(self) -> list[str]:
        """What the seed drew, an event a line."""
        return [f"{self.seed}-{n} {self._draw(n).act()[0]}" for n in range(self.acts)]

    def _draw(self, number: int) -> Draw:
        return Draw(f"{self.seed}-{number}", self.weather.tokens, self.weather.budget)

    def _one(self, number: int) -> tuple[str, str]:
        name, act = self._draw(number).act()
        return name, act(self.server)

    def _check(self, expected: Sequence[list[int]]) -> None:
        report = wait_idle(self.server)
        assert report["violations"] == [], report["violations"]
        assert report["frames_used"] == 0, f"{report['frames_used']} frames leaked"
        assert report["pages_refused"] == 0, "a page that a step chose found no frame"
        broken = {end: count for end, count in self.ends.items() if not sound(end)}
        assert not broken, f"calls ended as they must not: {broken}"
        assert answers(self.server) == list(expected), "a reference prompt has another answer now"
        assert "leak detected" not in self.server.log.read_text()
