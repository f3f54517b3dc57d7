"""Events on the cache itself: many short worlds, each an engine of its own drawn from a seed.

A world drives the runtime as SGLang does and keeps SGLang's word: a chunk fits the free pages, no
more requests run than admission says, a decode step leaves out at most one request with an open
page, and while pages or frames do not suffice for the next step running requests are retracted.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import traceback
from collections.abc import Callable

import numpy as np
import torch

from arkvale_sglang.config.settings import DIGESTS, HEAD_REDUCES, SELECTIONS, ArkValeConfig
from arkvale_sglang.runtime import prefix
from arkvale_sglang.runtime.checksums import TransferError
from support import oracle
from support.engine import FakeEngine, Step

EVENTS = 160
"""Of one world."""
MOST_ROWS = 8
ROUNDINGS = {torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}
"""Errors allowed, in roundings of the type: values are of unit scale and attention is a convex
combination, in float32 whatever the type."""
TIE = 1e-5
"""Scores closer than this may fall either way."""


@dataclasses.dataclass
class Request:
    """What a row still has to do."""

    left: int
    """Tokens of the prompt that wait for prefill."""
    new: int
    """Tokens to generate."""
    settings: ArkValeConfig


class World:
    """One engine, one stream of random events; ``run`` raises at the first broken law."""

    def __init__(self, seed: int, log: Callable[[str], None] = lambda line: None):
        self.seed, self.log = seed, log
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.requests: dict[int, Request] = {}
        self.fake = self._engine()
        most = self.fake.cache.admission.most_requests
        self.most_rows = MOST_ROWS if most is None else min(most, MOST_ROWS)
        self.tolerance = (
            ROUNDINGS[self.fake.geometry.dtype] * torch.finfo(self.fake.geometry.dtype).eps
        )
        self.staging = self.random.choice((1 << 13, 4 * self.size, self.size))

    def _engine(self) -> FakeEngine:
        draw = self.random
        size = draw.choices((16, 32, 64), (8, 2, 1))[0]
        kv_heads = draw.choice((1, 2, 4))
        layers = draw.choice((1, 2, 3))
        sinks, window = draw.choice((0, 1, 2)), draw.choice((1, 1, 2))
        budget = sinks + window + draw.randint(1, 7)
        pages = draw.choice((12, 24, 40)) if size == 16 else 16
        config = ArkValeConfig(
            page_size=size,
            budget=size * budget,
            top_k=draw.choice((None, size * draw.randint(1, budget))),
            sink_pages=sinks,
            window_pages=window,
            head_groups=draw.choice([groups for groups in (1, 2, 4) if kv_heads % groups == 0]),
            dense_layers=draw.randrange(layers),
            digest=draw.choice(DIGESTS),
            head_reduce=draw.choice(HEAD_REDUCES),
            selection=draw.choices(SELECTIONS, (12, 1, 1, 1))[0],
            recall_cap=draw.choice((None, None, None, 0, 1, 3)),
            oversubscription=draw.choice((1.0, 1.0, 4.0)),
            check_transfers=draw.random() < 0.3,
        )
        self.own_settings = draw.random() < 0.4
        frames = min(pages, budget + 1 + draw.choice((0, 1, 2, 4, 8, pages)))
        dtype = draw.choices((torch.float32, torch.bfloat16, torch.float16), (8, 1, 1))[0]
        return FakeEngine(
            config, pages=pages, frames=frames, layers=layers, kv_heads=kv_heads,
            query_heads=kv_heads * draw.choice((1, 2)), head_dim=draw.choice((4, 8)), dtype=dtype,
            max_rows=2 * MOST_ROWS, seed=self.seed,
        )  # fmt: skip

    @property
    def size(self) -> int:
        return self.fake.config.page_size

    def run(self, events: int = EVENTS) -> None:
        """Draw and run so many events, checking after each."""
        self.log(f"{self.fake.config} {self.fake.cache.plan.describe()}")
        before, prefix.STAGING_TOKENS = prefix.STAGING_TOKENS, self.staging
        try:
            for number in range(events):
                name, act = self._draw()
                self.log(f"{number}: {name}")
                self.counts[name] += 1
                act()
                self._check()
            if self.fake.cache.checksums is not None:
                self._poison()
        finally:
            prefix.STAGING_TOKENS = before

    # -- what may happen ---------------------------------------------------------------------

    def _draw(self) -> tuple[str, Callable[[], None]]:
        """The next event, among those that an engine could meet now."""
        waiting = [row for row, request in self.requests.items() if request.left]
        running = [row for row, request in self.requests.items() if not request.left]
        batch = self._batch(running)
        possible: list[tuple[float, str, Callable[[], None]]] = []
        if batch and not self._fits(batch):
            return "retract", lambda: self._retract(running)
        if len(self.requests) < self.most_rows:
            possible.append((6, "open", self._open))
            if any(self.fake.rows[row].tokens >= self.size for row in self.requests):
                possible.append((6, "open on a shared prefix", self._share))
        if waiting and self.fake.free_pages:
            possible.append((14, "prefill", lambda: self._prefill(waiting)))
        if batch:
            possible.append((40, "decode", lambda: self._decode(batch)))
        if self.requests:
            possible.append((2, "abort", self._abort))
        if waiting and not batch and not self.fake.free_pages:
            return "abort", self._abort
        possible.append((0.4, "flush", self._flush))
        weights, names, acts = zip(*possible, strict=True)
        chosen = self.random.choices(range(len(acts)), weights)[0]
        return names[chosen], acts[chosen]

    def _settings(self) -> ArkValeConfig:
        config = self.fake.config
        if not self.own_settings or self.random.random() < 0.5:
            return config
        if self.random.random() < 0.25:
            return config.for_request({"policy": "full"})
        least = config.sink_pages + config.window_pages + 1
        wishes: dict[str, object] = {
            "budget": self.size * self.random.randint(least, config.budget_pages),
            "head_reduce": self.random.choice(HEAD_REDUCES),
            "selection": self.random.choice(SELECTIONS),
        }
        names = self.random.sample(sorted(wishes), self.random.randint(1, len(wishes)))
        return config.for_request({name: wishes[name] for name in names})

    def _request(self) -> Request:
        most = self.size * self.fake.cache.plan.logical_pages // 2
        short = self.random.random() < 0.4
        left = self.random.randint(1, 3 * self.size if short else most)
        return Request(left, self.random.randint(1, 4 * self.size), self._settings())

    def _open(self) -> None:
        self.requests[self.fake.add_row()] = self._request()

    def _share(self) -> None:
        """On all of another's prefix or on a part of it."""
        parents = [row for row in self.requests if self.fake.rows[row].tokens >= self.size]
        parent = self.random.choice(parents)
        full = self.fake.rows[parent].tokens // self.size
        pages = self.random.choice((full, self.random.randint(1, full)))
        self.requests[self.fake.share(parent, pages)] = self._request()

    def _prefill(self, waiting: list[int]) -> None:
        """Chunks of one request or several: the rest of the prompt, or less."""
        rows = self.random.sample(waiting, self.random.randint(1, len(waiting)))
        cut = any(self._is_open(row) for row in waiting)
        chunks, free = {}, len(self.fake.free_pages)
        for row in rows:
            room = free * self.size + -self.fake.rows[row].tokens % self.size
            tokens = min(room, self.requests[row].left)
            if not tokens:
                continue
            kind = self.random.choice(("rest", "rest", "pages", "any"))
            end = self.fake.rows[row].tokens + tokens
            if kind == "pages" or tokens < self.requests[row].left:
                tokens = max(0, end // self.size * self.size - self.fake.rows[row].tokens)
            elif kind == "any":
                tokens = self.random.randint(1, tokens)
            ends_open = (self.fake.rows[row].tokens + tokens) % self.size > 0
            if tokens < self.requests[row].left and ends_open:
                if cut and not self._is_open(row):
                    continue  # one request at most stops within a page
                cut = True
            if tokens:
                chunks[row] = tokens
                free -= self.fake.pages_needed(row, tokens)
        if not chunks:
            return self._abort()
        settings = [self.requests[row].settings for row in chunks]
        error = self.fake.extend(chunks, settings if self._differ(settings) else None)
        assert error < self.tolerance, f"prefill is off by {error}"
        for row, tokens in chunks.items():
            self.requests[row].left -= tokens
        return None

    def _batch(self, running: list[int]) -> list[int]:
        """Running rows in any order; now and then some wait, at most one of them with an open
        page, a request in the middle of its prefill included."""
        batch = self.random.sample(running, len(running))
        if self.random.random() < 0.8:
            return batch
        leaves = self.random.sample(batch, self.random.randint(0, len(batch)))
        waits = any(self._is_open(row) for row, own in self.requests.items() if own.left)
        for row in leaves:
            if self._is_open(row) and waits:
                continue
            waits = waits or self._is_open(row)
            batch.remove(row)
        return batch

    def _fits(self, batch: list[int]) -> bool:
        """Whether pages and frames suffice, as the engine asks before every step."""
        needed = sum(self.fake.pages_needed(row, 1) for row in batch)
        tokens = [self.fake.rows[row].tokens for row in batch]
        settings = [self.requests[row].settings for row in batch]
        holds = self.fake.cache.admission.holds(tokens, settings)
        return needed <= len(self.fake.free_pages) and holds

    def _retract(self, running: list[int]) -> None:
        """Back to the queue: the row goes, its request comes again with all it has so far."""
        row = self.random.choice(running)
        held, request = self.fake.rows[row].tokens, self.requests[row]
        self._drop(row)
        if held <= self.size * self.fake.cache.plan.logical_pages // 2:
            self.requests[self.fake.add_row()] = dataclasses.replace(request, left=held)

    def _decode(self, batch: list[int]) -> None:
        settings = [self.requests[row].settings for row in batch]
        own = settings if self._differ(settings) else None
        self.fake.steps.clear()
        error = self.fake.decode(batch, own)
        assert error < self.tolerance, f"decode is off by {error}"
        self._check_choice(batch, own is not None)
        for row in batch:
            self.requests[row].new -= 1
            if self.requests[row].new <= 0:
                self._drop(row)

    def _abort(self) -> None:
        self._drop(self.random.choice(list(self.requests)))

    def _drop(self, row: int) -> None:
        del self.requests[row]
        self.fake.free(row)

    def _flush(self) -> None:
        self.requests.clear()
        self.fake.flush()

    def _poison(self) -> None:
        """The last event of a world that checks transfers: one bit of one backup is wrong, and the
        request that reads it must not get an answer."""
        layer = self.random.choice(self.fake.cache.store.managed)
        frame_of, stride = layer.residency.frame_of, self.fake.cache.store.page_stride
        lane = stride * self.random.randrange(self.fake.geometry.groups)
        evicted = [
            (row, page)
            for row, state in self.fake.rows.items()
            for page in state.pages[: state.tokens // self.size]
            if frame_of[lane + page] < 0 and (self._is_open(row) or self.fake.free_pages)
        ]
        if not evicted:
            return
        self.counts["poison"] += 1
        row, page = self.random.choice(evicted)
        self.log(f"poison: page {page} of row {row}")
        backup = layer.host[lane + page].view(torch.uint8).flatten()
        backup[self.random.randrange(len(backup))] ^= 1 << self.random.randrange(8)
        try:
            self.fake.extend({row: 1})
        except TransferError as error:
            assert f"page {page} " in str(error), error
            return
        raise AssertionError(f"page {page} was read although its backup is poisoned")

    def _differ(self, settings: list[ArkValeConfig]) -> bool:
        return any(own is not self.fake.config for own in settings)

    def _is_open(self, row: int) -> bool:
        return self.fake.rows[row].tokens % self.size > 0

    # -- what must hold ----------------------------------------------------------------------

    def _check(self) -> None:
        self.fake.check()
        refused = self.fake.cache.report()["pages_refused"]
        assert refused == 0, "admission promised a frame to every page that a step chose"

    def _check_choice(self, batch: list[int], own: bool) -> None:
        """Every row attends to what its own settings say, each page once, the open page last."""
        for step in self.fake.steps:
            config = self.requests[step.row].settings
            pages, chosen = len(self.fake.rows[step.row].pages), set(step.chosen)
            assert len(step.chosen) == len(chosen), "a page is attended twice"
            assert step.chosen[-1] == pages - 1, "the open page comes last"
            if config.policy == "full" or pages <= config.budget_pages:
                assert len(chosen) == pages, "a full row or one within its budget is not whole"
                continue
            forced = {*range(config.sink_pages), *range(pages - config.window_pages, pages)}
            assert forced <= chosen, "a sink or window page is left out"
            assert len(chosen) <= config.budget_pages
            if config.recall_cap is None:
                assert len(chosen) == config.budget_pages, "the list is not full"
        config = self.fake.config
        pages = [len(self.fake.rows[row].pages) for row in batch]
        # Later waves find other pages resident than those seen before the layer ran.
        told = not own and len(self.fake.cache.admission.waves(pages)) == 1
        exact = config.selection == "recall" and self.fake.geometry.dtype == torch.float32
        if told and exact:
            for step in self.random.sample(self.fake.steps, min(2, len(self.fake.steps))):
                self._check_ranking(step)

    def _check_ranking(self, step: Step) -> None:
        """The chosen pages are those that the rule, read aloud, chooses by the digests."""
        config, fake = self.fake.config, self.fake
        held = fake.rows[step.row].pages
        candidates = list(range(config.sink_pages, len(held) - config.window_pages))
        lane = step.group * fake.cache.store.page_stride
        pages = lane + torch.tensor(held)
        layer = fake.cache.store.managed[step.layer - fake.geometry.dense_layers]
        scores: dict[int, float] = {}
        if len(held) > config.budget_pages:
            digests = layer.digests[pages].double().numpy()
            scores = oracle.page_scores(
                step.query, digests, candidates, config.head_reduce, fake.scaling
            )
        expected = oracle.select(
            len(held), scores, step.resident,
            budget=config.budget_pages, sinks=config.sink_pages, window=config.window_pages,
            must=config.must_pages, cap=config.recall_cap,
        )  # fmt: skip
        values = [scores[page] for page in expected ^ set(step.chosen)]
        assert not values or np.ptp(values) < TIE, f"{step} should attend to {sorted(expected)}"


def one_world(seed: int) -> tuple[int, collections.Counter[str], str | None]:
    """Run a world; returns its seed, its events by kind, and what broke."""
    world = World(seed)
    try:
        world.run()
    except Exception:
        return seed, world.counts, traceback.format_exc()
    return seed, world.counts, None
