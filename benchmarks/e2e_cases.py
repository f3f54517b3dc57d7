"""What gpu_e2e.py measures: sizes, rows, and how a running server is timed."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
import urllib.error
from collections.abc import Callable
from typing import Any

from arkvale_sglang.cli.launch import Server

SECTIONS = ("tpot", "throughput", "under-budget", "prefill")
SLACK_TOKENS = 64
"""Of a cached prompt, what may have to be computed again: its last page."""
Outcome = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a run; tokens unless a name says otherwise."""

    shape: dict[str, int]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    decoded: tuple[int, int]
    """Two output lengths whose difference in latency is decoding alone."""
    kv_bytes: int
    prompts: tuple[int, ...]
    requests: int
    new: int
    short: int
    prefill: int
    rounds: int
    budget: int
    dense_layers: int
    equal: bool = False
    """Whether all sections run at equal memory, which takes one server per side instead of two."""


LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
            "head_dim": 128}  # fmt: skip
LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
            "head_dim": 64}  # fmt: skip
TINY = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 258}
SCALES = {
    "full": Scale(LLAMA_8B, (32768, 131072), (1, 4, 16), (8, 72), 40 * 10**9,
                  (30000, 20000, 10000), 32, 192, 512, 131072, 3, 2048, 2),
    "small": Scale(LLAMA_1B, (8192, 32768), (1, 4), (8, 72), 2 * 10**9,
                   (30000, 20000, 10000), 16, 128, 512, 32768, 3, 2048, 2),
    "tiny": Scale(TINY, (1024,), (1, 2), (4, 16), 20 * 10**6,
                  (1024, 512), 10, 96, 128, 1024, 2, 256, 1, True),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the result."""

    section: str
    tokens: int
    batch: int

    @property
    def name(self) -> str:
        """What the table calls it."""
        size = f"{self.tokens // 1024}K" if self.tokens % 1024 == 0 else str(self.tokens)
        return f"{self.section} {size} x{self.batch}"

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Random prompts: the same ones for both sides and for every batch size."""
        top = min(vocabulary, 128000)
        made = []
        for row in range(self.batch):
            rng = random.Random(f"{self.section} {self.tokens} {row}")
            made.append([rng.randrange(2, top) for _ in range(self.tokens)])
        return made


def cases(scale: Scale, section: str) -> list[Case]:
    """Rows of a section, those of most interest first."""
    if section == "tpot":
        return [Case(section, size, batch) for batch in scale.batches for size in scale.contexts]
    if section == "throughput":
        return [Case(section, size, scale.requests) for size in scale.prompts]
    return [Case(section, scale.short if section == "under-budget" else scale.prefill, 1)]


class Refused(Exception):
    """Why a row has no figure, in one sentence."""


class Meter:
    """Measures cases on one running server until a deadline."""

    def __init__(self, server: Server, scale: Scale, deadline: float):
        self.server, self.scale, self.deadline = server, scale, deadline
        self.capacity = int(server.get("/server_info")["max_total_num_tokens"])

    def run(self, case: Case) -> Outcome:
        """The figure of a case with its raw numbers, or ``refused`` with the reason."""
        measure: Callable[[Case], Outcome] = {
            "tpot": self.per_token,
            "under-budget": self.per_token,
            "prefill": self.first_token,
            "throughput": self.throughput,
        }[case.section]
        try:
            return measure(case)
        except Refused as reason:
            return {"refused": str(reason)}
        except TimeoutError:
            return {"refused": "not run: the time limit was reached."}
        except (OSError, ValueError, KeyError) as error:
            return {"refused": f"failed: {last_words(self.server, error)}"}

    def warm(self) -> None:
        """Compile and capture what short requests need."""
        for tokens in (self.scale.short, 40):
            prompts = Case("warm", tokens, 2).prompts(self.scale.shape["vocab_size"])
            self.generate(prompts, self.scale.decoded[0])

    def generate(self, prompts: list[list[int]], new: int) -> tuple[float, list[Any]]:
        """Seconds of one batched request, and its answers."""
        start = time.monotonic()
        answers = self.server.post("/generate", body(prompts, new), timeout=self._left())
        if not isinstance(answers, list):
            raise ValueError(str(answers)[:200])
        return time.monotonic() - start, answers

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _fits(self, case: Case, new: int, rows: int) -> list[list[int]]:
        self._left()
        need = rows * (case.tokens + new)
        if need > self.capacity:
            raise Refused(f"does not fit: {need} tokens needed, the cache holds {self.capacity}.")
        return case.prompts(self.scale.shape["vocab_size"])

    def per_token(self, case: Case) -> Outcome:
        """Milliseconds per step of a batch whose prompts are cached."""
        few, many = self.scale.decoded
        prompts = self._fits(case, many, case.batch)
        for prompt in prompts:
            self.generate([prompt], 1)
        self.generate(prompts, few)
        raw: dict[int, list[float]] = {few: [], many: []}
        cached = case.tokens
        for _ in range(self.scale.rounds):
            for new in (few, many):
                seconds, answers = self.generate(prompts, new)
                raw[new].append(seconds)
                cached = min(cached, *(answer["meta_info"]["cached_tokens"] for answer in answers))
        if cached < case.tokens - SLACK_TOKENS:
            raise Refused(f"void: only {cached} of {case.tokens} prompt tokens stayed cached.")
        value = (statistics.median(raw[many]) - statistics.median(raw[few])) / (many - few) * 1e3
        if value <= 0:
            raise Refused(f"void: the machine was too busy, {few} tokens took as long as {many}.")
        return {"value": value, "unit": "ms/token", "raw_seconds": raw}

    def first_token(self, case: Case) -> Outcome:
        """Seconds to the first token of prompts never seen before."""
        vocabulary = self.scale.shape["vocab_size"]
        self._fits(case, 1, 1)
        self.generate(Case("cold", case.tokens // 8, 1).prompts(vocabulary), 1)
        raw = []
        for row in Case("prefill", case.tokens, 2).prompts(vocabulary):
            seconds, answers = self.generate([row], 1)
            if answers[0]["meta_info"]["cached_tokens"] > SLACK_TOKENS:
                raise Refused("void: the prompt was cached.")
            raw.append(seconds)
        return {"value": statistics.median(raw), "unit": "s", "raw_seconds": raw}

    def throughput(self, case: Case) -> Outcome:
        """Tokens per second while the most requests that fit decode together."""
        prompts = self._fits(case, self.scale.new, 1)
        start, events = time.monotonic(), []
        for event in self.server.stream(body(prompts, self.scale.new)):
            self._left()
            meta = event["meta_info"]
            events.append((time.monotonic() - start, event["index"], meta["completion_tokens"]))
        seconds = time.monotonic() - start
        return {
            **steady(events, self.scale.new),
            "unit": "tokens/s",
            "served_per_second": case.batch * self.scale.new / seconds,
            "seconds": seconds,
        }


def body(prompts: list[list[int]], new: int) -> dict[str, Any]:
    """A greedy request for exactly ``new`` tokens per prompt."""
    sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    return {"input_ids": prompts, "sampling_params": sampling}


def steady(events: list[tuple[float, int, int]], new: int) -> Outcome:
    """Decode rate from (time, request, tokens so far), between the last start and the first end.

    Requests that start after the first one ended waited for memory: they count for nothing here.
    """
    first: dict[int, float] = {}
    for at, index, _ in events:
        first.setdefault(index, at)
    end = min((at for at, _, tokens in events if tokens >= new), default=-math.inf)
    together = {index for index, at in first.items() if at < end}
    begin = max((first[index] for index in together), default=math.inf)
    rate, widest = 0.0, 0.0
    for index in together:
        points = [(at, tokens) for at, i, tokens in events if i == index and begin <= at <= end]
        if len(points) > 1 and points[-1][0] > points[0][0]:
            span = points[-1][0] - points[0][0]
            rate += (points[-1][1] - points[0][1]) / span
            widest = max(widest, span)
    if not rate:
        raise Refused("void: requests ended before the others began; raise the output length.")
    return {"value": rate, "together": len(together), "window_seconds": widest}


def last_words(server: Server, error: BaseException) -> str:
    """The line of the server's log that says most, or the error itself."""
    if isinstance(error, urllib.error.HTTPError):
        return error.read().decode(errors="replace")[:300]
    lines = [line.strip() for line in server.tail(200).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "out of memory" in line.lower()]
    return (telling[-1] if telling else f"{type(error).__name__}: {error}")[:300]
