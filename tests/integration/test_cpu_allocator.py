"""The torch allocator against SGLang's rules, and the logical allocator's duties."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from arkvale_sglang.integration.cpu_allocator import CpuPagedAllocator

SIZE = 16


def make(pages: int) -> CpuPagedAllocator:
    return CpuPagedAllocator(
        pages * SIZE,
        page_size=SIZE,
        dtype=torch.float32,
        device="cpu",
        kvcache=None,
        need_sort=False,
    )


def extend(allocator, slots: list[list[int]], lengths: list[int]):
    """Grow each row to its length; ``None`` if the pool is short."""
    prefix = torch.tensor([len(row) for row in slots])
    total = torch.tensor(lengths)
    last = torch.tensor([row[-1] if row else -1 for row in slots])
    return allocator.alloc_extend(prefix, prefix, total, total, last, int((total - prefix).sum()))


def assert_paged(rows: list[list[int]]) -> None:
    """Slots of a row run on inside pages, and no page belongs to two rows."""
    owners: dict[int, int] = {}
    for index, row in enumerate(rows):
        for place, slot in enumerate(row):
            assert slot % SIZE == place % SIZE
            if place % SIZE:
                assert slot == row[place - 1] + 1
            assert owners.setdefault(slot // SIZE, index) == index and slot >= SIZE


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=5),
    st.lists(st.integers(0, 40), min_size=5, max_size=5),
    st.integers(0, 40),
)
def test_extend_and_decode_hand_out_whole_pages(lengths, growth, steps):
    allocator = make(64)
    rows: list[list[int]] = [[] for _ in lengths]
    for target in (lengths, [a + b for a, b in zip(lengths, growth, strict=False)]):
        out = extend(allocator, rows, target).tolist()
        for row, length in zip(rows, target, strict=True):
            count = length - len(row)
            row += out[:count]
            out = out[count:]
        assert not out
        assert_paged(rows)
    for _ in range(steps):
        lengths_now = torch.tensor([len(row) + 1 for row in rows])
        last = torch.tensor([row[-1] for row in rows])
        for row, slot in zip(
            rows, allocator.alloc_decode(lengths_now, lengths_now, last), strict=True
        ):
            row.append(int(slot))
    assert_paged(rows)
    pages = sum(-(-len(row) // SIZE) for row in rows)
    assert allocator.available_size() == (64 - pages) * SIZE


def test_a_short_pool_answers_none_and_loses_nothing():
    allocator = make(3)
    assert extend(allocator, [[]], [49]) is None
    assert allocator.available_size() == 48
    rows = [extend(allocator, [[]], [48]).tolist()]
    length = torch.tensor([49])
    assert allocator.alloc_decode(length, length, torch.tensor([rows[0][-1]])) is None
    allocator.free(torch.tensor(rows[0]))
    assert allocator.available_size() == 48
