"""The digest op against the formulas in float64, and the laws every digest obeys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arkvale_kernels.digest import DIGEST_KINDS, build_digests
from arkvale_kernels.digest.reference import sphere_digests, sphere_scores
from support import oracle
from support.numeric import DTYPES, float64, gamma, normal, same_bits, unit

SHAPES = {
    "1page-16tokens-1head-dim64": (1, 16, 1, 64),
    "3pages-16tokens-2heads-dim96": (3, 16, 2, 96),
    "2pages-32tokens-8heads-dim128": (2, 32, 8, 128),
    "5pages-64tokens-1head-dim256": (5, 64, 1, 256),
    "7pages-16tokens-3heads-dim17": (7, 16, 3, 17),
}
by_kind = pytest.mark.parametrize("kind", DIGEST_KINDS)
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def offset_keys(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Keys as models have them: some channels lie far from zero."""
    return normal(*shape, dtype=dtype) + 4 * normal(shape[-1], dtype=dtype, seed=1)


def tolerance(keys: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bound on the error of a digest, per page, head and channel.

    No intermediate (centre, deviation, radius, result) exceeds 2M, M being the channel's largest
    absolute key.  A mean or a standard deviation of n terms costs n float32 roundings, centre,
    deviation, division and result one each; the result is rounded once more to ``dtype``, by half
    its spacing where it is subnormal.
    """
    largest = 2 * np.abs(keys).max(1)[:, None]
    return (
        largest * (gamma(keys.shape[1] + 4) + unit(dtype)) + unit(dtype) * torch.finfo(dtype).tiny
    )


@by_kind
@by_shape
@by_dtype
def test_digests_match_the_formula(kind, shape, dtype):
    """Every element is within the roundings of the op; the keys stay as they were."""
    keys = offset_keys(shape, dtype)
    before = keys.clone()
    digests = build_digests(keys, kind)
    assert digests.dtype == dtype and same_bits(keys, before)
    truth = float64(keys)
    error = np.abs(float64(digests) - oracle.digests(truth, kind))
    assert (error <= tolerance(truth, dtype)).all()


@by_dtype
def test_cuboid_max_is_exactly_the_largest_and_the_smallest_key(dtype):
    """No rounding at all, else the digest would not bound scores from above."""
    keys = offset_keys((4, 16, 2, 96), dtype)
    upper, lower = build_digests(keys, "cuboid-max").unbind(1)
    np.testing.assert_array_equal(float64(upper), float64(keys).max(1))
    np.testing.assert_array_equal(float64(lower), float64(keys).min(1))


@pytest.mark.parametrize("kind", [kind for kind in DIGEST_KINDS if kind.startswith("cuboid")])
@by_dtype
def test_a_page_of_equal_keys_has_a_digest_without_width(kind, dtype):
    """Both vectors are the key itself, whatever the kind of box."""
    key = normal(2, 1, 3, 64, dtype=dtype)
    upper, lower = build_digests(key.expand(2, 32, 3, 64), kind).unbind(1)
    assert torch.equal(upper, key[:, 0]) and torch.equal(lower, key[:, 0])


@by_kind
def test_digests_do_not_depend_on_the_memory_layout(kind):
    """Prefill hands over transposed views of the chunk."""
    keys = normal(3, 2, 16, 96).transpose(1, 2)
    assert torch.equal(build_digests(keys, kind), build_digests(keys.contiguous(), kind))


@by_kind
@pytest.mark.filterwarnings("ignore:std")
def test_no_pages_give_no_digests(kind):
    """A pass that seals nothing is no special case for the caller."""
    assert build_digests(torch.zeros(0, 16, 2, 64), kind).shape == (0, 2, 2, 64)


def arrays(dtype: torch.dtype, *shape: int) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of finite numbers, subnormal and huge ones included, whose sums do not overflow."""
    limit = 2.0**14 if dtype == torch.float16 else 2.0**100
    elements = st.floats(-limit, limit, width=32)
    return hnp.arrays(np.float32, shape, elements=elements).map(lambda a: torch.tensor(a).to(dtype))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(DIGEST_KINDS), st.sampled_from(DTYPES))
def test_the_upper_vector_is_never_below_the_lower(data, kind, dtype):
    """The score formula relies on it in every channel."""
    upper, lower = build_digests(data.draw(arrays(dtype, 2, 16, 1, 4)), kind).unbind(1)
    assert (upper >= lower).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(DTYPES))
def test_cuboid_max_bounds_the_product_with_every_key_in_every_channel(data, dtype):
    """``max(q*u, q*l) >= q*k`` term by term, hence the sum over channels of every head.

    Products of two float32 are exact in float64, so there is no tolerance.
    """
    keys = data.draw(arrays(dtype, 2, 16, 2, 4))
    query = float64(data.draw(arrays(dtype, 2, 4)))
    upper, lower = np.moveaxis(float64(build_digests(keys, "cuboid-max")), 1, 0)
    most = np.maximum(query * upper, query * lower)
    assert (most[:, None] >= query * float64(keys)).all()


@pytest.mark.parametrize("kind", ["sphere-max", "sphere-center", "sphere-mean"])
def test_sphere_digests_match_the_formula(kind):
    """The paper's other family: the centre of the box and one radius per head.

    A distance is the root of a float32 sum of ``dim`` squares, a mean of them adds ``page_size``.
    """
    keys = normal(3, 16, 2, 64)
    center, radius = (float64(part) for part in sphere_digests(keys, kind))
    truth = float64(keys)
    middle = (truth.max(1) + truth.min(1)) / 2
    away = np.sqrt(((truth - middle[:, None]) ** 2).sum(-1))
    expected = {
        "sphere-max": away.max(1),
        "sphere-center": (away.max(1) + away.min(1)) / 2,
        "sphere-mean": away.mean(1),
    }[kind]
    np.testing.assert_allclose(center, middle, rtol=0, atol=gamma(1) * np.abs(truth).max())
    np.testing.assert_allclose(radius, expected, rtol=gamma(64 + 16 + 4), atol=0)


def test_sphere_max_bounds_every_score_from_above():
    """``q.c + r|q| >= q.k`` up to the float32 roundings of a dot product and a norm."""
    keys, query = normal(5, 16, 2, 64), normal(2, 64, seed=1)
    most = float64(sphere_scores(query, *sphere_digests(keys, "sphere-max")))
    true = np.einsum("hd,pthd->pth", float64(query), float64(keys))
    size = np.linalg.norm(float64(query), axis=-1) * np.linalg.norm(float64(keys), axis=-1).max()
    assert (most[:, None] + gamma(3 * 64) * size >= true).all()


def test_unknown_kinds_and_flat_keys_are_refused_by_name():
    """A wrong argument is named, with what would be right."""
    with pytest.raises(ValueError, match=r"'sphere'.*cuboid-mean"):
        build_digests(torch.zeros(1, 16, 2, 64), "sphere")
    with pytest.raises(ValueError, match="keys must have shape"):
        build_digests(torch.zeros(16, 2, 64), "cuboid-max")
    with pytest.raises(ValueError, match=r"'cuboid-max'.*sphere-max"):
        sphere_digests(torch.zeros(1, 16, 2, 64), "cuboid-max")
