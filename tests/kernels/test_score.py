"""The score op against the formula in float64: ragged rows, lanes, marks, bounds."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arkvale_kernels import checks
from arkvale_kernels.digest import build_digests
from arkvale_kernels.layout import SelectionRule
from arkvale_kernels.score import HEAD_REDUCES, kernel, reference, score_pages
from support import oracle
from support.numeric import DTYPES, float64, gamma, normal, unit

FP8 = torch.float8_e4m3fn
RULE = SelectionRule(budget=6, must=2, sinks=2, window=2)
ALL = SelectionRule(budget=1, must=0, sinks=0, window=1)
"""Everything but the open page competes."""
SCALING = 0.125
GARBAGE = 2**30
"""No page id; stands beyond the end of a row."""
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {
    "1row-9pages-gqa1-dim64": ([9], 2, 1, 64, (FP32, FP16)),
    "4rows-of-0-to-75pages-gqa3-dim96": ([75, 0, 6, 7], 2, 3, 96, (BF16, FP8)),
    "2rows-gqa4-dim128": ([70, 37], 1, 4, 128, (FP16, FP8)),
    "2rows-8heads-gqa4-dim128": ([21, 11], 8, 4, 128, (BF16,)),
    "3rows-gqa7-dim64": ([5, 12, 20], 2, 7, 64, (FP32, BF16)),
    "2rows-gqa8-dim256": ([33, 40], 1, 8, 256, (BF16, FP8)),
}
"""Pages of each row, KV heads, query heads per KV head, head_dim, dtypes of the digests."""
IMPLEMENTATIONS = {"reference": reference.score_pages, "kernel": kernel.score_pages}
by_implementation = pytest.mark.parametrize(
    "score", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys()
)
by_reduce = pytest.mark.parametrize("reduce", HEAD_REDUCES)
by_shape = pytest.mark.parametrize(
    "shape, stored",
    [
        pytest.param(shape[:4], stored, id=f"{name}-{stored}")
        for name, shape in SHAPES.items()
        for stored in shape[4]
    ],
)


def random_digests(pages: int, kv_heads: int, dim: int, dtype=torch.float32) -> torch.Tensor:
    """``[pages, 2, kv_heads, dim]`` with upper >= lower."""
    pair = normal(pages, 2, kv_heads, dim, seed=1).sort(1, descending=True).values
    return pair.to(dtype)


def batch(guards, counts: list[int], kv_heads: int, per_kv: int, dim: int, dtype, stored,
          rule: SelectionRule = RULE, groups: int = 1, order: list[int] | None = None):  # fmt: skip
    """Arguments of the op: rows lane-minor, pages in any order, or in the one that is given, and
    their ids in a wide table, garbage beyond a row's end; digests of pages that do not compete are
    NaN."""
    draw, width, stride = np.random.default_rng(0), max(counts) + 1, max(counts) + 5
    total = groups * stride
    lane_pages = torch.full((len(counts), width), GARBAGE, dtype=torch.int32)
    competing = torch.zeros(total, dtype=torch.bool)
    for row, count in enumerate(counts):
        ids = 1 + draw.permutation(stride - 1) if order is None else np.array(order)
        pages = ids[:count] + row % groups * stride
        lane_pages[row, :count] = torch.from_numpy(pages)
        competing[pages[list(candidates(count, rule))]] = True
    digests = random_digests(total, kv_heads, dim, stored)
    bits = digests.view(torch.uint8)
    bits[~competing] = 0xFF
    frame_of = torch.from_numpy(np.where(draw.random(total) < 0.5, 7, -1).astype(np.int32))
    query = normal(len(counts), kv_heads * per_kv, dim, dtype=dtype)
    return (
        guards.hold(query, frozen=True),
        guards.hold(bits, frozen=True).view(stored),
        guards.hold(frame_of, frozen=True),
        guards.hold(lane_pages, frozen=True, row_stride=width + 3),
        guards.hold(torch.tensor(counts, dtype=torch.int32), frozen=True),
        rule,
    )


def candidates(count: int, rule: SelectionRule) -> range:
    """Places in a row whose pages compete."""
    return range(rule.sinks, count - rule.window) if count > rule.budget else range(0)


def tolerance(query: np.ndarray, digest: np.ndarray, reduce: str) -> float:
    """Bound on the error of one row's scores, ``digest [pages, 2, KV heads, dim]``.

    A score is a float32 dot product of 2 * dim terms per head; ``mean`` sums all heads at once and
    has summed the heads of a KV head, positive part and total, before.  Softmax turns an error e
    of its argument into a factor exp(2e); its sum and division add one rounding a page, and exp is
    good to one unit.  The mark in the lowest bit costs one spacing, two units.
    """
    heads, dim = query.shape
    pages, _, kv_heads, _ = digest.shape
    size = np.repeat(np.abs(digest).max(1), heads // kv_heads, axis=1)
    terms = np.einsum("hd,phd->hp", np.abs(query), size)
    if reduce == "mean":
        return gamma(2 * kv_heads * dim + 2 * heads // kv_heads + 5) * terms.mean(0).max()
    error = gamma(2 * dim + 2) * terms.max()
    if reduce == "max":
        return error
    argument = SCALING * (error + 3 * unit(torch.float32) * terms.max())
    return np.expm1(2 * argument) + gamma(pages + heads + 6)


def assert_rows(score, arguments, reduce) -> torch.Tensor:
    """Run the op and compare what competes in every row, marks included."""
    query, digests, frame_of, lane_pages, page_counts, rule = arguments
    scores = score(*arguments, reduce, SCALING)
    assert scores.dtype == torch.float32 and scores.shape == lane_pages.shape
    truth, queries = float64(digests.float()), float64(query)
    for row, count in enumerate(page_counts.tolist()):
        places = list(candidates(count, rule))
        pages = lane_pages[row, places].tolist()
        if not pages:
            continue
        expected = oracle.page_scores(queries[row], truth, pages, reduce, SCALING)
        limit = tolerance(queries[row], truth[pages], reduce)
        found = scores[row, places]
        wanted = [expected[page] for page in pages]
        np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=limit)
        assert torch.equal((found.view(torch.int32) & 1) == 1, frame_of[pages] >= 0)
    return scores


@by_implementation
@by_reduce
@by_shape
def test_scores_of_ragged_rows_match_the_formula(score, reduce, shape, stored, guards):
    """Rows of no page, within the budget and beyond it, pages in any order; the lowest bit tells
    which are resident."""
    dtype = BF16 if stored == FP8 else stored
    assert_rows(score, batch(guards, *shape, dtype, stored), reduce)


@by_reduce
@pytest.mark.parametrize("stored", [BF16, FP8], ids=str)
def test_a_program_scores_one_tile_after_the_other(reduce, stored, guards, few_programs):
    """One program a row: several tiles, the last one ragged."""
    arguments = batch(guards, [203, 0, 80], 2, 3, 96, BF16, stored)
    assert_rows(kernel.score_pages, arguments, reduce)


@by_reduce
@pytest.mark.parametrize("run", [1, 3], ids="run{}".format)
def test_the_reference_scores_one_run_of_pages_after_the_other(reduce, run, guards, monkeypatch):
    """Runs that divide the width and runs that do not."""
    arguments = batch(guards, [20, 0, 17], 2, 3, 64, BF16, BF16)
    monkeypatch.setattr(reference, "COPY_BYTES", run * 3 * 4 * 2 * 2 * 64)
    assert_rows(reference.score_pages, arguments, reduce)


@by_reduce
@pytest.mark.parametrize("stored", [torch.float32, BF16, FP8], ids=str)
def test_the_reference_reads_consecutive_pages_in_place(reduce, stored, guards, monkeypatch):
    """One row in runs of 4 pages: ids may go back, leave one out, or jump between two runs."""
    apart = [[10, 9, 11, 12], [16, 15, 14, 13], [17, 18, 20, 21]]
    order = [*range(1, 9), *apart[0], *apart[1], *apart[2], *range(22, 26), 19]
    dtype = BF16 if stored == FP8 else stored
    arguments = batch(guards, [25], 2, 3, 64, dtype, stored, order=order)
    monkeypatch.setattr(reference, "COPY_BYTES", 4 * 4 * 2 * 2 * 64)
    gathered, gather = [], reference._rows_of
    monkeypatch.setattr(
        reference, "_rows_of", lambda d, pages: gathered.append(pages.tolist()) or gather(d, pages)
    )
    assert_rows(reference.score_pages, arguments, reduce)
    assert gathered == [*apart, [19, 0]]


@by_implementation
@by_reduce
@pytest.mark.parametrize("ratio", [1, 4], ids="gqa{}".format)
@pytest.mark.parametrize("groups", [2, 4], ids="groups{}".format)
def test_each_lane_reads_its_own_digests_only(score, reduce, ratio, groups, guards):
    """Lane-minor rows over ``group * stride + page``; all digests nobody asked for are NaN."""
    counts = [count for count in (9, 12) for _ in range(groups)]
    arguments = batch(guards, counts, 4 // groups, ratio, 64, FP32, FP32, groups=groups)
    assert_rows(score, arguments, reduce)


@by_implementation
def test_only_competing_pages_share_the_softmax(score, guards):
    """A sink's huge score would otherwise flatten all others to zero."""
    rule = SelectionRule(budget=3, must=1, sinks=1, window=1)
    arguments = batch(guards, [1500], 1, 2, 16, FP32, FP32, rule)
    arguments[1].view(torch.float32)[arguments[3][0, 0]] = 1e4
    guards.refreeze()
    shares = assert_rows(score, arguments, "softmax-mean")[0, 1:-2]
    assert shares.sum().item() == pytest.approx(1.0, abs=gamma(1500)), "shares add up to one"


@by_implementation
@by_reduce
def test_ids_and_counts_may_be_64_bits_wide(score, reduce, guards):
    arguments = list(batch(guards, [9, 30], 2, 2, 64, FP32, FP32))
    narrow = score(*arguments, reduce, SCALING)
    arguments[3:5] = arguments[3].long(), arguments[4].long()
    wide = score(*arguments, reduce, SCALING)
    assert torch.equal(narrow[0, 2:7], wide[0, 2:7])
    assert torch.equal(narrow[1, 2:28], wide[1, 2:28])


@by_implementation
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.sampled_from([16, 32, 64]))
def test_a_cuboid_max_score_bounds_every_key_of_its_page_for_every_head(
    score, seed, dtype, page_size
):
    """Each head alone: score >= q.k for all keys of the page, up to the roundings of the score."""
    pages, kv_heads, ratio, dim = 2, 2, 2, 64
    keys = normal(pages, page_size, kv_heads, dim, dtype=dtype, seed=seed)
    query = normal(kv_heads * ratio, dim, dtype=dtype, seed=seed + 1)
    digests = build_digests(keys, "cuboid-max")
    for head, q in enumerate(float64(query)):
        own = slice(head // ratio, head // ratio + 1)
        scores = score(
            query[head].view(1, 1, dim), digests[:, :, own].contiguous(), torch.tensor([0, -1]),
            torch.tensor([[0, 1, 0]]), torch.tensor([3]), ALL, "max", SCALING,
        )  # fmt: skip
        limit = tolerance(q[None], float64(digests[:, :, own]), "max")
        true = float64(keys[:, :, head // ratio]) @ q
        assert (float64(scores)[0, :2] + limit >= true.max(1)).all()


def test_kernel_and_reference_are_called_alike():
    """The API hands the same positional arguments to whichever serves the device."""
    assert inspect.signature(kernel.score_pages) == inspect.signature(reference.score_pages)


# -- bad input -------------------------------------------------------------------------------


def good() -> dict:
    return {
        "query": normal(2, 4, 64), "digests": random_digests(5, 2, 64),
        "frame_of": torch.zeros(5, dtype=torch.int32),
        "lane_pages": torch.ones(2, 9, dtype=torch.int32),
        "page_counts": torch.tensor([9, 0], dtype=torch.int32),
        "rule": RULE, "head_reduce": "mean", "scaling": SCALING,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("head_reduce", "min", "head_reduce 'min'.*softmax-mean"),
        ("rule", RULE._replace(must=3), "^rule must have 0 <= must <= budget - sinks - window"),
        ("rule", RULE._replace(window=0), "^rule must have .*window >= 1"),
        ("rule", RULE._replace(recall_cap=-1), "^rule.recall_cap must not be negative"),
        ("query", normal(4, 64), r"^query must have shape \(any, any, any\)"),
        ("query", normal(0, 4, 64), r"^query must have at least one row, got shape \(0, 4, 64\)"),
        ("query", normal(2, 3, 64), "^query has 3 heads, which do not divide over 2 KV heads"),
        ("query", normal(2, 64, 4).transpose(1, 2), "^query must be contiguous"),
        ("query", torch.ones(2, 4, 64).int(), "^query must be .*float32"),
        ("digests", random_digests(5, 2, 32), r"^digests must have shape \(any, 2, any, 64\)"),
        ("digests", random_digests(9, 2, 64)[::2], "^digests must be contiguous"),
        ("digests", random_digests(5, 2, 64).half(), "^digests must be torch.float32 or .*e4m3fn"),
        ("frame_of", torch.zeros(4).int(), r"^frame_of must have shape \(5\)"),
        ("frame_of", torch.zeros(5), "^frame_of must be .*int32"),
        ("lane_pages", torch.ones(3, 9).int(), r"^lane_pages must have shape \(2, any\)"),
        ("lane_pages", torch.ones(2, 9), "^lane_pages must be .*int32"),
        ("lane_pages", torch.ones(9, 2).int().T, "^lane_pages must be contiguous in its last"),
        ("page_counts", torch.ones(3).int(), r"^page_counts must have shape \(2\)"),
        ("page_counts", torch.ones(2), "^page_counts must be .*int32"),
        ("page_counts", torch.ones(4).int()[::2], "^page_counts must be contiguous"),
        *(
            (name, good()[name].to("meta"), f"^{name} must be on cpu, got meta")
            for name in ("digests", "frame_of", "lane_pages", "page_counts")
        ),
    ],
)
def test_bad_input_is_refused_by_name(name, wrong, message):
    """A wrong argument is named, with what would be right."""
    with pytest.raises(ValueError, match=message):
        score_pages(**{**good(), name: wrong})


def test_ids_out_of_range_are_refused_in_debug_mode_alone(monkeypatch):
    """Looking at ids would stall the device; what stands beyond a row's end is nobody's id."""
    arguments = good()
    arguments["lane_pages"][1] = GARBAGE
    monkeypatch.setattr(checks, "DEBUG", True)
    score_pages(**arguments)
    arguments["page_counts"][1] = 10
    with pytest.raises(ValueError, match=r"^page_counts must hold ids from 0 to 9, got 9 to 10"):
        score_pages(**arguments)
    arguments["page_counts"][1], arguments["lane_pages"][0, 3] = 0, 5
    with pytest.raises(ValueError, match=r"^lane_pages must hold ids from 0 to 4, got 0 to 5"):
        score_pages(**arguments)
    monkeypatch.setattr(checks, "DEBUG", False)
    arguments["lane_pages"][0, 3], arguments["page_counts"][0] = 4, -1
    score_pages(**arguments)
