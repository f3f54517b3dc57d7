"""The attend kernels, run by Triton's interpreter, against the reference in float64.

Outputs start as NaN between guard bands; what a kernel must not read is NaN or infinite.
"""

from __future__ import annotations

import inspect
import mmap
import types

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from arkvale_kernels.attend import api, kernel, reference
from support.numeric import gamma, normal, poison, same_bits, unit

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # the logarithm of no weight
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BAND = 256


@pytest.fixture
def guarded(monkeypatch):
    """Outputs full of NaN between bands; whatever was written outside an output is found out."""
    allocated = []

    def empty(shape, *, dtype, device):
        count = torch.Size(shape).numel()
        whole = torch.full((count + 2 * BAND,), 7.0, dtype=dtype, device=device)
        whole[BAND : BAND + count] = torch.nan
        allocated.append(whole)
        return whole[BAND : BAND + count].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(kernel.torch, "empty", empty)
        yield allocated
    assert allocated
    for whole in allocated:
        assert (whole[:BAND] == 7.0).all() and (whole[-BAND:] == 7.0).all()


def assert_close(found, expected, query, keys, values, scaling: float) -> None:
    """Bounds as in ``test_attend.py``: float32 dot products and sums, exponentials good to a few
    units, weights and outputs rounded to the dtype; ``keys`` and ``values`` without NaN."""
    (out, lse), (true_out, true_lse) = found, expected
    assert out.dtype == query.dtype and lse.dtype == FP32
    assert out.shape == query.shape and lse.shape == query.shape[:2]
    longest = query.double().norm(dim=-1).max() * keys.double().norm(dim=-1).max()
    logits = gamma(query.shape[-1] + 4) * scaling * float(longest)
    sums = gamma(2 * keys[..., 0].numel() + 64)
    limit = float(torch.tensor(2 * logits).expm1()) + sums + 3 * unit(query.dtype)
    assert (out.double() - true_out).abs().max() <= limit * values.abs().max()
    none = true_lse == -torch.inf
    assert ((lse == -torch.inf) == none).all() and (out[none] == 0).all()
    largest = true_lse[~none].abs().max() if not none.all() else torch.tensor(0.0)
    off = (lse.double() - true_lse)[~none].abs()
    assert not off.isnan().any() and (off <= logits + sums + gamma(8) * largest).all()


# -- attend_frames ---------------------------------------------------------------------------


def frames_case(lists, lengths, page: int, heads: tuple[int, int, int], dtype: torch.dtype):
    """Arguments whose unread tokens are NaN or infinite; lists are views of wider rows and hold
    no frames beyond their lengths."""
    query_heads, kv_heads, dim = heads
    frames = max((frame for listed in lists for frame in listed), default=0) + 2
    lists, lengths = torch.tensor(lists, dtype=torch.int32), torch.tensor(lengths)
    rows, pages = lists.shape
    wide = torch.full((rows, pages + 3), 2**31 - 1, dtype=torch.int32)
    covered = torch.arange(pages) * page < lengths.unsqueeze(1)
    wide[:, :pages] = torch.where(covered, lists, -(2**31) + 1 + torch.arange(pages) * 977)
    inside = torch.arange(pages * page).view(pages, page) < lengths.view(-1, 1, 1)
    inside &= (lists >= 0).unsqueeze(-1)
    read = torch.zeros(frames, page, dtype=torch.bool)
    for row in range(rows):
        for place in range(pages):
            read[lists[row, place]] |= inside[row, place]
    read[-1] = False
    tensors = []
    for seed, filler in ((1, torch.nan), (2, torch.inf)):
        held = normal(frames, page, kv_heads, dim, dtype=dtype, seed=seed)
        tensors.append(held.masked_fill(~read[:, :, None, None], filler))
    query = normal(rows, 2 * query_heads, dim, dtype=dtype)[:, query_heads:]
    return query, *tensors, wide[:, :pages], lengths


def assert_frames(arguments) -> None:
    query, k_frames, v_frames, lane_frames, lengths = arguments
    scaling = query.shape[2] ** -0.5
    found = kernel.attend_frames(*arguments, scaling, None)
    doubles = (tensor.double() for tensor in arguments[:3])
    expected = reference.attend_frames(*doubles, lane_frames, lengths, scaling, None)
    keys, values = (held.nan_to_num(0.0, 0.0) for held in (k_frames, v_frames))
    assert_close(found, expected, query, keys, values, scaling)


def ragged(pages: int, page: int) -> tuple[list[list[int]], list[int]]:
    """Rows: full but for a hole, of length 0, ending inside a page, all refused."""
    draw = torch.Generator().manual_seed(pages)
    lists = torch.randint(0, 3 * pages, (4, pages), generator=draw)
    lists[0, 1], lists[2, 0], lists[3] = -1, -1, -1
    return lists.tolist(), [pages * page, 0, pages * page // 2 + 3, page + 1]


@pytest.mark.parametrize("processors", [1, 132], ids=["whole", "split"])
@pytest.mark.parametrize(
    "pages, page, heads, dtype",
    [
        (19, 16, (6, 2, 64), BF16),
        (9, 32, (2, 2, 96), FP16),
        (5, 64, (8, 1, 128), BF16),
        (9, 16, (8, 2, 128), FP32),
        (5, 32, (7, 1, 256), BF16),
        (3, 64, (5, 1, 64), FP32),
        (5, 64, (1, 1, 256), FP16),
        (17, 16, (70, 1, 64), BF16),
    ],
    ids=str,
)
def test_rows_attend_to_their_tokens_and_to_no_other(
    pages, page, heads, dtype, processors, monkeypatch, guarded
):
    """Whole and split lists, which fill no number of tiles; 70 heads take two programs."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: processors)
    assert_frames(frames_case(*ragged(pages, page), page, heads, dtype))
    assert len(guarded) == (2 if processors == 1 else 4), "two more are what a split merges"


def test_more_splits_than_a_row_has_tiles(guarded):
    """Seven splits, no power of two; most of a short row's are empty, all of an inert row's."""
    lists = [list(range(56)), [3] + [0] * 55, [5] * 56]
    assert_frames(frames_case(lists, [56 * 16 - 1, 5, 0], 16, (2, 1, 64), BF16))
    assert guarded[2].numel() - 2 * BAND == 3 * 2 * 7 * 64


def test_lists_without_pages_and_lengths_beyond_a_list(guarded):
    """No row has a token; a length counts only as far as its list goes."""
    assert_frames(frames_case([[], []], [0, 9], 16, (2, 1, 64), FP32))
    assert_frames(frames_case([[0, 1]], [999], 16, (2, 1, 64), FP32))


def test_int32_lengths_int64_lists_and_one_list_for_all_rows(guarded):
    """Types are the caller's; rows may share one list by a stride of 0."""
    query, k, v, _, _ = frames_case([[0, 1]] * 3, [32] * 3, 16, (2, 1, 64), FP32)
    lists, lengths = torch.tensor([[0, 1]]).expand(3, -1), torch.full((3,), 32, dtype=torch.int32)
    assert_frames((query, k, v, lists, lengths))


def test_frames_beyond_32_bit_offsets(guarded, monkeypatch):
    """Frame 3 starts at element 3 * 2**30; memory between frames is mapped but never touched, not
    even by the interpreter, which copies what a launch was given onto itself afterwards."""
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    storage = torch.frombuffer(mmap.mmap(-1, 6 * 2**30 + 2**13), dtype=BF16)
    k, v = (storage[at:].as_strided((4, 16, 1, 64), (2**30, 64, 64, 1)) for at in (0, 2**11))
    k[3], v[3] = normal(16, 1, 64, dtype=BF16, seed=1), normal(16, 1, 64, dtype=BF16, seed=2)
    query = normal(1, 2, 64, dtype=BF16)
    place, length = torch.tensor([[3]], dtype=torch.int32), torch.tensor([13])
    found = kernel.attend_frames(query, k, v, place, length, 0.125, None)
    near = [held[3:].clone() for held in (k, v)]
    expected = kernel.attend_frames(query, *near, torch.zeros_like(place), length, 0.125, None)
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


def test_logits_of_several_hundred_do_not_overflow(guarded):
    """In natural units and in the kernel's powers of two."""
    for dtype in (BF16, FP16, FP32):
        query, k, v, *lists = frames_case([[0, 1, 2]], [40], 16, (2, 2, 64), dtype)
        out, lse = kernel.attend_frames(30 * query, 30 * k, v, *lists, 0.125, None)
        assert out.isfinite().all() and lse.isfinite().all() and lse.max() > 200


def test_splits_come_from_shapes_alone():
    """Enough programs to fill the device, of at least two tiles each, merged in one go."""
    device = torch.device("cpu")
    assert kernel.multiprocessors(device) == 132
    assert kernel._splits(8, 16, device) == 8
    assert kernel._splits(8, 2048, device) == 64
    assert kernel._splits(200, 2048, device) == 3
    assert kernel._splits(1000, 2048, device) == 1
    assert kernel._splits(1, 0, device) == kernel._splits(1, 3, device) == 1


# -- chunks, parts, merge --------------------------------------------------------------------


def sequence(tokens: int, keys: int, heads: tuple[int, int, int], dtype: torch.dtype):
    """Query, keys and values as views of one buffer of tokens, NaN before and behind."""
    query_heads, kv_heads, dim = heads
    counts = {"query": (tokens, query_heads), "k": (keys, kv_heads), "v": (keys, kv_heads)}
    whole = poison(max(tokens, keys) + 5, query_heads + 2 * kv_heads + 2, dim, dtype=dtype)
    views, first = [], 1
    for seed, (count, many) in enumerate(counts.values()):
        view = whole[2 : 2 + count, first : first + many]
        view.copy_(normal(count, many, dim, dtype=dtype, seed=seed))
        views.append(view)
        first += many
    return views


HEADS = {
    "gqa5-dim96": ((5, 1, 96), BF16),
    "gqa1-dim64": ((2, 2, 64), FP16),
    "gqa8-dim256": ((8, 1, 256), BF16),
    "gqa4-dim128": ((8, 2, 128), BF16),
    "gqa3-dim64": ((3, 1, 64), FP32),
}
by_heads = pytest.mark.parametrize("heads, dtype", HEADS.values(), ids=HEADS.keys())


@by_heads
@pytest.mark.parametrize("tokens", [1, 45, 130], ids="len{}".format)
def test_a_chunk_attends_to_itself_causally(heads, dtype, tokens, guarded):
    """A tile of queries ends within a token's heads, begins beyond whole tiles of keys."""
    arguments = sequence(tokens, tokens, heads, dtype)
    scaling = heads[2] ** -0.5
    found = kernel.attend_chunk(*arguments, scaling)
    expected = reference.attend_chunk(*(tensor.double() for tensor in arguments), scaling)
    assert_close(found, expected, *arguments, scaling)


@by_heads
@pytest.mark.parametrize("tokens, keys", [(3, 1), (1, 129), (50, 64), (19, 0)], ids=str)
def test_a_chunk_attends_to_all_keys_of_a_part(heads, dtype, tokens, keys, guarded):
    """Fewer keys than queries and more, whole tiles and not, none."""
    arguments = sequence(tokens, keys, heads, dtype)
    scaling = heads[2] ** -0.5
    found = kernel.attend_part(*arguments, scaling)
    if keys == 0:
        assert (found[0] == 0).all() and (found[1] == -torch.inf).all()
        return
    expected = reference.attend_part(*(tensor.double() for tensor in arguments), scaling)
    assert_close(found, expected, *arguments, scaling)


@pytest.mark.parametrize("dim", [64, 96, 256], ids="dim{}".format)
@pytest.mark.parametrize("dtypes", [(FP32, BF16), (FP16, FP16)], ids=str)
def test_parts_merge_by_weight(dim, dtypes, guarded):
    """Parts that outweigh one another, parts without keys that hold NaN, strided log-sum-exps."""
    outs = [normal(23, 3, dim, dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes)]
    lses = [30 * normal(3, 23, seed=seed).T for seed in (2, 3)]
    for part, rows in ((0, (4, 9)), (1, (6, 9))):
        lses[part][list(rows)] = -torch.inf
        outs[part][list(rows)] = torch.nan
    pairs = list(zip(outs, lses, strict=True))
    out, lse = kernel.merge_parts(*pairs)
    expected, true_lse = reference.merge_parts(*((o.double(), s.double()) for o, s in pairs))
    assert out.dtype == lse.dtype == FP32
    largest = lse[lse > -torch.inf].abs().max()
    limit = gamma(16) + 4 * unit(FP32) * largest
    assert (out.double() - expected).abs().max() <= limit * expected.abs().max()
    assert (out[9] == 0).all() and (lse[9] == -torch.inf).all()
    assert torch.allclose(lse.double(), true_lse, rtol=gamma(4), atol=gamma(4))


def test_merging_with_a_part_without_keys_changes_no_bit(guarded):
    """Either way round."""
    part = normal(4, 3, 64), normal(4, 3)
    empty = poison(4, 3, 64), torch.full((4, 3), -torch.inf)
    for first, second in ((part, empty), (empty, part)):
        out, lse = kernel.merge_parts(first, second)
        assert same_bits(out, part[0]) and same_bits(lse, part[1])


def test_no_tokens_give_no_output(guarded):
    """A grid of no programs is never launched."""
    query, k, v = sequence(0, 3, (4, 2, 64), FP32)
    for out, lse in (
        kernel.attend_part(query, k, v, 0.125),
        kernel.attend_chunk(query, k[:0], v[:0], 0.125),
        kernel.merge_parts((query, query[..., 0]), (query, query[..., 0])),
    ):
        assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


# -- dispatch --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["attend_frames", "attend_chunk", "attend_part", "merge_parts"])
def test_kernel_and_reference_are_called_alike(op):
    """The API hands the same positional arguments to whichever serves the device."""
    launcher, torch_op = getattr(kernel, op), getattr(reference, op)
    assert inspect.signature(launcher) == inspect.signature(torch_op)


def test_cuda_tensors_go_to_the_kernels_others_to_the_reference():
    """By the query's device."""
    assert api._implementation(types.SimpleNamespace(is_cuda=True)) is kernel
    assert api._implementation(normal(1)) is reference
