"""An engine that counts what the policy does by looking at its tables before and after.

Shares no code with the counters: what was attended is read off attention's own arguments, what
moved off the tables, what had to move off the selection oracle.
"""

from __future__ import annotations

import collections

from support import oracle
from support.engine import FakeEngine, Step

COUNTED = (
    "page_hits", "page_misses", "pages_recalled", "pages_evicted", "pages_refused",
    "forced_fills", "pages_withheld", "pages_digested", "pages_backed_up",
)  # fmt: skip


class CountingEngine(FakeEngine):
    """Batches must attend in one wave."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.counted = [collections.Counter() for _ in range(self.geometry.managed_layers)]
        self._before: list[set[int]] | None = None

    def resident(self, managed: int) -> set[int]:
        """Lane pages that hold a frame in a managed layer."""
        frame_of = self.cache.store.residency.frame_of[managed]
        return {page for page, frame in enumerate(frame_of.tolist()) if frame >= 0}

    def _residents_of_all(self) -> list[set[int]]:
        return [self.resident(managed) for managed in range(self.geometry.managed_layers)]

    def _full_pages(self) -> set[int]:
        size = self.config.page_size
        return {page for row in self.rows.values() for page in row.pages[: row.tokens // size]}

    def extend(self, chunks, settings=None):
        self.cache.settle()
        before, full = self._residents_of_all(), self._full_pages()
        worst = super().extend(chunks, settings)
        self._count_evicted(before)
        self._count_sealed(full)
        return worst

    def decode(self, rows, settings=None):
        self.cache.settle()
        self._before, full = self._residents_of_all(), self._full_pages()
        done = len(self.steps)
        worst = super().decode(rows, settings)
        self._count_sealed(full)
        for step in self.steps[done:]:
            self._count_step(step)
        return worst

    def _decode_managed(self, managed, *arguments):
        if self._before is not None:  # what the plan evicted, for pages that open
            self._count_evicted(self._before)
            self._before = None
        before = self.resident(managed)
        result = super()._decode_managed(managed, *arguments)
        after = self.resident(managed)
        self.counted[managed]["pages_recalled"] += len(after - before)
        self.counted[managed]["pages_evicted"] += len(before - after)
        return result

    def _count_evicted(self, before: list[set[int]]) -> None:
        for counted, old, new in zip(self.counted, before, self._residents_of_all(), strict=True):
            counted["pages_evicted"] += len(old - new)

    def _count_sealed(self, full: set[int]) -> None:
        grown = len(self._full_pages() - full) * self.geometry.groups
        for counted in self.counted:
            counted["pages_digested"] += grown
            counted["pages_backed_up"] += grown

    def _count_step(self, step: Step) -> None:
        counted = self.counted[step.layer - self.geometry.dense_layers]
        hits = len(set(step.chosen) & step.resident)
        counted["page_hits"] += hits
        counted["page_misses"] += len(step.chosen) - hits
        config, pages = self.config, max(step.chosen) + 1
        if pages <= config.budget_pages:
            return
        lane = slice(
            step.group * self.geometry.lane_heads, (step.group + 1) * self.geometry.lane_heads
        )
        keys = self.keys[step.layer, self.rows[step.row].pages][: pages - 1, :, lane]
        ranked = list(range(config.sink_pages, pages - config.window_pages))
        scores = oracle.page_scores(
            step.query, oracle.digests(keys, config.digest), ranked, config.head_reduce,
            self.scaling,
        )  # fmt: skip
        best = sorted(ranked, key=lambda page: -scores[page])
        must, others = set(best[: config.must_pages]), set(best[config.must_pages :])
        counted["forced_fills"] += len((others & set(step.chosen)) - step.resident)
        counted["pages_withheld"] += len(must - set(step.chosen))


def reported(engine: CountingEngine) -> list[dict[str, int]]:
    """What the counters say, layer by layer."""
    return [{name: layer[name] for name in COUNTED} for layer in engine.cache.report()["layers"]]


def counted(engine: CountingEngine) -> list[dict[str, int]]:
    """What was seen."""
    return [{name: layer[name] for name in COUNTED} for layer in engine.counted]


def states_of(engine: CountingEngine, row: int) -> list[list[list[str]]]:
    """What the last step did to each page of a row, ``[layers][groups][pages]``."""
    stride = engine.cache.store.page_stride
    steps = {(step.layer, step.group): step for step in engine.steps if step.row == row}
    found = []
    for managed in range(engine.geometry.managed_layers):
        frame_of = engine.cache.store.residency.frame_of[managed]
        lanes = []
        for group in range(engine.geometry.groups):
            step = steps[managed + engine.geometry.dense_layers, group]
            words = []
            for place, page in enumerate(engine.rows[row].pages):
                word = "resident" if frame_of[group * stride + page] >= 0 else "absent"
                if place in step.chosen:
                    word = "attended" if place in step.resident else "recalled"
                words.append(word)
            lanes.append(words)
        found.append(lanes)
    return found
