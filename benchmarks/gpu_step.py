"""One layer's decode step as the server runs it, on random data, eager or captured in a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_cases import (
    KIND,
    Shape,
    attend,
    empty_layer,
    flashinfer,
    make_resident,
    residency,
    score,
    select,
    transfer,
)

from arkvale_kernels.layout import PINNED, NewTokens, SelectionRule


def _warm_up(run: Callable[[], object]) -> None:
    """Compile and allocate what a capture must not, on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` as the replay of a graph, so that a timing holds no launch costs of the host."""
    _warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Step:
    """A batch whose rows hold ``counts`` pages each (0 is inert), the last of them open.

    Frames exist for what one step can choose and ``spare`` pages more, so most pages start out
    evicted; ``backed`` says how many lane pages have a backup, all of them if ``None``.
    """

    def __init__(
        self,
        shape: Shape,
        counts: list[int],
        device: torch.device,
        *,
        budget: int,
        spare: int,
        seed: int,
        backed: int | None = None,
    ):
        torch.manual_seed(seed)
        self.shape = shape
        budget_pages = budget // shape.page_size
        self.rule = SelectionRule(budget_pages, budget_pages // 2, 2, 2)
        pages = sum(counts)
        frames = sum(min(count, budget_pages) for count in counts) + spare
        self.layer = empty_layer(shape, device, pages=pages, frames=frames, backed=backed)
        table = torch.zeros((len(counts), max(counts)), dtype=torch.int32, device=device)
        first = 1
        for row, count in enumerate(counts):
            table[row, :count] = torch.arange(first, first + count, device=device)
            first += count
        stride = pages + 1
        lanes = torch.arange(shape.groups, device=device, dtype=torch.int32) * stride
        spread = torch.where(table.unsqueeze(1) > 0, table.unsqueeze(1) + lanes.view(1, -1, 1), 0)
        self.lane_pages = spread.flatten(0, 1).int().contiguous()
        by_row = torch.tensor(counts, dtype=torch.int32, device=device)
        self.page_counts = by_row.repeat_interleave(shape.groups)
        last = (self.page_counts.long() - 1).clamp(min=0).unsqueeze(1)
        self.open_pages = self.lane_pages.gather(1, last).squeeze(1)
        self.offsets = torch.full_like(self.open_pages, shape.page_size // 2)
        listed = self.page_counts.clamp(max=budget_pages)
        tail = shape.page_size - 1 - self.offsets
        self.lengths = torch.where(listed > 0, listed * shape.page_size - tail, 0).int()
        self._open(table, by_row, stride)
        rows = len(counts) * shape.groups
        self.query = torch.randn(
            (rows, shape.lane_query_heads, shape.head_dim), dtype=shape.dtype, device=device
        )
        self.k, self.v = (
            torch.randn((rows, shape.lane_heads, shape.head_dim), dtype=shape.dtype, device=device)
            for _ in range(2)
        )
        self.clock = torch.ones((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(5, dtype=torch.int64, device=device)
        self.out: torch.Tensor

    def _open(self, table: torch.Tensor, counts: torch.Tensor, stride: int) -> None:
        """Give every row's open page a frame that it keeps."""
        last = table.gather(1, (counts.long() - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        make_resident(self.layer, self.shape, last[last > 0].long())
        tables = self.layer.residency
        frames = tables.frame_of[self.open_pages[self.open_pages > 0].long()].long()
        tables.heat[frames] = PINNED

    def advance(self, number: int) -> None:
        """Move on in time, in place: another query, the next place in the open page."""
        self.clock += 1
        generator = torch.Generator().manual_seed(number)
        self.query.copy_(torch.randn(self.query.shape, generator=generator))
        self.offsets.fill_(number % self.shape.page_size)

    def settle(self) -> None:
        """Make what this query chooses resident without reading it, so that nothing is recalled
        from now on while the query stays."""
        for _ in range(3):
            self.clock += 1
            _, recalls = self._resolve(*self._select(self._score()))
        if int(recalls.counts.sum()):
            raise RuntimeError("a settled step still recalls, and most pages have no backup here")

    def parts(self) -> dict[str, Callable[[], object]]:
        """The launches of a step, each with the outcome of those before it."""
        layer, shape = self.layer, self.shape
        scores = self._score()
        chosen, importance = self._select(scores)
        frames, recalls = self._resolve(chosen, importance)
        new = NewTokens(self.open_pages, self.offsets, self.k, self.v)
        return {
            "score": self._score,
            "select": lambda: self._select(scores),
            "resolve": lambda: self._resolve(chosen, importance),
            "move": lambda: transfer.move_pages(layer, new, recalls, self.clock, KIND),
            "attend": lambda: attend.attend_frames(
                self.query, layer.k_frames, layer.v_frames, frames, self.lengths, shape.scaling,
                None,
            ),
        }  # fmt: skip

    def _score(self) -> torch.Tensor:
        return score.score_pages(
            self.query, self.layer.digests, self.layer.residency.frame_of, self.lane_pages,
            self.page_counts, self.rule, "mean", self.shape.scaling,
        )  # fmt: skip

    def _select(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return select.select_pages(scores, self.lane_pages, self.page_counts, self.rule)

    def _resolve(self, chosen: torch.Tensor, importance: torch.Tensor):
        return residency.resolve_pages(
            self.layer.residency, chosen, importance, self.clock, self.counts, self.shape.groups,
            None,
        )  # fmt: skip

    def run(self) -> torch.Tensor:
        """The whole step: ``[lane rows, query heads of a lane, head_dim]``."""
        frames, recalls = self._resolve(*self._select(self._score()))
        new = NewTokens(self.open_pages, self.offsets, self.k, self.v)
        transfer.move_pages(self.layer, new, recalls, self.clock, KIND)
        out, _ = attend.attend_frames(
            self.query, self.layer.k_frames, self.layer.v_frames, frames, self.lengths,
            self.shape.scaling, None,
        )  # fmt: skip
        return out

    def capture(self) -> torch.cuda.CUDAGraph:
        """A graph over the step, which leaves its result in :attr:`out`; the state stays as it
        was, since what warming up did to it is undone."""
        tables = [table.clone() for table in self.layer.residency]
        counts = self.counts.clone()
        _warm_up(self.run)
        for table, before in zip(self.layer.residency, tables, strict=True):
            table.copy_(before)
        self.counts.copy_(counts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.out = self.run()
        return graph

    def flashinfer(self, pages: int) -> Callable[[], object]:
        """FlashInfer over ``pages`` pages of every row; all of them is what a server without the
        policy runs."""
        shape, device = self.shape, self.query.device
        rows = self.page_counts.shape[0]
        planned = flashinfer.FlashInferDecode(
            flashinfer.AttentionShape(
                shape.query_heads, shape.kv_heads, shape.head_dim, shape.page_size, shape.dtype,
                shape.scaling,
            ),
            rows, rows * pages,
            torch.empty(flashinfer.WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            fixed=True,
        )  # fmt: skip
        size = (rows * pages, shape.page_size, shape.kv_heads, shape.head_dim)
        k, v = (torch.randn(size, dtype=shape.dtype, device=device) for _ in range(2))
        planned.plan([pages * shape.page_size - shape.page_size // 2] * rows)
        planned.lists.indices.copy_(torch.randperm(rows * pages, device=device).int())
        return lambda: planned.run(self.query, k, v, shape.scaling)
