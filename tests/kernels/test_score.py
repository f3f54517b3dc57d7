"""The score op against the formula in float64: ragged rows, lanes, biases, bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkvale_kernels.digest import build_digests
from arkvale_kernels.score import HEAD_REDUCES, score_pages
from support import oracle
from support.numeric import DTYPES, float64, gamma, normal, poison, unit

SHAPES = {
    "1row-1page-gqa1-dim64": (1, 1, 2, 2, 64),
    "3rows-7pages-gqa2-dim96": (3, 7, 4, 2, 96),
    "2rows-5pages-gqa4-dim128": (2, 5, 4, 1, 128),
    "2rows-3pages-gqa8-dim256": (2, 3, 8, 1, 256),
}
"""Rows, pages, query heads, KV heads, head_dim."""
SCALING = 0.125
by_reduce = pytest.mark.parametrize("reduce", HEAD_REDUCES)
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_digests(pages: int, kv_heads: int, dim: int, dtype=torch.float32) -> torch.Tensor:
    """``[pages, 2, kv_heads, dim]`` with upper >= lower."""
    return normal(pages, 2, kv_heads, dim, dtype=dtype, seed=1).sort(1, descending=True).values


def ragged_rows(rows: int, pages: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages in any order and a bias: row r lacks its last r pages, as padding."""
    order = np.random.default_rng(0)
    lane_pages = torch.zeros(rows, pages, dtype=torch.int32)
    bias = torch.full((rows, pages), -torch.inf)
    for row in range(rows):
        count = max(1, pages - row)
        chosen = 1 + order.permutation(total - 1)[:count]
        lane_pages[row, :count], bias[row, :count] = torch.from_numpy(chosen), 0.0
    return lane_pages, bias


def tolerance(query: np.ndarray, digest: np.ndarray, reduce: str) -> float:
    """Bound on the error of one row's scores, ``digest [pages, 2, KV heads, dim]``.

    A score is a float32 dot product of 2 * dim terms per head; ``mean`` sums all heads at once and
    has summed the heads of a KV head, positive part and total, before.  Softmax turns an error e
    of its argument into a factor exp(2e); its sum and division add one rounding a page, and exp is
    good to one unit.
    """
    heads, dim = query.shape
    pages, _, kv_heads, _ = digest.shape
    size = np.repeat(np.abs(digest).max(1), heads // kv_heads, axis=1)
    terms = np.einsum("hd,phd->hp", np.abs(query), size)
    if reduce == "mean":
        return gamma(2 * kv_heads * dim + 2 * heads // kv_heads + 3) * terms.mean(0).max()
    error = gamma(2 * dim) * terms.max()
    if reduce == "max":
        return error
    argument = SCALING * (error + 3 * unit(torch.float32) * terms.max())
    return np.expm1(2 * argument) + gamma(pages + heads + 4)


def expected_row(query, digests, lane_pages, bias, reduce) -> np.ndarray:
    """What the op must return for one row."""
    candidates = [int(p) for p, b in zip(lane_pages, bias, strict=True) if b == 0]
    scores = oracle.page_scores(query, digests, candidates, reduce, SCALING)
    infinite = [float(b) for b in bias]
    return np.array(
        [scores[int(p)] if b == 0 else b for p, b in zip(lane_pages, infinite, strict=True)]
    )


def assert_rows(query, digests, lane_pages, bias, reduce) -> None:
    """Run the op and compare every row."""
    scores = score_pages(query, digests, lane_pages, bias, head_reduce=reduce, scaling=SCALING)
    assert scores.dtype == torch.float32 and scores.shape == lane_pages.shape
    truth, queries = float64(digests), float64(query)
    for row, row_query in enumerate(queries):
        used = truth[lane_pages[row][bias[row] == 0].numpy()]
        limit = tolerance(row_query, used, reduce) if len(used) else 0.0
        expected = expected_row(row_query, truth, lane_pages[row], bias[row], reduce)
        np.testing.assert_allclose(float64(scores[row]), expected, rtol=0, atol=limit)


@by_reduce
@by_shape
@by_dtype
def test_scores_of_ragged_rows_match_the_formula(reduce, shape, dtype):
    """Rows of different length, pages in any order, padding scored -inf."""
    rows, pages, query_heads, kv_heads, dim = shape
    lane_pages, bias = ragged_rows(rows, pages, total=pages + 4)
    query = normal(rows, query_heads, dim, dtype=dtype)
    assert_rows(query, random_digests(pages + 4, kv_heads, dim, dtype), lane_pages, bias, reduce)


@by_reduce
@pytest.mark.parametrize("ratio", [1, 2, 4, 8], ids="gqa{}".format)
@pytest.mark.parametrize("groups", [1, 2, 4], ids="groups{}".format)
def test_each_lane_reads_its_own_digests_only(reduce, ratio, groups):
    """Lane-minor rows over ``group * stride + page``; all digests nobody asked for are NaN."""
    kv_heads, dim, stride, rows = 4, 64, 9, 2
    lane_heads = kv_heads // groups
    lane_pages, bias = ragged_rows(rows * groups, 4, total=stride)
    lane = (torch.arange(rows * groups) % groups).unsqueeze(1) * stride
    lane_pages = torch.where(bias == 0, lane_pages + lane, 0).int()
    digests = poison(groups * stride, 2, lane_heads, dim)
    wanted = lane_pages.unique().long()
    digests[wanted] = random_digests(len(wanted), lane_heads, dim)
    query = normal(rows, kv_heads * ratio, dim).view(rows * groups, lane_heads * ratio, dim)
    assert_rows(query, digests, lane_pages, bias, reduce)


@by_reduce
def test_an_infinite_bias_decides_even_where_the_digest_is_nan(reduce):
    """A forced, open or padding page may have no digest yet; what another request left in its
    place must not reach any score of the row."""
    digests = random_digests(6, 2, 64)
    digests[[3, 4, 5]] = torch.nan
    lane_pages = torch.tensor([[1, 3, 2, 4, 5]])
    bias = torch.tensor([[0.0, torch.inf, 0.0, torch.inf, -torch.inf]])
    assert_rows(normal(1, 4, 64), digests, lane_pages, bias, reduce)


def test_only_candidates_compete_in_the_softmax():
    """A sink's huge score would otherwise flatten all others to zero."""
    digests = random_digests(4, 2, 64)
    digests[3] = 1e4
    query = normal(1, 4, 64).abs()
    lane_pages, bias = torch.tensor([[3, 1, 2]]), torch.tensor([[torch.inf, 0.0, 0.0]])
    assert_rows(query, digests, lane_pages, bias, "softmax-mean")
    shares = score_pages(
        query, digests, lane_pages, bias, head_reduce="softmax-mean", scaling=SCALING
    )
    assert shares[0, 1:].sum().item() == pytest.approx(1.0, abs=gamma(8)), "shares add up to one"


@by_reduce
def test_rows_without_candidates_get_their_bias(reduce):
    """A short row is all forced and padding; nothing of it may turn to NaN."""
    bias = torch.tensor([[torch.inf, -torch.inf], [-torch.inf, -torch.inf]])
    lane_pages = torch.tensor([[1, 0], [0, 0]])
    scores = score_pages(
        normal(2, 4, 64), random_digests(2, 2, 64), lane_pages, bias,
        head_reduce=reduce, scaling=SCALING,
    )  # fmt: skip
    assert torch.equal(scores, bias)


@by_reduce
@pytest.mark.parametrize("rows, pages", [(0, 3), (2, 0)], ids=["no-rows", "no-pages"])
def test_nothing_to_score_gives_nothing(reduce, rows, pages):
    """Empty batches keep their shape."""
    scores = score_pages(
        normal(rows, 4, 64), random_digests(5, 2, 64),
        torch.ones(rows, pages, dtype=torch.int32), torch.zeros(rows, pages),
        head_reduce=reduce, scaling=SCALING,
    )  # fmt: skip
    assert scores.shape == (rows, pages)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.sampled_from([16, 32, 64]))
def test_a_cuboid_max_score_bounds_every_key_of_its_page_for_every_head(seed, dtype, page_size):
    """Each head alone: score >= q.k for all keys of the page, up to the roundings of the score."""
    pages, kv_heads, ratio, dim = 2, 2, 2, 64
    keys = normal(pages, page_size, kv_heads, dim, dtype=dtype, seed=seed)
    query = normal(kv_heads * ratio, dim, dtype=dtype, seed=seed + 1)
    digests = build_digests(keys, "cuboid-max")
    lane_pages = torch.arange(pages).unsqueeze(0)
    for head, q in enumerate(float64(query)):
        own = slice(head // ratio, head // ratio + 1)
        scores = score_pages(
            query[head].view(1, 1, dim), digests[:, :, own].contiguous(), lane_pages,
            torch.zeros(1, pages), head_reduce="max", scaling=SCALING,
        )  # fmt: skip
        limit = tolerance(q[None], float64(digests[:, :, own]), "max")
        true = float64(keys[:, :, head // ratio]) @ q
        assert (float64(scores)[0] + limit >= true.max(1)).all()


def test_wrong_arguments_are_refused_by_name():
    """Every check names its argument."""
    good = {
        "query": normal(2, 4, 64), "digests": random_digests(5, 2, 64),
        "lane_pages": torch.ones(2, 3, dtype=torch.int32), "bias": torch.zeros(2, 3),
        "head_reduce": "mean",
    }  # fmt: skip
    for name, wrong, message in (
        ("head_reduce", "min", "head reduction 'min'.*softmax-mean"),
        ("digests", random_digests(5, 2, 32), "digests must have shape"),
        ("lane_pages", torch.ones(3, 3, dtype=torch.int32), "lane_pages must have shape"),
        ("bias", torch.zeros(2, 4), "bias must have shape"),
        ("query", normal(2, 3, 64), "3 query heads do not divide over 2 KV heads"),
    ):
        with pytest.raises(ValueError, match=message):
            score_pages(**{**good, name: wrong}, scaling=SCALING)
