"""A stand-in for SGLang: hands out pages, keeps the slot table, runs passes through the cache.

Queries, keys and values are random; what every page truly holds is remembered in float64, so that
any output can be checked against dense attention.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import PoolPlan
from arkvale_sglang.runtime import decode, prefill
from arkvale_sglang.runtime.cache import PagedCache
from support import oracle


@dataclasses.dataclass
class Row:
    """A request: its pages in order and how many tokens it holds."""

    pages: list[int]
    tokens: int = 0


@dataclasses.dataclass
class Step:
    """One lane row of a decode step in one layer: what went in, was chosen, and came out."""

    layer: int
    group: int
    row: int
    query: np.ndarray
    """``[query heads of the lane, head_dim]``."""
    resident: set[int]
    """Indices into the row's pages that held a frame before the layer ran."""
    chosen: list[int]
    """Indices attended, in the order of the list."""
    output: np.ndarray


class FakeEngine:
    """Pages 1..P, a slot table, and layers of random attention."""

    def __init__(
        self,
        config: ArkValeConfig,
        *,
        pages: int,
        frames: int,
        layers: int = 2,
        kv_heads: int = 2,
        query_heads: int = 4,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
        max_rows: int = 16,
        seed: int = 0,
    ):
        geometry = PageGeometry(
            page_size=config.page_size,
            layers=layers,
            dense_layers=min(config.dense_layers, layers - 1),
            kv_heads=kv_heads,
            head_dim=head_dim,
            groups=config.head_groups,
            dtype=dtype,
        )
        self.config = config
        self.geometry = geometry
        self.query_heads = query_heads
        self.scaling = head_dim**-0.5
        self.cache = PagedCache(config, PoolPlan(geometry, pages, frames), "cpu")
        self.cache.live_pages = lambda: pages - len(self.free_pages)
        self.free_pages = list(range(1, pages + 1))
        self.references = dict.fromkeys(range(1, pages + 1), 0)
        self.rows: dict[int, Row] = {}
        self.slots = torch.zeros(max_rows, pages * config.page_size, dtype=torch.int32)
        shape = (layers, pages + 1, config.page_size, kv_heads, head_dim)
        self.keys, self.values = np.zeros(shape), np.zeros(shape)
        self.random = torch.Generator().manual_seed(seed)
        self._digests: dict[int, np.ndarray] = {}
        """What the oracle makes of each full page: ``[managed layers, 2, KV heads, head_dim]``."""
        self.steps: list[Step] = []
        self.prompt_queries: dict[tuple[int, int], np.ndarray] = {}
        """``[tokens, query heads, head_dim]`` of each row's latest chunk, by layer and row."""

    # -- the engine's bookkeeping ------------------------------------------------------------

    def add_row(self) -> int:
        """A new empty request."""
        row = next(index for index in range(len(self.slots)) if index not in self.rows)
        self.rows[row] = Row([])
        return row

    def share(self, parent: int, pages: int) -> int:
        """A new request on the first ``pages`` full pages of another one."""
        row = self.add_row()
        source = self.rows[parent]
        pages = min(pages, source.tokens // self.config.page_size)
        self.rows[row] = Row(source.pages[:pages], pages * self.config.page_size)
        for page in self.rows[row].pages:
            self.references[page] += 1
        self._write_slots(row)
        return row

    def free(self, row: int) -> None:
        """Drop a request; pages nobody else holds die."""
        dead = []
        for page in self.rows.pop(row).pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                dead.append(page)
        self.free_pages.extend(dead)
        if dead:
            self.cache.release(torch.tensor(dead))

    def flush(self) -> None:
        """Drop everything, as flush_cache does."""
        self.rows.clear()
        self.references = dict.fromkeys(self.references, 0)
        self.free_pages = sorted(self.references)
        self.cache.reset()

    def pages_needed(self, row: int, tokens: int) -> int:
        size = self.config.page_size
        return -(-(self.rows[row].tokens + tokens) // size) - len(self.rows[row].pages)

    def _grow(self, row: int, tokens: int) -> None:
        state = self.rows[row]
        for _ in range(self.pages_needed(row, tokens)):
            page = self.free_pages.pop(0)
            self._digests.pop(page, None)
            self.references[page] = 1
            state.pages.append(page)
        state.tokens += tokens
        self._write_slots(row)

    def _write_slots(self, row: int) -> None:
        size = self.config.page_size
        pages = torch.tensor(self.rows[row].pages, dtype=torch.int32)
        slots = (pages[:, None] * size + torch.arange(size, dtype=torch.int32)).flatten()
        self.slots[row, : len(slots)] = slots

    # -- forward passes ----------------------------------------------------------------------

    def _random(self, tokens: int, heads: int) -> torch.Tensor:
        shape = (tokens, heads, self.geometry.head_dim)
        return torch.randn(shape, generator=self.random).to(self.geometry.dtype)

    def _remember(self, layer: int, row: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        size = self.config.page_size
        tokens = np.arange(start, start + k.shape[0])
        pages = np.array(self.rows[row].pages)[tokens // size]
        self.keys[layer, pages, tokens % size] = k.double().numpy()
        self.values[layer, pages, tokens % size] = v.double().numpy()

    def truth(self, layer: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a request, ``[tokens, heads, head_dim]`` float64."""
        state = self.rows[row]
        keys, values = (
            held[layer, state.pages].reshape(-1, *held.shape[3:])[: state.tokens]
            for held in (self.keys, self.values)
        )
        return keys, values

    def extend(self, chunks: dict[int, int], settings: list[ArkValeConfig] | None = None) -> float:
        """Prefill ``{row: tokens}`` in one pass; returns the largest error against dense."""
        rows = list(chunks)
        prefixes = [self.rows[row].tokens for row in rows]
        new_slots = []
        for row, prefix in zip(rows, prefixes, strict=True):
            self._grow(row, chunks[row])
            new_slots.append(self.slots[row, prefix : prefix + chunks[row]].long())
        step = prefill.plan_extend(
            self.cache, self.slots, torch.tensor(rows), torch.cat(new_slots), prefixes,
            list(chunks.values()), settings,
        )  # fmt: skip
        worst, total = 0.0, sum(chunks.values())
        for layer in range(self.geometry.layers):
            query = self._random(total, self.query_heads)
            k, v = (self._random(total, self.geometry.kv_heads) for _ in range(2))
            managed = layer - self.geometry.dense_layers
            if managed < 0:
                dense = self.cache.store.dense[layer]
                out = prefill.extend_dense(self.cache, dense, step, query, k, v, self.scaling)
            else:
                out = prefill.extend_managed(self.cache, managed, step, query, k, v, self.scaling)
            start = 0
            for row, prefix in zip(rows, prefixes, strict=True):
                stop = start + chunks[row]
                self._remember(layer, row, prefix, k[start:stop], v[start:stop])
                self.prompt_queries[layer, row] = query[start:stop].double().numpy()
                keys, values = self.truth(layer, row)
                expected = oracle.causal_attention(
                    query[start:stop].double().numpy(), keys, values, prefix, self.scaling
                )
                worst = max(worst, np.abs(out[start:stop].double().numpy() - expected).max())
                start = stop
        return worst

    def decode(self, rows: list[int], settings: list[ArkValeConfig] | None = None) -> float:
        """One token for every row; returns the largest error against attention over what was
        chosen, and appends to :attr:`steps`."""
        for row in rows:
            self._grow(row, 1)
        lengths = [self.rows[row].tokens for row in rows]
        step = decode.plan_decode(
            self.cache, self.slots, torch.tensor(rows), torch.tensor(lengths), lengths, settings
        )
        worst = 0.0
        for layer in range(self.geometry.layers):
            query = self._random(len(rows), self.query_heads)
            k, v = (self._random(len(rows), self.geometry.kv_heads) for _ in range(2))
            for index, row in enumerate(rows):
                length = self.rows[row].tokens - 1
                self._remember(layer, row, length, k[index : index + 1], v[index : index + 1])
            managed = layer - self.geometry.dense_layers
            if managed < 0:
                dense = self.cache.store.dense[layer]
                out = decode.decode_dense(dense, step, query, k, v, self.scaling)
                chosen = None
            else:
                residents = self._residents(managed, rows)
                out, chosen = self._decode_managed(managed, step, query, k, v, rows)
            out = out.double().numpy()
            for index, row in enumerate(rows):
                keys, values = self.truth(layer, row)
                for group in range(self.geometry.groups):
                    q = self._lane(query[index].double().numpy(), group)
                    lane_keys, lane_values = (self._lane_kv(part, group) for part in (keys, values))
                    attended = None
                    if chosen is not None:
                        attended = chosen[index, group]
                        self.steps.append(
                            Step(
                                layer, group, row, q, residents[index, group], attended,
                                self._lane(out[index], group),
                            )
                        )  # fmt: skip
                    expected = oracle.attention_over_pages(
                        q, lane_keys, lane_values, attended, self.config.page_size, self.scaling
                    )
                    worst = max(worst, np.abs(self._lane(out[index], group) - expected).max())
        return worst

    def _lane(self, by_head: np.ndarray, group: int) -> np.ndarray:
        heads = self.query_heads // self.geometry.groups
        return by_head[group * heads : (group + 1) * heads]

    def _lane_kv(self, part: np.ndarray, group: int) -> np.ndarray:
        heads = self.geometry.lane_heads
        return part[:, group * heads : (group + 1) * heads]

    def _residents(self, managed: int, rows: list[int]) -> dict[tuple[int, int], set[int]]:
        frame_of = self.cache.store.managed[managed].residency.frame_of
        stride = self.cache.store.page_stride
        return {
            (index, group): {
                place
                for place, page in enumerate(self.rows[row].pages)
                if frame_of[group * stride + page] >= 0
            }
            for index, row in enumerate(rows)
            for group in range(self.geometry.groups)
        }

    def _decode_managed(self, managed, step, query, k, v, rows):
        """Run the layer and read off which pages each lane row attended to."""
        attended = []
        original, whole = decode.attend_frames, decode.attend_whole

        def spy(query, k_frames, v_frames, lane_frames, lengths, **options):
            page_in = self.cache.store.managed[managed].residency.page_in
            for frames in lane_frames:
                held = [int(page_in[frame]) for frame in frames if frame >= 0]
                attended.append([page % self.cache.store.page_stride for page in held])
            return original(query, k_frames, v_frames, lane_frames, lengths, **options)

        def spy_whole(cache, index, sequences, *rest):
            for sequence in sequences:
                pages = self.rows[rows[sequence.tokens.start]].pages
                attended.extend([pages] * self.geometry.groups)
            return whole(cache, index, sequences, *rest)

        decode.attend_frames, decode.attend_whole = spy, spy_whole
        try:
            out = decode.decode_managed(self.cache, managed, step, query, k, v, self.scaling)
        finally:
            decode.attend_frames, decode.attend_whole = original, whole
        chosen = {}
        for lane_row, pages in enumerate(attended):
            index, group = divmod(lane_row, self.geometry.groups)
            chosen[index, group] = [self.rows[rows[index]].pages.index(page) for page in pages]
        return out, chosen

    def check(self) -> None:
        """The laws of docs/design.md on top of those the store checks itself."""
        self.cache.settle()
        store = self.cache.store
        assert store.violations() == []
        live = {page for page, count in self.references.items() if count}
        assert live.isdisjoint(self.free_pages)
        assert len(live) + len(self.free_pages) == self.cache.plan.logical_pages
        size = self.config.page_size
        full = {page for row in self.rows.values() for page in row.pages[: row.tokens // size]}
        assert set(store.sealed.nonzero().flatten().tolist()) == full
        frame_of = store.residency.frame_of.unflatten(1, (self.geometry.groups, -1))
        mapped = set((frame_of >= 0).any(0).any(0).nonzero().flatten().tolist())
        assert mapped <= live
        open_pages = {row.pages[-1] for row in self.rows.values() if row.tokens % size}
        for page in open_pages:
            assert (frame_of[:, :, page] >= 0).all(), "an open page was evicted"
        self._check_backups(sorted(full))

    def _check_backups(self, pages: list[int]) -> None:
        """Full pages are what was written: in their backup, their frames and their digest."""
        if not pages:
            return
        store, geometry = self.cache.store, self.geometry
        written = np.stack([self.keys, self.values], 2)[geometry.dense_layers :, pages]
        lanes = (geometry.groups, -1)
        digests = np.stack([self._digest(page) for page in pages], 1)
        for layer, held, expected in zip(store.managed, written, digests, strict=True):
            held, expected = (
                self._by_lane(part, axis) for part, axis in ((held, 3), (expected, 2))
            )
            host = layer.host.unflatten(0, lanes)[:, pages].double().numpy()
            np.testing.assert_array_equal(host, held)
            found = layer.digests.unflatten(0, lanes)[:, pages].double().numpy()
            largest = max(1.0, np.abs(held).max(initial=0))
            tolerance = 4 * torch.finfo(geometry.dtype).eps * largest
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
            frames = layer.residency.frame_of.unflatten(0, lanes)[:, pages]
            resident = (frames >= 0).numpy()
            for half, kept in enumerate((layer.k_frames, layer.v_frames)):
                found = kept[frames[frames >= 0].long()].double().numpy()
                np.testing.assert_array_equal(found, held[resident][:, half])

    def _by_lane(self, part: np.ndarray, axis: int) -> np.ndarray:
        """Split the heads at ``axis`` over lanes, which come first."""
        return np.stack(np.split(part, self.geometry.groups, axis))

    def _digest(self, page: int) -> np.ndarray:
        """Of a full page, which does not change; kept until the page is handed out anew."""
        known = self._digests.get(page)
        if known is None:
            keys = self.keys[self.geometry.dense_layers :, page]
            known = self._digests[page] = oracle.digests(keys, self.config.digest)
        return known
