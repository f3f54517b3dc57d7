"""How many rows the frames can serve, and which rows of a batch attend together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

from arkvale_kernels.layout import SelectionRule
from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.sizing import PoolPlan


@functools.lru_cache(maxsize=4096)
def selection_rule(config: ArkValeConfig) -> SelectionRule:
    """The settings as the select op takes them, in pages."""
    return SelectionRule(
        config.budget_pages,
        config.must_pages,
        config.sink_pages,
        config.window_pages,
        config.recall_cap if config.selection == "recall" else None,
    )


class FrameAdmission:
    """Keeps the frames that one step can ask for within the frames that exist.

    A running request asks for at most ``min(frame pages, its pages)`` frames in a lane, by the
    settings it is served with; pages shared between requests make this an overestimate, never an
    underestimate.
    """

    def __init__(self, config: ArkValeConfig, plan: PoolPlan):
        self._page_size = config.page_size
        self._unbounded = plan.fits
        self._frames = plan.frames
        self.need_limit = min(config.budget_pages, plan.logical_pages)
        """Most frames one request can ask for; none has more than the server's budget."""
        self.promised = int(plan.frames * config.oversubscription)
        """Frames that admission may promise to running requests."""

    @property
    def most_requests(self) -> int | None:
        """Requests whose open pages leave room for one row's choice; ``None`` if unbounded."""
        return None if self._unbounded else max(1, self._frames - self.need_limit)

    def need(self, tokens: int, settings: ArkValeConfig | None = None) -> int:
        """Frames that a request of so many tokens may ask for in one step.

        ``settings`` are its own; ``None`` stands for the server's.
        """
        limit = settings.frame_pages if settings else self.need_limit
        return min(limit, self.need_limit, -(-tokens // self._page_size))

    def holds(
        self, running_tokens: Iterable[int], settings: Iterable[ArkValeConfig | None] = ()
    ) -> bool:
        """Whether the next step of these requests stays within the promise.

        One alone always does, so an idle server admits whatever comes.  ``settings`` are those of
        each request; all have the server's if there are none.
        """
        if self._unbounded:
            return True
        requests = itertools.zip_longest(running_tokens, settings)
        needs = [self.need(tokens + 1, own) for tokens, own in requests]
        return len(needs) <= 1 or sum(needs) <= self.promised

    def waves(
        self, page_counts: Sequence[int], limits: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """Cut a batch into runs of rows whose choices fit the frames together.

        ``limits`` are the frame pages of each row, where some have settings of their own.  Rows of
        other runs keep their open pages pinned meanwhile, and so may one request in the middle of
        its prefill.
        """
        rows = len(page_counts)
        if self._unbounded:
            return [(0, rows)]
        room = self._frames - sum(pages > 0 for pages in page_counts) - 1
        runs, start, used = [], 0, 0
        for row, pages in enumerate(page_counts):
            limit = min(self.need_limit, limits[row]) if limits else self.need_limit
            need = max(0, min(limit, pages) - 1)  # an inert row of 0 pages needs none
            if row > start and used + need > room:
                runs.append((start, row))
                start, used = row, 0
            used += need
        return [*runs, (start, rows)]
