"""The transfer op: every byte goes where it should, and no other byte changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arkvale_kernels.transfer import back_up_pages, gather_pages, recall_pages, write_tokens
from support.numeric import DTYPES, normal, poison, same_bits

SHAPES = {
    "page16-1head-dim64": (16, 1, 64),
    "page32-2heads-dim96": (32, 2, 96),
    "page64-8heads-dim128": (64, 8, 128),
    "page16-3heads-dim256": (16, 3, 256),
}
by_shape = pytest.mark.parametrize("page", SHAPES.values(), ids=SHAPES.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def frames_of(count: int, page: tuple[int, ...], dtype=torch.float32):
    """K and V frames full of NaN, the scratch row last."""
    return poison(count + 1, *page, dtype=dtype), poison(count + 1, *page, dtype=dtype)


@by_shape
@by_dtype
def test_tokens_land_in_their_place_and_nowhere_else(page, dtype):
    """First and last token of a page, two tokens of one frame; all other frames keep their NaN."""
    size, heads, dim = page
    k_frames, v_frames = frames_of(5, page, dtype)
    frames, offsets = [0, 4, 4, 2], [0, size - 1, 3, size // 2]
    k, v = normal(4, heads, dim, dtype=dtype), normal(4, heads, dim, dtype=dtype, seed=1)
    write_tokens(
        k_frames, v_frames, torch.tensor(frames, dtype=torch.int32), torch.tensor(offsets), k, v
    )
    for held, new in ((k_frames, k), (v_frames, v)):
        expected = poison(6, *page, dtype=dtype)
        for row, (frame, offset) in enumerate(zip(frames, offsets, strict=True)):
            expected[frame, offset] = new[row]
        assert same_bits(held, expected)


@by_dtype
def test_tokens_of_pages_without_a_frame_go_to_the_scratch_row(dtype):
    """-1 must not wrap around to a page's frame, even where several tokens have it."""
    k_frames, v_frames = frames_of(3, (16, 2, 64), dtype)
    new = normal(4, 2, 64, dtype=dtype)
    frames = torch.tensor([-1, 1, -1, -1], dtype=torch.int32)
    write_tokens(k_frames, v_frames, frames, torch.tensor([0, 5, 0, 15]), new, new)
    for held in (k_frames, v_frames):
        expected = poison(3, 16, 2, 64, dtype=dtype)
        expected[1, 5] = new[1]
        assert same_bits(held[:3], expected)
        assert not held[3, [0, 15]].isnan().any()


@by_shape
@by_dtype
def test_a_page_survives_the_way_to_the_host_and_back_bit_for_bit(page, dtype):
    """Backup, then recall into other frames; pages and frames not named keep their NaN."""
    count, places = 3, [6, 1, 4]
    host = poison(8, 2, *page, dtype=dtype)
    k, v = normal(count, *page, dtype=dtype), normal(count, *page, dtype=dtype, seed=1)
    back_up_pages(host, torch.tensor(places), k, v)
    expected = poison(8, 2, *page, dtype=dtype)
    expected[places] = torch.stack((k, v), 1)
    assert same_bits(host, expected)

    k_frames, v_frames = frames_of(5, page, dtype)
    recall_pages(k_frames, v_frames, host, torch.tensor([4, 6]), torch.tensor([0, 3]))
    for held, source in ((k_frames, k), (v_frames, v)):
        expected = poison(6, *page, dtype=dtype)
        expected[0], expected[3] = source[2], source[0]
        assert same_bits(held, expected)


@by_dtype
@pytest.mark.parametrize("resident", [0, 2, 5], ids="resident{}".format)
def test_pages_are_read_from_the_frame_if_resident_else_from_the_host(resident, dtype):
    """The wrong place holds NaN: the host copy of resident pages, the scratch row, other frames."""
    page, pages = (16, 2, 64), 5
    truth_k, truth_v = (normal(pages, *page, dtype=dtype, seed=seed) for seed in (0, 1))
    k_frames, v_frames = frames_of(7, page, dtype)
    host = poison(9, 2, *page, dtype=dtype)
    frame_of = torch.full((9,), -1, dtype=torch.int32)
    ids = np.random.default_rng(0).permutation(np.arange(1, 9))[:pages]
    for place, lane_page in enumerate(ids):
        if place < resident:
            frame_of[lane_page] = frame = 6 - place
            k_frames[frame], v_frames[frame] = truth_k[place], truth_v[place]
        else:
            host[lane_page, 0], host[lane_page, 1] = truth_k[place], truth_v[place]
    before = [part.clone() for part in (k_frames, v_frames, host)]
    order = [3, 0, 4, 0, 2, 1]
    asked = torch.from_numpy(ids)[order].int()
    k, v = gather_pages(k_frames, v_frames, host, frame_of, asked)
    assert same_bits(k, truth_k[order]) and same_bits(v, truth_v[order])
    for part, old in zip((k_frames, v_frames, host), before, strict=True):
        assert same_bits(part, old), "reading changes nothing"


def test_moving_nothing_changes_nothing():
    """Empty lists are valid everywhere, as when all pages are resident."""
    page = (16, 2, 64)
    k_frames, v_frames = frames_of(2, page)
    host = poison(4, 2, *page)
    none, pages = torch.zeros(0, dtype=torch.int64), torch.zeros(0, *page)
    write_tokens(k_frames, v_frames, none, none, torch.zeros(0, 2, 64), torch.zeros(0, 2, 64))
    back_up_pages(host, none, pages, pages)
    recall_pages(k_frames, v_frames, host, none, none)
    frame_of = torch.full((4,), -1, dtype=torch.int32)
    k, v = gather_pages(k_frames, v_frames, host, frame_of, none)
    assert k.shape == v.shape == (0, *page)
    assert k_frames.isnan().all() and v_frames.isnan().all() and host.isnan().all()


def test_wrong_arguments_are_refused_by_name_before_anything_is_written():
    """A shape that does not fit, or a dtype that would convert, stops the call."""
    page = (16, 2, 64)
    k_frames, v_frames = frames_of(2, page)
    host = poison(4, 2, *page)
    one = torch.tensor([1])
    token, wide, full = torch.zeros(1, 2, 64), torch.zeros(1, 2, 65), torch.zeros(1, *page)
    for call, message in (
        (lambda: write_tokens(k_frames, v_frames, one, one, wide, wide), "^k must have shape"),
        (lambda: write_tokens(k_frames, v_frames, one, one, token, wide), "^v must have shape"),
        (
            lambda: write_tokens(k_frames, v_frames, one, one, token.half(), token.half()),
            "^k is torch.float16 but k_frames is torch.float32",
        ),
        (lambda: back_up_pages(host, one, full[:, :8], full[:, :8]), "^k must have shape"),
        (lambda: back_up_pages(host, one, full, full[:, :8]), "^v must have shape"),
        (
            lambda: recall_pages(k_frames, v_frames, host, one, torch.tensor([0, 1])),
            "^lane_frames must have shape",
        ),
        (
            lambda: gather_pages(k_frames, v_frames, host, torch.ones(4).int(), one.view(1, 1)),
            "^lane_pages must have shape",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert k_frames.isnan().all() and v_frames.isnan().all() and host.isnan().all()
