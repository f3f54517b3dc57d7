"""The attend op against attention in float64: chosen frames, chunks, parts and their merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arkvale_kernels.attend import (
    attend_chunk,
    attend_frames,
    attend_part,
    merge_parts,
    reference,
)
from support import oracle
from support.numeric import DTYPES, float64, gamma, normal, poison, unit

HEADS = {
    "gqa1-dim64": (2, 2, 64),
    "gqa2-dim96": (4, 2, 96),
    "gqa4-dim128": (4, 1, 128),
    "gqa8-dim256": (8, 1, 256),
}
"""Query heads, KV heads, head_dim."""
by_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_page = pytest.mark.parametrize("size", [16, 32, 64], ids="page{}".format)


def logit_error(query: np.ndarray, keys: np.ndarray, scaling: float) -> float:
    """A logit is a float32 dot product of head_dim terms, scaled and shifted by the maximum; three
    roundings of a value that is at most ``scaling * |q| |k|``."""
    dim = query.shape[-1]
    longest = np.linalg.norm(query, axis=-1).max() * np.linalg.norm(keys, axis=-1).max()
    return gamma(dim + 3) * scaling * longest


def exp_error(dtype: torch.dtype) -> float:
    """Relative error of an exponential in torch's fused kernel: 20 units in the last place in
    float32 (its name there is ``exp_u20``), and for the small dtypes a faster one, of use only if
    it is better than the ``dtype`` that the weight is then rounded to."""
    return max(40 * unit(torch.float32), unit(dtype))


def tolerance(query, keys, values, scaling: float, dtype: torch.dtype) -> float:
    """Bound on the error of an output element.

    An output is a weighted sum over a sum of weights, hence at most the largest value.  Relative
    to that: an error e of the logits changes each weight by a factor exp(2e); exponentials err
    above and below; two sums over n tokens cost n float32 roundings each; weights are rounded to
    ``dtype`` before they meet the values, the output after.
    """
    logits = np.expm1(2 * logit_error(query, keys, scaling))
    roundings = gamma(2 * len(keys)) + 2 * exp_error(dtype) + 2 * unit(dtype)
    return (logits + roundings) * np.abs(values).max()


def lse_tolerance(query, keys, scaling: float, lse: np.ndarray, dtype: torch.dtype) -> float:
    """The logits' error, exponentials, a sum of n positive terms, a logarithm and an addition."""
    roundings = gamma(len(keys)) + exp_error(dtype) + 2 * unit(torch.float32) * np.abs(lse).max()
    return logit_error(query, keys, scaling) + roundings


def log_sum_exp(query, keys, scaling: float) -> np.ndarray:
    """``[query heads]`` of one query."""
    per_kv = query.shape[0] // keys.shape[1]
    logits = np.stack([keys[:, head // per_kv] @ q * scaling for head, q in enumerate(query)])
    top = logits.max(1)
    return top + np.log(np.exp(logits - top[:, None]).sum(1))


# -- attend_frames ---------------------------------------------------------------------------


def attended_tokens(frames: list[int], length: int, size: int) -> list[tuple[int, int]]:
    """(frame, offset) of every token that counts."""
    return [
        (frame, offset)
        for place, frame in enumerate(frames)
        for offset in range(size)
        if frame >= 0 and place * size + offset < length
    ]


def assert_rows(query, k_frames, v_frames, lane_frames, lengths, **options) -> None:
    """Run the op and compare every row with float64."""
    scaling = query.shape[2] ** -0.5
    frames, many = torch.tensor(lane_frames, dtype=torch.int32), torch.tensor(lengths)
    out, lse = attend_frames(query, k_frames, v_frames, frames, many, scaling=scaling, **options)
    assert out.dtype == query.dtype and out.shape == query.shape
    assert lse.dtype == torch.float32 and lse.shape == query.shape[:2]
    for row, (listed, length) in enumerate(zip(lane_frames, lengths, strict=True)):
        tokens = attended_tokens(listed, length, k_frames.shape[1])
        if not tokens:
            assert (out[row] == 0).all() and (lse[row] == -torch.inf).all()
            continue
        frame, offset = np.array(tokens).T
        keys, values = (float64(held)[frame, offset] for held in (k_frames, v_frames))
        q = float64(query[row])
        limit = tolerance(q, keys, values, scaling, query.dtype)
        expected = oracle.attention(q, keys, values, scaling)
        assert np.abs(float64(out[row]) - expected).max() <= limit
        sums = log_sum_exp(q, keys, scaling)
        limit = lse_tolerance(q, keys, scaling, sums, query.dtype)
        assert np.abs(float64(lse[row]) - sums).max() <= limit


def blank_except(held: torch.Tensor, lane_frames, lengths) -> torch.Tensor:
    """Frames with NaN wherever no row may look."""
    result = poison(*held.shape, dtype=held.dtype)
    for listed, length in zip(lane_frames, lengths, strict=True):
        for frame, offset in attended_tokens(listed, length, held.shape[1]):
            result[frame, offset] = held[frame, offset]
    return result


def ragged(size: int) -> tuple[list[list[int]], list[int]]:
    """Four rows of frames: full, partly filled, one token, holes where pages were refused; row 3
    shares frame 5 with row 0.  Frame 0 is in no list, but a hole must not be read as frame 0."""
    lane_frames = [[3, 5, 1, 2], [7, 4, 9, -1], [6, -1, -1, -1], [8, -1, 5, 10]]
    return lane_frames, [4 * size, 2 * size + 3, 1, 4 * size - 1]


@by_heads
@by_page
@by_dtype
@pytest.mark.parametrize("block", [1, 3, 9], ids="block{}".format)
def test_rows_attend_to_their_chosen_tokens_and_to_no_other(heads, size, dtype, block, monkeypatch):
    """Ragged lists, in blocks, with NaN in every frame, tail and hole that a row must not see."""
    query_heads, kv_heads, dim = heads
    monkeypatch.setattr(reference, "COPY_BYTES", block * 4 * size * kv_heads * dim * dtype.itemsize)
    lane_frames, lengths = ragged(size)
    k_frames, v_frames = (
        blank_except(normal(12, size, kv_heads, dim, dtype=dtype, seed=seed), lane_frames, lengths)
        for seed in (1, 2)
    )
    assert_rows(normal(4, query_heads, dim, dtype=dtype), k_frames, v_frames, lane_frames, lengths)


@by_heads
@by_dtype
@pytest.mark.parametrize("length", [1, 31, 32, 33, 96], ids="len{}".format)
@pytest.mark.parametrize("block", [1, 2, 9], ids="block{}".format)
def test_rows_of_one_length_attend_without_a_mask(heads, length, block, dtype, monkeypatch):
    """``common_length`` cuts the list instead of masking it; long lists are read in blocks."""
    query_heads, kv_heads, dim = heads
    monkeypatch.setattr(reference, "COPY_BYTES", block * 2 * 32 * kv_heads * dim * dtype.itemsize)
    lengths, pages = [length] * 2, -(-length // 32)
    lane_frames = [listed[:pages] for listed in ([3, 5, 0], [1, 4, 2])]
    k_frames, v_frames = (
        blank_except(normal(6, 32, kv_heads, dim, dtype=dtype, seed=seed), lane_frames, lengths)
        for seed in (1, 2)
    )
    query = normal(2, query_heads, dim, dtype=dtype)
    assert_rows(query, k_frames, v_frames, lane_frames, lengths, common_length=length)
    assert_rows(query, k_frames, v_frames, lane_frames, lengths)
    lane_frames[1][-1] = -1  # refused for want of a frame: one length, yet a gap
    assert_rows(query, k_frames, v_frames, lane_frames, lengths, common_length=length)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8], ids="gqa{}".format)
@pytest.mark.parametrize("groups", [1, 2, 4], ids="groups{}".format)
def test_lanes_of_a_layer_attend_to_lists_of_their_own(ratio, groups):
    """Lane-minor rows; every lane chose other frames out of its own part of the buffer."""
    kv_heads, dim, frames, rows = 4, 64, 6, 2
    lane_heads = kv_heads // groups
    draw = np.random.default_rng(0)
    lane_frames = [
        [lane * frames + int(frame) for frame in draw.permutation(frames)[:3]]
        for _ in range(rows)
        for lane in range(groups)
    ]
    lengths = [16 * 2 + 1 + row for row in range(rows) for _ in range(groups)]
    shape = (groups * frames + 1, 16, lane_heads, dim)
    k_frames, v_frames = (
        blank_except(normal(*shape, seed=seed), lane_frames, lengths) for seed in (1, 2)
    )
    query = normal(rows * groups, lane_heads * ratio, dim)
    assert_rows(query, k_frames, v_frames, lane_frames, lengths)


def test_huge_logits_do_not_overflow():
    """Logits of several hundred: the weights collapse onto one token, in all dtypes alike."""
    for dtype in DTYPES:
        query, keys = 30 * normal(1, 2, 64, dtype=dtype), 30 * normal(3, 16, 2, 64, dtype=dtype)
        values = normal(3, 16, 2, 64, dtype=dtype, seed=1)
        out, _ = attend_frames(
            query, keys, values, torch.tensor([[0, 1, 2]]), torch.tensor([40]), scaling=0.125
        )
        assert out.isfinite().all() and out.abs().max() <= values.abs().max()


def test_a_row_without_any_token_is_zero():
    """All pages refused, or a list of no pages at all."""
    frames, query = normal(3, 16, 2, 64), normal(2, 4, 64)
    assert_rows(query, frames, frames, [[-1, -1], [1, -1]], [0, 16])
    assert_rows(query, frames, frames, [[-1, -1], [1, -1]], [32, 0])
    assert_rows(query, frames, frames, [[], []], [0, 0])


@pytest.mark.parametrize("common_length", [None, 20], ids="common{}".format)
def test_lists_may_be_views_of_wider_rows_and_hold_anything_beyond_their_length(common_length):
    """Only as much of a list is looked at as its row's length covers."""
    k_frames, v_frames = normal(6, 16, 2, 64), normal(6, 16, 2, 64, seed=1)
    query, lengths = normal(2, 4, 64), torch.tensor([20, 20])
    beyond = 2**31 - 1
    wide = torch.tensor([[3, 5, beyond, 0, 1], [1, 4, -beyond, 0, 1]], dtype=torch.int32)
    options = {"scaling": 0.125, "common_length": common_length}
    found = attend_frames(query, k_frames, v_frames, wide[:, :3], lengths, **options)
    exact = wide[:, :2].contiguous()
    expected = attend_frames(query, k_frames, v_frames, exact, lengths, **options)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=gamma(200))


# -- chunks, parts, merge --------------------------------------------------------------------


def sequence(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype = torch.float32):
    """Queries, keys and values of a sequence, keys and values read as strided views."""
    query_heads, kv_heads, dim = heads
    query = normal(tokens, query_heads, dim, dtype=dtype)
    k, v = normal(tokens, 2 * kv_heads, dim, dtype=dtype, seed=1).split(kv_heads, 1)
    return query, k, v


def assert_causal(out, query, k, v, prefix: int, spare: float = 0.0) -> None:
    """Queries that follow ``prefix`` tokens match dense causal attention."""
    q, keys, values = float64(query), float64(k), float64(v)
    scaling = q.shape[-1] ** -0.5
    limit = tolerance(q, keys, values, scaling, query.dtype) + spare
    expected = oracle.causal_attention(q, keys, values, prefix, scaling)
    assert np.abs(float64(out) - expected).max() <= limit


@by_heads
@by_dtype
@pytest.mark.parametrize("tokens", [1, 2, 17, 70], ids="len{}".format)
def test_a_chunk_attends_to_itself_causally(heads, tokens, dtype):
    """Output and log-sum-exp of every token over itself and those before."""
    query, k, v = sequence(tokens, heads, dtype)
    scaling = heads[2] ** -0.5
    out, lse = attend_chunk(query, k, v, scaling=scaling)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_causal(out, query, k, v, 0)
    q, keys = float64(query), float64(k)
    expected = np.stack(
        [log_sum_exp(row, keys[: place + 1], scaling) for place, row in enumerate(q)]
    )
    limit = lse_tolerance(q, keys, scaling, expected, dtype)
    assert np.abs(float64(lse) - expected).max() <= limit


@by_heads
@by_dtype
@pytest.mark.parametrize("tokens, keys", [(1, 1), (3, 50), (33, 7)], ids=str)
def test_a_chunk_attends_to_all_keys_of_a_part(heads, tokens, keys, dtype):
    """No causality inside a part: all its keys precede the chunk."""
    query, _, _ = sequence(tokens, heads, dtype)
    _, k, v = sequence(keys, heads, dtype)
    scaling = heads[2] ** -0.5
    out, lse = attend_part(query, k, v, scaling=scaling)
    assert out.shape == query.shape and lse.shape == query.shape[:2]
    true_k, true_v = float64(k), float64(v)
    for row, q in enumerate(float64(query)):
        limit = tolerance(q, true_k, true_v, scaling, dtype)
        expected = oracle.attention(q, true_k, true_v, scaling)
        assert np.abs(float64(out[row]) - expected).max() <= limit
        sums = log_sum_exp(q, true_k, scaling)
        off = np.abs(float64(lse[row]) - sums).max()
        assert off <= lse_tolerance(q, true_k, scaling, sums, dtype)


@by_heads
@by_dtype
@pytest.mark.parametrize("cuts", [[5], [1, 2, 40], [16, 32, 48]], ids=str)
def test_merged_parts_equal_attention_over_the_whole_prefix(heads, cuts, dtype):
    """A chunk of 9 tokens after 60, whose prefix is attended in unequal parts.

    Every part has its own error in weights, and the merge weighs them with exponentials of
    log-sum-exps that are off by at most their tolerance, for each part anew.
    """
    prefix, scaling = 60, heads[2] ** -0.5
    query, k, v = sequence(prefix + 9, heads, dtype)
    query = query[prefix:]
    part = attend_chunk(query, k[prefix:], v[prefix:], scaling=scaling)
    largest = part[1].abs().max().item()
    for start, stop in zip([0, *cuts], [*cuts, prefix], strict=True):
        other = attend_part(query, k[start:stop], v[start:stop], scaling=scaling)
        largest = max(largest, other[1].abs().max().item())
        part = merge_parts(part, other)
    assert part[0].dtype == torch.float32
    off = lse_tolerance(float64(query), float64(k), scaling, np.array(largest), dtype)
    spare = (len(cuts) + 1) * (np.expm1(2 * off) + gamma(4)) * v.abs().max().item()
    assert_causal(part[0], query, k, v, prefix, spare)


def test_merging_parts_of_very_different_weight_neither_overflows_nor_loses_the_heavy_one():
    """Log-sum-exps of plus and minus a thousand: the exponentials alone would be inf and 0."""
    heavy, light = normal(3, 2, 64), normal(3, 2, 64, seed=1)
    for high, low in ((1000.0, -1000.0), (1000.0, 0.0), (0.0, -1000.0)):
        pair = (heavy, torch.full((3, 2), high)), (light, torch.full((3, 2), low))
        for first, second in (pair, pair[::-1]):
            out, lse = merge_parts(first, second)
            assert torch.equal(out, heavy) and (lse == high).all()


def test_a_part_without_keys_adds_nothing():
    """An empty part has weight zero, and merging it leaves the other as it was."""
    query, k, v = sequence(4, (4, 2, 64))
    part = attend_chunk(query, k, v, scaling=0.125)
    empty = attend_part(query, k[:0], v[:0], scaling=0.125)
    assert (empty[0] == 0).all() and (empty[1] == -torch.inf).all()
    out, lse = merge_parts(part, empty)
    assert torch.equal(out, part[0]) and torch.equal(lse, part[1])


def test_merging_two_parts_without_keys_gives_a_part_without_keys():
    """Neither may the difference of two infinities come out, nor what an empty part holds."""
    part = attend_part(normal(4, 4, 64), normal(0, 2, 64), normal(0, 2, 64), scaling=0.125)
    for other in (part, (poison(4, 4, 64), part[1])):
        out, lse = merge_parts(part, other)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_a_chunk_without_tokens_gives_nothing():
    """Empty in, empty out, for both ops of prefill."""
    query, k, v = sequence(3, (4, 2, 64))
    for out, lse in (
        attend_chunk(query[:0], k[:0], v[:0], scaling=0.125),
        attend_part(query[:0], k, v, scaling=0.125),
    ):
        assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


# -- arguments -------------------------------------------------------------------------------


def test_attend_frames_refuses_wrong_arguments_by_name():
    """Every check names its argument."""
    good = {
        "query": normal(2, 4, 64), "k_frames": normal(5, 16, 2, 64),
        "v_frames": normal(5, 16, 2, 64), "lane_frames": torch.ones(2, 3, dtype=torch.int32),
        "lengths": torch.ones(2, dtype=torch.int64),
    }  # fmt: skip
    for name, wrong, message in (
        ("k_frames", normal(5, 16, 2, 32), "k_frames must have shape"),
        ("v_frames", normal(5, 16, 1, 64), "v_frames must have shape"),
        ("v_frames", normal(5, 16, 2, 64).half(), "v_frames is torch.float16"),
        ("lane_frames", torch.ones(3, 3), "lane_frames must have shape"),
        ("lengths", torch.ones(3), "lengths must have shape"),
        ("query", normal(2, 4, 64).half(), "query is torch.float16"),
        ("query", normal(2, 3, 64), "query has 3 heads"),
        ("query", normal(0, 4, 64), "query must have at least one row"),
        ("query", normal(2, 4, 64).double(), "query must be torch.float32 or torch.float16 or"),
        ("query", normal(2, 64, 4).mT, "query must be contiguous in its last dimension"),
        ("k_frames", normal(5, 16, 64, 2).mT, "k_frames must be contiguous in its last"),
        ("lane_frames", torch.ones(2, 3), "lane_frames must be torch.int32 or torch.int64"),
        ("lane_frames", torch.ones(3, 2, dtype=torch.int32).T, "lane_frames must be contiguous"),
        ("lengths", torch.ones(2), "lengths must be torch.int32 or torch.int64"),
        ("lengths", torch.ones(2, dtype=torch.int64, device="meta"), "lengths is on meta but"),
    ):
        with pytest.raises(ValueError, match=message):
            attend_frames(**{**good, name: wrong}, scaling=0.125)


@pytest.mark.parametrize("op", [attend_chunk, attend_part])
def test_prefill_ops_refuse_wrong_arguments_by_name(op):
    """The fused kernel reads past the end of a ``v`` that is shorter than ``k``."""
    query, k, v = sequence(6, (4, 2, 64))
    for arguments, message in (
        ((query, k[..., :32], v), "k must have shape"),
        ((query, k, v[:3]), "v must have shape"),
        ((query, k, v[..., :32]), "v must have shape"),
        ((query, k.half(), v.half()), "k is torch.float16 but query"),
        ((query, k, v.half()), "v is torch.float16 but query"),
        ((query[:, :3], k, v), "query has 3 heads"),
        ((query[:, 0], k, v), "query must have shape"),
        ((query.double(), k, v), "query must be torch.float32 or"),
        ((query, k, normal(6, 64, 2).mT), "v must be contiguous in its last dimension"),
        ((query, k.to("meta"), v), "k is on meta but query is on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments, scaling=0.125)
    with pytest.raises(ValueError, match="k must have shape"):
        attend_chunk(query, k[:5], v[:5], scaling=0.125)


def test_merge_refuses_parts_of_different_shape_by_name():
    """Two chunks cannot be merged."""
    one, two = (normal(3, 2, 64), normal(3, 2)), (normal(4, 2, 64), normal(4, 2))
    with pytest.raises(ValueError, match="other output must have shape"):
        merge_parts(one, two)
    with pytest.raises(ValueError, match="other log-sum-exp must have shape"):
        merge_parts(one, (one[0], two[1]))
    with pytest.raises(ValueError, match=r"other log-sum-exp must be torch\.float32"):
        merge_parts(one, (one[0], one[1].half()))
    with pytest.raises(ValueError, match="other output is on meta but output is on cpu"):
        merge_parts(one, (one[0].to("meta"), one[1]))
