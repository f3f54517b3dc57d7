"""The transfer op: every byte goes where it should, and no other byte changes."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from arkvale_kernels.digest import DIGEST_KINDS
from arkvale_kernels.layout import PINNED, SCORE_BITS, NewTokens, PagedLayer, Recalls, Residency
from arkvale_kernels.transfer import kernel, reference
from support import oracle
from support.numeric import DTYPES, normal, poison
from support.tables import Held, build

FP8 = torch.float8_e4m3fn
GARBAGE = 2**30
CLOCK = 9
PAGES, FRAMES, RESIDENT = 9, 6, 4
"""Of each lane: logical pages 1 to 9, of which the first 4 have frames."""


@dataclasses.dataclass(frozen=True)
class Shape:
    groups: int
    page: int
    heads: int
    dim: int
    dtype: torch.dtype
    digests: torch.dtype

    def __str__(self) -> str:
        return (
            f"{self.groups}groups-page{self.page}-{self.heads}heads-dim{self.dim}-"
            f"{self.dtype}-{self.digests}".replace("torch.", "")
        )

    def lane_pages(self, *pages: int) -> torch.Tensor:
        """The groups of a page side by side; 0 stays 0."""
        lanes = torch.arange(self.groups) * (PAGES + 1)
        listed = torch.tensor(pages).view(-1, 1)
        return torch.where(listed > 0, listed + lanes, 0).flatten()

    def values(self, *leading: int, seed: int) -> torch.Tensor:
        return normal(*leading, self.heads, self.dim, dtype=self.dtype, seed=seed)


SHAPES = (
    Shape(1, 16, 3, 96, torch.bfloat16, torch.bfloat16),
    Shape(2, 32, 1, 64, torch.float16, FP8),
    Shape(3, 16, 2, 128, torch.float32, torch.float32),
    Shape(1, 64, 1, 256, torch.bfloat16, FP8),
    Shape(1, 32, 8, 128, torch.bfloat16, torch.bfloat16),
)
IMPLEMENTATIONS = {"reference": reference, "kernel": kernel}
by_implementation = pytest.mark.parametrize(
    "op", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys()
)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def processors(monkeypatch):
    """A device that is no larger than it takes to have programs without work."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 20)


class World:
    """A guarded layer and what must become of it, told page by page.

    What was never written is NaN: frames without a page, backups and digests of open pages.
    """

    def __init__(self, shape: Shape, guards, digest: str = "cuboid-max"):
        self.shape, self.digest = shape, digest
        pages, frames = shape.groups * (PAGES + 1), shape.groups * FRAMES
        draw = np.random.default_rng(0)
        lanes = [
            Held(
                {int(f): (p + 1, PINNED) for p, f in enumerate(draw.permutation(FRAMES)[:RESIDENT])}
            )
            for _ in range(shape.groups)
        ]
        tables = build(lanes, pages=PAGES, frames=FRAMES)
        host = shape.values(pages, 2, shape.page, seed=5)
        host[tables.frame_of >= 0] = torch.nan
        k, v = (shape.values(frames + 1, shape.page, seed=seed) for seed in (6, 7))
        for held in (k, v):
            held[tables.page_in < 0] = torch.nan
        bits = torch.full((pages, 2, shape.heads, shape.dim * shape.digests.itemsize), 0xFF)
        digests = guards.hold(bits.to(torch.uint8)).view(shape.digests)
        self.layer = PagedLayer(
            guards.hold(k), guards.hold(v), guards.hold(host), digests,
            Residency(
                guards.hold(tables.frame_of, frozen=True),
                guards.hold(tables.page_in, frozen=True),
                guards.hold(tables.heat),
            ),
        )  # fmt: skip
        self.k, self.v, self.host = k, v, host
        self.heat, self.frame_of = tables.heat.clone(), tables.frame_of.tolist()
        self.sealed: dict[int, torch.Tensor] = {}
        """Keys that the digests of sealed pages stand for."""
        self.free = (tables.page_in[:-1] < 0).nonzero().flatten().tolist()
        self.clock = torch.tensor(CLOCK)

    def seal(self, page: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.host[page, 0], self.host[page, 1], self.sealed[page] = k, v, k

    def assert_as_told(self) -> None:
        """Bit for bit, but for the digests' roundings and the scratch row."""
        layer = self.layer
        for found, expected in (
            (layer.k_frames[:-1], self.k[:-1]), (layer.v_frames[:-1], self.v[:-1]),
            (layer.host, self.host),
        ):  # fmt: skip
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(layer.residency.heat, self.heat)
        for page in range(layer.digests.shape[0]):
            found = layer.digests[page]
            if page not in self.sealed:
                assert (found.view(torch.uint8) == 0xFF).all()
                continue
            keys = self.sealed[page].double()
            if self.digest == "cuboid-max":
                expected = torch.stack((keys.amax(0), keys.amin(0)))
            else:
                expected = torch.from_numpy(oracle.digests(keys[None].numpy(), self.digest)[0])
            error = (found.double() - expected).abs()
            unit = torch.finfo(self.shape.digests).eps / 2
            smallest = torch.finfo(self.shape.digests).tiny * unit
            if self.digest == "cuboid-max" and self.shape.digests != FP8:
                assert error.max() == 0
            assert (error <= (unit + 1e-5) * (expected.abs() + 1e-1) + smallest).all()


def appended(world: World, guards, dtype=torch.int32) -> NewTokens:
    """Last tokens of pages 1 and 3, which seal them, a first token of page 2, an inert row."""
    shape, size = world.shape, world.shape.page
    pages = shape.lane_pages(1, 0, 2, 3)
    offsets = torch.tensor([size - 1, size - 1, 0, size - 1]).repeat_interleave(shape.groups)
    k, v = (shape.values(len(pages), seed=seed) for seed in (1, 2))
    for row, (page, offset) in enumerate(zip(pages.tolist(), offsets.tolist(), strict=True)):
        if page:
            frame = world.frame_of[page]
            world.k[frame, offset], world.v[frame, offset] = k[row], v[row]
            if offset == size - 1:
                world.seal(page, world.k[frame].clone(), world.v[frame].clone())
                world.heat[frame] = CLOCK << SCORE_BITS
    ids = (pages.to(dtype), offsets.to(dtype))
    return NewTokens(*(guards.hold(part, frozen=True) for part in (*ids, k, v)))


def recalled(world: World, guards, counted: bool) -> Recalls:
    """Absent pages 5 and up into the free frames; with counts, a lane more than the last one
    recalls one page less, and garbage stands beyond the counts."""
    shape, share, room = world.shape, 5, FRAMES - RESIDENT
    counts = [max(0, room - group) for group in range(shape.groups)]
    pages = torch.full((shape.groups, share), GARBAGE, dtype=torch.int32)
    frames = pages.clone()
    for group, count in enumerate(counts):
        for place in range(count):
            page = 5 + place + group * (PAGES + 1)
            frame = world.free[group * room + place]
            pages[group, place], frames[group, place] = page, frame
            world.k[frame], world.v[frame] = world.host[page]
    pages, frames = pages.flatten(), frames.flatten()
    if not counted:
        pages, frames = pages[pages != GARBAGE], frames[frames != GARBAGE]
    total = torch.tensor(counts, dtype=torch.int32) if counted else None
    return Recalls(pages, frames, total)


# -- move_pages ------------------------------------------------------------------------------


@by_implementation
@by_shape
@pytest.mark.parametrize("moves", ["new", "recalls", "both", "counted"])
def test_new_tokens_and_recalled_pages_land_in_their_frames(op, shape, moves, guards):
    """Pages that become full are digested, backed up and free to leave; rows on page 0 are
    inert; more programs than there is to do."""
    world = World(shape, guards)
    recalls = recalled(world, guards, moves == "counted") if moves != "new" else None
    new = appended(world, guards) if moves != "recalls" else None
    op.move_pages(world.layer, new, recalls, world.clock, world.digest)
    world.assert_as_told()


@by_shape
def test_a_program_recalls_one_burst_after_the_other(shape, guards, few_programs):
    world = World(shape, guards)
    recalls, new = recalled(world, guards, True), appended(world, guards, torch.int64)
    kernel.move_pages(world.layer, new, recalls, world.clock, world.digest)
    world.assert_as_told()


@by_implementation
@pytest.mark.parametrize("digest", DIGEST_KINDS)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_sealed_pages_get_the_digest_asked_for(op, digest, shape, guards):
    world = World(shape, guards, digest)
    op.move_pages(world.layer, appended(world, guards), None, world.clock, digest)
    world.assert_as_told()


@by_implementation
def test_moving_nothing_changes_nothing(op, guards):
    """Empty lists are valid everywhere, as when all pages are resident."""
    world = World(SHAPES[0], guards)
    none, token = torch.zeros(0, dtype=torch.int32), world.shape.values(0, seed=0)
    op.move_pages(world.layer, None, None, world.clock, world.digest)
    op.move_pages(world.layer, None, Recalls(none, none), world.clock, world.digest)
    counts = torch.zeros(1, dtype=torch.int32)
    op.move_pages(world.layer, None, Recalls(none, none, counts), world.clock, world.digest)
    op.seal_pages(world.layer, none, none, token, token, world.digest)
    op.gather_pages(world.layer, none, 1, (token, token))
    op.write_tokens(world.layer.k_frames, world.layer.v_frames, none.long(), token, token)
    world.assert_as_told()


# -- seal_pages, seal_frames -----------------------------------------------------------------


@by_implementation
@pytest.mark.parametrize(
    "shape, digest",
    [*((shape, "cuboid-max") for shape in SHAPES), (SHAPES[1], "mean-std")],
    ids=str,
)
def test_pages_that_a_chunk_holds_whole_are_sealed(op, shape, digest, guards):
    """With and without a frame; between them lie tokens of no whole page, which are NaN."""
    world, size = World(shape, guards, digest), shape.page
    first, pages = [2, 2 + size, 5 + 2 * size], [2, 7, 9]
    chunk = []
    for seed in (1, 2):
        tokens = poison(3 * size + 8, shape.groups * shape.heads, shape.dim, dtype=shape.dtype)
        for start in first:
            whole = tokens[start : start + size]
            whole.copy_(normal(*whole.shape, dtype=shape.dtype, seed=10 * seed + start))
        chunk.append(guards.hold(tokens, frozen=True))
    for start, page in zip(first, pages, strict=True):
        for group in range(shape.groups):
            lane_page = page + group * (PAGES + 1)
            own = slice(group * shape.heads, (group + 1) * shape.heads)
            k, v = (tokens[start : start + size, own] for tokens in chunk)
            world.seal(lane_page, k, v)
            frame = world.frame_of[lane_page]
            if frame >= 0:
                world.k[frame], world.v[frame] = k, v
    ids = guards.hold(shape.lane_pages(*pages).int(), frozen=True)
    starts = guards.hold(torch.tensor(first), frozen=True)
    op.seal_pages(world.layer, ids, starts, *chunk, digest)
    world.assert_as_told()


@by_implementation
@by_shape
def test_pages_that_became_full_in_their_frames_are_sealed(op, shape, guards):
    """They may leave from now on."""
    world = World(shape, guards)
    pages = guards.hold(shape.lane_pages(4, 1), frozen=True)
    for page in pages.tolist():
        frame = world.frame_of[page]
        world.seal(page, world.k[frame], world.v[frame])
        world.heat[frame] = CLOCK << SCORE_BITS
    op.seal_frames(world.layer, pages, world.clock, world.digest)
    world.assert_as_told()


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_program_seals_and_gathers_one_unit_after_the_other(shape, guards, few_programs):
    test_pages_that_became_full_in_their_frames_are_sealed(kernel, shape, guards)
    test_pages_that_a_chunk_holds_whole_are_sealed(kernel, shape, "cuboid-max", guards)
    test_pages_are_read_from_the_frame_if_resident_else_from_the_host(kernel, shape, guards)


# -- gather_pages, write_tokens --------------------------------------------------------------


@by_implementation
@by_shape
def test_pages_are_read_from_the_frame_if_resident_else_from_the_host(op, shape, guards):
    """The wrong place holds NaN: the backup of resident pages, the scratch row, other frames."""
    world, order = World(shape, guards), (3, 8, 1, 3, 9, 5)
    heads = shape.groups * shape.heads
    out = [guards.empty(6 * shape.page, heads, shape.dim, dtype=shape.dtype) for _ in range(2)]
    pages = guards.hold(shape.lane_pages(*order).int(), frozen=True)
    op.gather_pages(world.layer, pages, shape.groups, tuple(out))
    for half, (held, found) in enumerate(zip((world.k, world.v), out, strict=True)):
        expected = torch.empty_like(found).unflatten(0, (6, shape.page))
        for place, page in enumerate(order):
            for group in range(shape.groups):
                lane_page = page + group * (PAGES + 1)
                frame = world.frame_of[lane_page]
                own = slice(group * shape.heads, (group + 1) * shape.heads)
                source = held[frame] if frame >= 0 else world.host[lane_page, half]
                expected[place, :, own] = source
        assert torch.equal(found, expected.flatten(0, 1)) and not found.isnan().any()
    world.assert_as_told()


@by_implementation
@by_shape
def test_tokens_land_in_their_place_and_nowhere_else(op, shape, guards):
    """First and last token of a page, two tokens of one frame; all other frames keep what they
    had."""
    world, size = World(shape, guards), shape.page
    frames, offsets = [0, 4, 4, 2], [0, size - 1, 3, size // 2]
    k, v = (guards.hold(shape.values(4, seed=seed), frozen=True) for seed in (0, 1))
    for row, place in enumerate(zip(frames, offsets, strict=True)):
        world.k[place], world.v[place] = k[row], v[row]
    places = torch.tensor(frames) * size + torch.tensor(offsets)
    op.write_tokens(world.layer.k_frames, world.layer.v_frames, places, k, v)
    world.assert_as_told()


@by_implementation
@by_dtype
def test_tokens_of_many_heads_land_whole(op, dtype, guards):
    """17 heads of 200 channels take two tiles, the last one ragged; two tokens, one place."""
    new = normal(4, 17, 200, dtype=dtype)
    held = [guards.empty(4, 16, 17, 200, dtype=dtype) for _ in range(2)]
    op.write_tokens(*held, torch.tensor([48, 21, 48, 63]), new, new)
    for part in held:
        written = ~part.isnan().flatten(2).all(2)
        assert written.nonzero().tolist() == [[1, 5], [3, 0], [3, 15]]
        assert torch.equal(part[1, 5], new[1]) and torch.equal(part[3, 15], new[3])


@pytest.mark.parametrize(
    "name", ["write_tokens", "move_pages", "seal_pages", "seal_frames", "gather_pages"]
)
def test_kernel_and_reference_are_called_alike(name):
    """The API hands the same positional arguments to whichever serves the device."""
    assert inspect.signature(getattr(kernel, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("offset, width", [(0, 8), (1, 8), (4, 8), (0, 6), (4, 6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_are_put_whole_whatever_their_place_and_width(offset, width, dtype):
    """The reference copies 8-byte words where pages are made of such, else elements."""
    held = normal(offset + 5 * width, dtype=dtype)
    target, pages = held[offset:].view(5, width), normal(2, width, dtype=dtype, seed=1)
    expected = target.clone()
    expected[[3, 1]] = pages
    reference._put(target, torch.tensor([3, 1]), pages)
    assert torch.equal(target, expected)
