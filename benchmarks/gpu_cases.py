"""States for the GPU check and the checks themselves: every kernel against plain float64 torch.

Needs torch and triton alone (flashinfer where it is installed); nothing here knows SGLang.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from arkvale_kernels.attend import flashinfer
from arkvale_kernels.attend import kernel as attend
from arkvale_kernels.digest import kernel as digest
from arkvale_kernels.layout import (
    FREE,
    PINNED,
    FrameLists,
    NewTokens,
    PagedLayer,
    Recalls,
    Residency,
    SelectionRule,
)
from arkvale_kernels.residency import kernel as residency
from arkvale_kernels.residency import reference as residency_reference
from arkvale_kernels.score import kernel as score
from arkvale_kernels.select import kernel as select
from arkvale_kernels.select import reference as select_reference
from arkvale_kernels.transfer import kernel as transfer
from arkvale_kernels.transfer import reference as transfer_reference

KIND = "cuboid-center"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer of a model, and how its cache is cut."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 32
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def lane_heads(self) -> int:
        """KV heads of a lane."""
        return self.kv_heads // self.groups

    @property
    def lane_query_heads(self) -> int:
        """Query heads of a lane."""
        return self.query_heads // self.groups

    @property
    def scaling(self) -> float:
        """Softmax scale."""
        return self.head_dim**-0.5


def empty_layer(
    shape: Shape, device: torch.device, *, pages: int, frames: int, backed: int | None = None
) -> PagedLayer:
    """A layer with nothing resident; backups for the first ``backed`` lane pages only."""
    lanes = shape.groups * (pages + 1)
    lane_frames = shape.groups * frames + 1
    page = (shape.page_size, shape.lane_heads, shape.head_dim)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=shape.dtype, device=device)

    host = torch.randn((lanes if backed is None else backed, 2, *page), dtype=shape.dtype)
    heat = torch.full((lane_frames,), FREE, device=device)
    heat[-1] = PINNED
    return PagedLayer(
        random(lane_frames, *page),
        random(lane_frames, *page),
        host.pin_memory() if device.type == "cuda" else host,
        random(lanes, 2, *page[1:]).sort(1, descending=True).values,
        Residency(
            torch.full((lanes,), -1, dtype=torch.int32, device=device),
            torch.full((lane_frames,), -1, dtype=torch.int32, device=device),
            heat,
        ),
    )


def copy_of(layer: PagedLayer) -> PagedLayer:
    """Everything cloned; the backup stays pinned."""
    host = layer.host.clone()
    return PagedLayer(
        layer.k_frames.clone(),
        layer.v_frames.clone(),
        host.pin_memory() if layer.host.is_pinned() else host,
        layer.digests.clone(),
        Residency(*(table.clone() for table in layer.residency)),
    )


def make_resident(layer: PagedLayer, shape: Shape, pages: torch.Tensor) -> None:
    """Give logical ``pages`` [n] int64 frames in every lane, cold ones, filled from the backup."""
    stacked = Residency(*(table.unsqueeze(0) for table in layer.residency))
    heat = torch.arange(1, pages.shape[0] + 1, device=pages.device)
    residency_reference.claim_frames(stacked, pages, heat, shape.groups, 0)
    stride = layer.residency.frame_of.shape[0] // shape.groups
    lanes = torch.arange(shape.groups, device=pages.device).unsqueeze(1) * stride
    lane_pages = (pages + lanes).flatten()
    lane_pages = lane_pages[lane_pages < layer.host.shape[0]]
    frames = layer.residency.frame_of[lane_pages]
    transfer_reference.move_pages(
        layer, None, Recalls(lane_pages, frames), torch.zeros((), dtype=torch.int64), KIND
    )


def row_pages(shape: Shape, counts: list[int], stride: int, device: torch.device) -> torch.Tensor:
    """Random distinct pages per row, ``[rows * groups, most pages]`` int32 lane pages."""
    table = torch.zeros((len(counts), max(counts)), dtype=torch.int32, device=device)
    for row, count in enumerate(counts):
        table[row, :count] = 1 + torch.randperm(stride - 1, device=device)[:count].int()
    lanes = torch.arange(shape.groups, device=device, dtype=torch.int32) * stride
    return (table.unsqueeze(1) + lanes.view(1, -1, 1)).flatten(0, 1).contiguous()


def ragged(rows: int, most: int) -> list[int]:
    """So many random sizes from 1 to ``most``."""
    return torch.randint(1, most + 1, (rows,)).tolist()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the size of what was expected."""
    expected = expected.double()
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def close(found: torch.Tensor, expected: torch.Tensor, roundings: float) -> float:
    """The error, which must stay within so many roundings of the dtype found."""
    worst = error(found, expected)
    limit = roundings * torch.finfo(found.dtype).eps
    assert worst <= limit, f"error {worst:.2e} exceeds {limit:.2e}"
    return worst


def dense(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """One row in float64: ``[heads, dim]`` over ``[tokens, KV heads, dim]``."""
    ratio = query.shape[0] // k.shape[1]
    k, v = (part.double().repeat_interleave(ratio, 1) for part in (k, v))
    weights = torch.softmax(torch.einsum("hd,thd->ht", query.double(), k) * scaling, -1)
    return torch.einsum("ht,thd->hd", weights, v)


def check_digest(shape: Shape, device: torch.device) -> float:
    """All pages of a prefill chunk."""
    size = (37, shape.page_size, shape.lane_heads, shape.head_dim)
    keys = torch.randn(size, dtype=shape.dtype, device=device)
    wide = keys.double()
    center = (wide.amax(1) + wide.amin(1)) / 2
    deviation = (wide - center.unsqueeze(1)).abs()
    radius = (deviation.amin(1) + deviation.amax(1)) / 2
    expected = torch.stack((center + radius, center - radius), 1)
    return close(digest.build_digests(keys, KIND, keys.dtype), expected, 1)


def check_score(shape: Shape, device: torch.device) -> float:
    """Ragged rows, inert ones and ones under budget."""
    layer = empty_layer(shape, device, pages=400, frames=8, backed=1)
    counts = [0, 300, *ragged(2, 390)]
    lane_pages = row_pages(shape, [max(1, count) for count in counts], 401, device)
    by_lane = torch.tensor(counts, dtype=torch.int32, device=device).repeat_interleave(shape.groups)
    size = (len(by_lane), shape.lane_query_heads, shape.head_dim)
    query = torch.randn(size, dtype=shape.dtype, device=device)
    rule = SelectionRule(64, 32, 2, 2)
    frame_of = layer.residency.frame_of
    found = score.score_pages(
        query, layer.digests, frame_of, lane_pages, by_lane, rule, "mean", shape.scaling
    )
    q = query.double().unflatten(1, (shape.lane_heads, -1)).unsqueeze(1)
    bounds = layer.digests.double()[lane_pages.long()].unsqueeze(4)
    expected = torch.maximum(q * bounds[:, :, 0], q * bounds[:, :, 1]).sum((2, 4))
    expected = expected.sum(-1) if expected.dim() > 2 else expected
    competing = rule.competing(by_lane, lane_pages.shape[1])
    expected = expected / shape.lane_query_heads
    return close(found[competing], expected[competing], 256)


def check_select(shape: Shape, device: torch.device) -> float:
    """The same pages as the definition, whose ranking is one top-k."""
    rule = SelectionRule(64, 30, 2, 2)
    counts = torch.tensor([0, 65, *ragged(3, 5000)], dtype=torch.int32, device=device)
    lane_pages = torch.arange(1, 5001, dtype=torch.int32, device=device).repeat(5, 1)
    scores = torch.randperm(25000, device=device).float().view(5, 5000)
    scores = ((scores.view(torch.int32) & ~1) | (scores.int() % 3 == 0)).view(torch.float32)
    found = select.select_pages(scores, lane_pages, counts, rule)[0].sort(1).values
    expected = select_reference.select_pages(scores, lane_pages, counts, rule)[0].sort(1).values
    assert torch.equal(found, expected), "other pages were chosen"
    return 0.0


def check_resolve(shape: Shape, device: torch.device) -> float:
    """Tables, totals and lists after free frames, evictions and shared misses."""
    layer = empty_layer(shape, device, pages=300, frames=150, backed=1)
    make_resident(layer, shape, 1 + torch.randperm(300, device=device)[:140])
    tables = [Residency(*(table.clone() for table in layer.residency)) for _ in range(2)]
    wanted = row_pages(shape, ragged(3, 40), 301, device)
    counts = [torch.zeros(5, dtype=torch.int64, device=device) for _ in range(2)]
    scores = torch.randn(wanted.shape, device=device)
    clock = torch.full((), 7, device=device)
    for implementation, table, count in zip(
        (residency, residency_reference), tables, counts, strict=True
    ):
        implementation.resolve_pages(table, wanted, scores, clock, count, shape.groups, None)
    assert torch.equal(*counts), f"counted {counts[0].tolist()}, not {counts[1].tolist()}"
    resident = [table.frame_of >= 0 for table in tables]
    assert torch.equal(*resident), "other pages are resident"
    assert torch.equal(tables[0].heat.sort().values, tables[1].heat.sort().values), "heat differs"
    return 0.0


def check_move(shape: Shape, device: torch.device) -> float:
    """A step that appends, seals and recalls, bit for bit."""
    layer = empty_layer(shape, device, pages=60, frames=40)
    make_resident(layer, shape, torch.arange(1, 31, device=device))
    heads = (shape.lane_heads, shape.head_dim)
    rows = torch.tensor([1, 2, 0, 4], dtype=torch.int32, device=device)
    offsets = torch.tensor([shape.page_size - 1, 3, 1, 0], dtype=torch.int32, device=device)
    k, v = (torch.randn((4, *heads), dtype=shape.dtype, device=device) for _ in range(2))
    free = (layer.residency.page_in[:-1] < 0).nonzero().flatten()[:8].int()
    recalls = Recalls(torch.arange(41, 49, dtype=torch.int32, device=device)[: len(free)], free)
    clock = torch.full((), 9, device=device)
    copies = [copy_of(layer), copy_of(layer)]
    new = NewTokens(rows, offsets, k, v)
    transfer.move_pages(copies[0], new, recalls, clock, KIND)
    transfer_reference.move_pages(copies[1], new, recalls, clock, KIND)
    if device.type == "cuda":
        torch.cuda.synchronize()
    for name in ("k_frames", "v_frames"):
        found, expected = (getattr(layer, name)[:-1] for layer in copies)
        assert torch.equal(found, expected), f"{name} differ"
    assert torch.equal(copies[0].host, copies[1].host), "backups differ"
    return close(copies[0].digests, copies[1].digests, 1)


def check_prefill_transfers(shape: Shape, device: torch.device) -> float:
    """Seal a chunk's pages, then gather them back from frames and backups, bit for bit."""
    layer = empty_layer(shape, device, pages=40, frames=20)
    make_resident(layer, shape, torch.arange(1, 11, device=device))
    size = (20 * shape.page_size, shape.kv_heads, shape.head_dim)
    k, v = (torch.randn(size, dtype=shape.dtype, device=device) for _ in range(2))
    lanes = torch.arange(shape.groups, device=device, dtype=torch.int32) * 41
    pages = torch.arange(1, 21, device=device, dtype=torch.int32)
    lane_pages = (pages.unsqueeze(1) + lanes).flatten()
    first = torch.arange(0, 20 * shape.page_size, shape.page_size, device=device)
    transfer.seal_pages(layer, lane_pages, first, k, v, KIND)
    staged = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    transfer.gather_pages(layer, lane_pages, shape.groups, staged)
    assert torch.equal(staged[0], k) and torch.equal(staged[1], v), "gathered pages differ"
    return 0.0


def check_attend(shape: Shape, device: torch.device) -> float:
    """Decode over scattered frames, ragged lengths, an inert row."""
    frames = torch.randn((300, shape.page_size, shape.lane_heads, shape.head_dim), device=device)
    k_frames, v_frames = frames.to(shape.dtype), frames.flip(0).to(shape.dtype)
    lengths = [0, *ragged(3, 64 * shape.page_size)]
    lists = torch.randperm(300, device=device)[: 4 * 64].view(4, 64).int()
    size = (4, shape.lane_query_heads, shape.head_dim)
    query = torch.randn(size, dtype=shape.dtype, device=device)
    out, _ = attend.attend_frames(
        query, k_frames, v_frames, lists, torch.tensor(lengths, device=device), shape.scaling, None
    )
    expected = torch.zeros(size, dtype=torch.float64, device=device)
    for row, length in enumerate(lengths):
        if length:
            k, v = (part[lists[row].long()].flatten(0, 1)[:length] for part in (k_frames, v_frames))
            expected[row] = dense(query[row], k, v, shape.scaling)
    return close(out, expected, 4)


def check_prefill(shape: Shape, device: torch.device, source=attend) -> float:
    """A chunk over itself and its prefix, merged, against dense attention of the whole."""
    prefix, chunk = ragged(2, 200)
    size = (prefix + chunk, shape.kv_heads, shape.head_dim)
    k, v = (torch.randn(size, dtype=shape.dtype, device=device) for _ in range(2))
    query = torch.randn(
        (chunk, shape.query_heads, shape.head_dim), dtype=shape.dtype, device=device
    )
    own = source.attend_chunk(query, k[prefix:], v[prefix:], shape.scaling)
    before = source.attend_part(query, k[:prefix], v[:prefix], shape.scaling)
    merged, _ = attend.merge_parts(own, before)
    expected = torch.stack(
        [
            dense(q, k[: prefix + row + 1], v[: prefix + row + 1], shape.scaling)
            for row, q in enumerate(query)
        ]
    )
    return close(merged.to(shape.dtype), expected, 4)


def check_flashinfer_decode(shape: Shape, device: torch.device) -> float:
    """One plan, indices rewritten between two runs: each must be what its own indices say."""
    decode = flashinfer.FlashInferDecode(
        flashinfer.AttentionShape(
            shape.lane_query_heads, shape.lane_heads, shape.head_dim, shape.page_size, shape.dtype,
            shape.scaling,
        ),
        3, 3 * 20, torch.empty(flashinfer.WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        fixed=False,
    )  # fmt: skip
    lengths = ragged(3, 20 * shape.page_size)
    decode.plan(lengths)
    frames = torch.randn((99, shape.page_size, shape.lane_heads, shape.head_dim), device=device)
    k_frames, v_frames = frames.to(shape.dtype), frames.flip(0).to(shape.dtype)
    size = (3, shape.lane_query_heads, shape.head_dim)
    query = torch.randn(size, dtype=shape.dtype, device=device)
    worst = 0.0
    for _ in range(2):
        lists: FrameLists = decode.lists
        lists.indices.copy_(torch.randperm(99, device=device)[: 3 * 20].int())
        out = decode.run(query, k_frames, v_frames, shape.scaling)
        for row, length in enumerate(lengths):
            own = lists.indices[int(lists.starts[row]) : int(lists.starts[row + 1])].long()
            k, v = (part[own].flatten(0, 1)[:length] for part in (k_frames, v_frames))
            worst = max(worst, close(out[row], dense(query[row], k, v, shape.scaling), 4))
    return worst


CHECKS: dict[str, Callable[[Shape, torch.device], float]] = {
    "digest": check_digest,
    "score": check_score,
    "select": check_select,
    "resolve": check_resolve,
    "move": check_move,
    "prefill transfers": check_prefill_transfers,
    "attend": check_attend,
    "prefill attention": check_prefill,
}
