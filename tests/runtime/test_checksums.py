"""A page that comes back from the host other than it went is noticed and never used."""

from __future__ import annotations

import pytest
import torch

from arkvale_kernels.layout import PagedLayer
from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.runtime import decode
from arkvale_sglang.runtime.checksums import TransferError, checksum
from support.engine import FakeEngine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYER = 2
"""The layer that is poisoned, counted as a user counts: one dense layer comes before."""


def engine(size=16, groups=1, dtype=torch.float32, checks=True) -> FakeEngine:
    """A row of 20 pages under frames for 9: most of them are evicted."""
    config = ArkValeConfig(
        page_size=size, budget=size * 8, top_k=size * 4, sink_pages=1, dense_layers=1,
        head_groups=groups, check_transfers=checks,
    )  # fmt: skip
    fake = FakeEngine(config, pages=40, frames=9, layers=3, dtype=dtype)
    fake.extend({fake.add_row(): 20 * size + 3})
    return fake


def poison(fake: FakeEngine, flip, group=0) -> int:
    """Change the backup of every evicted page of one layer; returns how many."""
    layer = fake.cache.store.managed[LAYER - 1]
    stride = fake.cache.store.page_stride
    evicted = [page for page in fake.rows[0].pages[:20] if absent(layer, group * stride + page)]
    for page in evicted:
        flip(layer.host[group * stride + page].view(torch.uint8))
    return len(evicted)


def absent(layer: PagedLayer, lane_page: int) -> bool:
    return int(layer.residency.frame_of[lane_page]) < 0


def one_bit(page: torch.Tensor) -> None:
    page.view(-1)[37] ^= 0x40


def swapped_halves(page: torch.Tensor) -> None:
    flat = page.view(-1)
    flat.copy_(torch.cat([flat[len(flat) // 2 :], flat[: len(flat) // 2]]))


def swapped_tokens(page: torch.Tensor) -> None:
    page[0, [0, 1]] = page[0, [1, 0]]


FLIPS = (one_bit, swapped_halves, swapped_tokens)


def read_in_prefill(fake: FakeEngine) -> float:
    return fake.extend({0: 5})


def read_in_decode(fake: FakeEngine) -> float:
    return max(fake.decode([0]) for _ in range(24))


def read_in_a_full_row(fake: FakeEngine) -> float:
    return fake.decode([0], [fake.config.for_request({"policy": "full"})])


@pytest.mark.parametrize("read", [read_in_prefill, read_in_decode, read_in_a_full_row])
@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("group", [0, 1])
def test_a_poisoned_page_is_named_before_anything_is_made_of_it(read, flip, group):
    fake = engine(groups=2)
    assert poison(fake, flip, group) > 5
    with pytest.raises(
        TransferError, match=f"page .* of layer {LAYER} .head group {group}.* memory"
    ):
        read(fake)


@pytest.mark.parametrize("read", [read_in_prefill, read_in_decode, read_in_a_full_row])
def test_without_the_check_the_answer_is_silently_wrong(read):
    fake = engine(checks=False)
    assert poison(fake, swapped_halves) > 5
    assert read(fake) > 0.1


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sound_pages_pass_wherever_they_were_sealed(size, groups, dtype):
    """In a chunk, by a chunk that tops up a page, by decode; read back by decode and prefill."""
    fake = engine(size, groups, dtype)
    other = fake.add_row()
    fake.extend({other: size + 3})
    fake.extend({other: size - 3, 0: 2})
    for _ in range(size + 2):
        fake.decode([0, other])
    fake.extend({0: 3})
    report = fake.cache.report()
    assert report["pages_recalled"] > 0 and report["tokens_streamed"] > 0
    poison(fake, one_bit)
    with pytest.raises(TransferError):
        fake.extend({0: 1})


def test_a_transfer_that_leaves_a_page_out_is_noticed(monkeypatch):
    fake, move = engine(), decode.move_pages

    def move_but_one(layer, new, recalls, clock, **options):
        if recalls is not None and recalls.counts is not None:
            recalls = recalls._replace(counts=(recalls.counts - 1).clamp(min=0))
        elif recalls is not None:
            recalls = recalls._replace(
                lane_pages=recalls.lane_pages[1:], lane_frames=recalls.lane_frames[1:]
            )
        move(layer, new, recalls, clock, **options)

    monkeypatch.setattr(decode, "move_pages", move_but_one)
    with pytest.raises(TransferError):
        read_in_decode(fake)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_counts(dtype):
    k, v = torch.randn(2, 1, 16, 1, 2).to(dtype)
    sound = int(checksum(k, v))
    seen = {sound}
    for part in (k, v):
        raw = part.view(torch.uint8).view(-1)
        for byte in range(len(raw)):
            for bit in range(8):
                raw[byte] ^= 1 << bit
                seen.add(int(checksum(k, v)))
                raw[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * 2 * k.nbytes
    assert int(checksum(k, v)) == sound and int(checksum(v, k)) != sound


def test_no_page_has_no_checksum():
    """A step in which nothing is missing recalls nothing."""
    assert checksum(*torch.zeros(2, 0, 16, 1, 2)).shape == (0,)


def test_a_server_without_the_flag_keeps_no_checksums():
    assert engine(checks=False).cache.checksums is None
