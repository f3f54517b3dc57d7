"""Bad input to the transfer op: an error that names the argument, before anything is written."""

from __future__ import annotations

import pytest
import torch

from arkvale_kernels import checks
from arkvale_kernels.layout import NewTokens, PagedLayer, Recalls, Residency
from arkvale_kernels.transfer import (
    gather_pages,
    move_pages,
    seal_frames,
    seal_pages,
    write_tokens,
)
from support.numeric import normal, poison

PAGE, HEADS, DIM = 16, 2, 64
META = torch.device("meta")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def good_layer() -> PagedLayer:
    """Two lanes of five pages and two frames; page 1 of both lanes is resident."""
    frame_of = int32(-1, 0, -1, -1, -1, -1, 2, -1, -1, -1)
    page_in, heat = int32(1, -1, 6, -1, -1), torch.zeros(5, dtype=torch.int64)
    frames = (poison(5, PAGE, HEADS, DIM) for _ in range(2))
    return PagedLayer(
        *frames, poison(10, 2, PAGE, HEADS, DIM), poison(10, 2, HEADS, DIM),
        Residency(frame_of, page_in, heat),
    )  # fmt: skip


LAYER, CLOCK = good_layer(), torch.tensor(1)
TOKENS = normal(2, HEADS, DIM)
NEW = NewTokens(int32(1, 6), int32(3, 3), TOKENS, TOKENS)
RECALLS = Recalls(int32(2, 0, 7, 0), int32(1, 0, 3, 0), int32(1, 1))
CHUNK = normal(2 * PAGE, 2 * HEADS, DIM)


def layer(**wrong) -> PagedLayer:
    tables = {name: wrong.pop(name) for name in Residency._fields if name in wrong}
    good = good_layer()
    return good._replace(residency=good.residency._replace(**tables), **wrong)


WRITE = {
    "k_frames": LAYER.k_frames, "v_frames": LAYER.v_frames, "places": torch.tensor([3, 19]),
    "k": TOKENS, "v": TOKENS,
}  # fmt: skip
MOVE = {"layer": LAYER, "new": NEW, "recalls": RECALLS, "clock": CLOCK, "digest": "cuboid-max"}
SEAL = {
    "layer": LAYER, "lane_pages": int32(1, 6), "first_tokens": int32(3), "k": CHUNK, "v": CHUNK,
    "digest": "cuboid-max",
}  # fmt: skip
FULL = {"layer": LAYER, "lane_pages": int32(1, 6), "clock": CLOCK, "digest": "cuboid-max"}
GATHER = {"layer": LAYER, "lane_pages": int32(1, 6, 2, 7), "groups": 2, "out": None}
LAYER_ERRORS = [
    (layer(k_frames=LAYER.k_frames[0]), r"^k_frames must have shape \(any, any, any, any\)"),
    (layer(k_frames=LAYER.k_frames.int()), "^k_frames must be torch.float32 or .*bfloat16"),
    (layer(v_frames=LAYER.v_frames[:4]), r"^v_frames must have shape \(5, 16, 2, 64\)"),
    (layer(v_frames=LAYER.v_frames.half()), "^v_frames is torch.float16 but k_frames is"),
    (layer(v_frames=LAYER.v_frames.to(META)), "^v_frames must be on cpu, got meta"),
    (layer(host=LAYER.host[:, :1]), r"^host must have shape \(any, 2, 16, 2, 64\)"),
    (layer(host=LAYER.host.half()), "^host is torch.float16 but k_frames is torch.float32"),
    (layer(host=poison(10, 2, HEADS, PAGE, DIM).transpose(2, 3)), "^host must be contiguous"),
    (layer(digests=LAYER.digests[:9]), r"^digests must have shape \(10, 2, 2, 64\)"),
    (layer(digests=LAYER.digests.half()), "^digests must be torch.float32 or .*e4m3fn"),
    (layer(digests=LAYER.digests.to(META)), "^digests must be on cpu, got meta"),
    (layer(frame_of=int32(1, 2)), r"^frame_of must have shape \(10\)"),
    (layer(heat=torch.zeros(4).long()), r"^heat must have shape \(5\)"),
    (layer(heat=CLOCK.expand(5)), "^heat must be contiguous"),
]


@pytest.mark.parametrize("wrong, message", LAYER_ERRORS)
@pytest.mark.parametrize(
    "op, arguments",
    [(move_pages, MOVE), (seal_pages, SEAL), (seal_frames, FULL), (gather_pages, GATHER)],
)
def test_a_layer_that_does_not_fit_together_is_refused_by_name(op, arguments, wrong, message):
    with pytest.raises(ValueError, match=message):
        op(**{**arguments, "layer": wrong})


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("v_frames", LAYER.v_frames[:4], r"^v_frames must have shape \(5, 16, 2, 64\)"),
        ("k_frames", LAYER.k_frames.transpose(1, 2), r"^v_frames must have shape \(5, 2, 16, 64\)"),
        ("places", torch.tensor([[0, 1]]), "^places must have shape"),
        ("places", int32(0, 1), "^places must be torch.int64"),
        ("places", torch.arange(4)[::2], r"^places must be contiguous with shape \(2"),
        ("places", torch.arange(2).to(META), "^places must be on cpu, got meta"),
        ("k", normal(2, HEADS, 65), r"^k must have shape \(2, 2, 64\)"),
        ("k", TOKENS.half(), "^k is torch.float16 but k_frames is torch.float32"),
        ("v", normal(2, 3, DIM), r"^v must have shape \(2, 2, 64\)"),
        ("v", TOKENS.half(), "^v is torch.float16 but k_frames is torch.float32"),
        ("v", normal(2, DIM, HEADS).transpose(1, 2), "^v must be contiguous with shape"),
        ("v", TOKENS.to(META), "^v must be on cpu, got meta"),
    ],
)
def test_bad_tokens_are_refused_by_name(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        write_tokens(**{**WRITE, name: wrong})
    if not name.endswith("_frames"):
        new = NEW._replace(**{name: wrong})
        with pytest.raises(ValueError, match=message.replace("^", "^new.")):
            move_pages(**{**MOVE, "new": new})
    assert LAYER.k_frames.isnan().all() and LAYER.v_frames.isnan().all()


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("new", NEW._replace(lane_pages=int32()), "^new.lane_pages must have at least one row"),
        ("new", NEW._replace(lane_pages=int32(1, 6).view(2, 1)), r"^new.lane_pages must have sha"),
        ("new", NEW._replace(lane_pages=int32(0, 1, 1)), r"^new.offsets must have shape \(3\)"),
        ("new", NEW._replace(lane_pages=torch.ones(2)), "^new.lane_pages must be int32 or int64"),
        ("new", NEW._replace(lane_pages=int32(0, 1).to(META)), "^new.lane_pages must be on cpu"),
        ("new", NEW._replace(offsets=int32(1)), r"^new.offsets must have shape \(2\)"),
        ("new", NEW._replace(offsets=torch.arange(4)[::2]), "^new.offsets must be contiguous"),
        ("new", NEW._replace(places=torch.arange(3)), r"^new.places must have shape \(2\)"),
        ("recalls", RECALLS._replace(lane_pages=int32(2, 0, 7)), "^recalls.lane_frames must have"),
        ("recalls", RECALLS._replace(lane_frames=torch.ones(4)), "^recalls.lane_frames must be in"),
        ("recalls", RECALLS._replace(counts=int32(1, 1, 1)), "^recalls.counts must have a length"),
        ("recalls", RECALLS._replace(counts=torch.ones(2)), "^recalls.counts must be int32"),
        ("recalls", RECALLS._replace(counts=int32(1, 1).to(META)), "^recalls.counts must be on"),
        ("recalls", RECALLS._replace(lane_pages=int32(*[0] * 8)[::2]), "^recalls.lane_pages must"),
        ("clock", torch.tensor([1]), r"^clock must have shape \(\)"),
        ("clock", torch.tensor(1.0), "^clock must be torch.int64"),
        ("clock", CLOCK.to(META), "^clock must be on cpu, got meta"),
        ("digest", "sphere", "'sphere'.*cuboid-mean"),
    ],
)
def test_bad_moves_are_refused_by_name(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        move_pages(**{**MOVE, name: wrong})
    if name in FULL:
        with pytest.raises(ValueError, match=message):
            seal_frames(**{**FULL, name: wrong})


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("k", normal(2 * PAGE, 4, 65), r"^k must have shape \(any, any, 64\)"),
        ("k", normal(2 * PAGE, 3, DIM), r"^v must have shape \(32, 3, 64\)"),
        ("v", normal(PAGE, 4, DIM), r"^v must have shape \(32, 4, 64\)"),
        ("v", CHUNK.half(), "^v is torch.float16 but k_frames is torch.float32"),
        ("v", normal(2 * PAGE, DIM, 4).transpose(1, 2), "^v must be contiguous"),
        ("v", CHUNK.to(META), "^v must be on cpu, got meta"),
        ("lane_pages", int32(1, 6, 2), r"^lane_pages must have shape \(2\)"),
        ("lane_pages", torch.ones(2), "^lane_pages must be int32 or int64"),
        ("first_tokens", int32(0, PAGE), r"^lane_pages must have shape \(4\)"),
        ("first_tokens", torch.ones(1), "^first_tokens must be int32 or int64"),
        ("digest", "sphere", "'sphere'.*cuboid-mean"),
    ],
)
def test_bad_chunks_are_refused_by_name(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        seal_pages(**{**SEAL, name: wrong})


def test_a_chunk_of_heads_that_make_no_whole_lanes_is_refused():
    odd = normal(2 * PAGE, 3, DIM)
    with pytest.raises(ValueError, match=r"^k must hold a multiple of 2 heads"):
        seal_pages(**{**SEAL, "k": odd, "v": odd})


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("lane_pages", int32(1, 6).view(2, 1), r"^lane_pages must have shape \(any\)"),
        ("lane_pages", torch.ones(2), "^lane_pages must be int32 or int64"),
        ("lane_pages", int32(1, 6, 2, 7)[::2], "^lane_pages must be contiguous"),
        ("lane_pages", int32(1, 6).to(META), "^lane_pages must be on cpu, got meta"),
        ("groups", 3, "^groups must divide 4 lane pages, got 3"),
        ("groups", 0, "^groups must divide 4 lane pages, got 0"),
        ("out", (CHUNK, CHUNK[:31]), r"^out\[1\] must have shape \(32, 4, 64\)"),
        ("out", (CHUNK.half(), CHUNK), r"^out\[0\] is torch.float16 but k_frames is"),
        ("out", (CHUNK, CHUNK.to(META)), r"^out\[1\] must be on cpu, got meta"),
        ("out", (normal(2 * PAGE, DIM, 4).transpose(1, 2), CHUNK), r"^out\[0\] must be contiguous"),
    ],
)
def test_bad_reads_are_refused_by_name(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        gather_pages(**{**GATHER, name: wrong})


def test_staging_buffers_may_be_larger_than_what_is_read(guards):
    """The surplus stays as it was."""
    held = good_layer()
    for part in (held.k_frames, held.v_frames, held.host):
        part.copy_(normal(*part.shape))
    out = [guards.empty(50, 4, DIM) for _ in range(2)]
    k, v = gather_pages(held, GATHER["lane_pages"], groups=2, out=tuple(out))
    fresh = gather_pages(held, GATHER["lane_pages"], groups=2)
    assert torch.equal(k, fresh[0]) and torch.equal(v, fresh[1])
    for part, found in zip(out, (k, v), strict=True):
        assert part.data_ptr() == found.data_ptr() and part[32:].isnan().all()


@pytest.mark.parametrize(
    "op, arguments, name, wrong, message",
    [
        (write_tokens, WRITE, "places", torch.tensor([80, 0]), "^places must hold ids .* 79"),
        (write_tokens, WRITE, "places", torch.tensor([-1, 0]), "^places must hold ids .* 79"),
        (move_pages, MOVE, "new", NEW._replace(lane_pages=int32(1, 10)), "^new.lane_pages must"),
        (move_pages, MOVE, "new", NEW._replace(offsets=int32(-1, 1)), "^new.offsets must hold"),
        (
            move_pages, MOVE, "recalls", RECALLS._replace(lane_pages=int32(10, 0, 1, 0)),
            "^recalls.lane_pages must hold ids from 0 to 9",
        ),
        (
            move_pages, MOVE, "recalls", RECALLS._replace(lane_frames=int32(-1, 0, 1, 0)),
            "^recalls.lane_frames must hold ids from 0 to 4",
        ),
        (seal_pages, SEAL, "lane_pages", int32(0, 6), "^lane_pages must hold ids from 1 to 9"),
        (seal_pages, SEAL, "first_tokens", int32(17), "^first_tokens must hold ids from 0 to 16"),
        (seal_frames, FULL, "lane_pages", int32(1, 10), "^lane_pages must hold ids from 1 to 9"),
        (gather_pages, GATHER, "lane_pages", int32(1, 10), "^lane_pages must hold ids from 0 to 9"),
    ],
)  # fmt: skip
def test_ids_out_of_range_are_refused_in_debug_mode(
    op, arguments, name, wrong, message, monkeypatch
):
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(ValueError, match=message):
        op(**{**arguments, name: wrong})
    assert LAYER.k_frames.isnan().all() and LAYER.host.isnan().all()


def test_what_stands_beyond_the_counts_of_recalls_is_nobodys_id(monkeypatch):
    """They are allocated and never filled."""
    monkeypatch.setattr(checks, "DEBUG", True)
    odd = 2**30
    recalls = Recalls(int32(2, odd, 7, odd), int32(1, odd, 3, odd), int32(1, 1))
    move_pages(**{**MOVE, "layer": good_layer(), "recalls": recalls})
