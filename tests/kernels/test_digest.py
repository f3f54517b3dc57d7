"""The digest op against the formulas in float64, and the laws every digest obeys."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arkvale_kernels.digest import DIGEST_KINDS, build_digests, kernel, reference
from arkvale_kernels.digest.reference import sphere_digests, sphere_scores
from support import oracle
from support.numeric import DTYPES, float64, gamma, normal, unit

FP8 = torch.float8_e4m3fn
SHAPES = {
    "1page-16tokens-1head-dim64": (1, 16, 1, 64),
    "3pages-16tokens-2heads-dim96": (3, 16, 2, 96),
    "2pages-32tokens-8heads-dim128": (2, 32, 8, 128),
    "3pages-64tokens-1head-dim256": (3, 64, 1, 256),
    "7pages-16tokens-3heads-dim17": (7, 16, 3, 17),
}
IMPLEMENTATIONS = {"reference": reference.build_digests, "kernel": kernel.build_digests}
by_implementation = pytest.mark.parametrize(
    "build", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys()
)
by_kind = pytest.mark.parametrize("kind", DIGEST_KINDS)
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
many_examples = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def offset_keys(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Keys as models have them: some channels lie far from zero."""
    return normal(*shape, dtype=dtype) + 4 * normal(shape[-1], dtype=dtype, seed=1)


@functools.cache
def expected_digests(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> np.ndarray:
    return oracle.digests(float64(offset_keys(shape, dtype)), kind)


def tolerance(keys: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bound on the error of a digest, per page, head and channel.

    No intermediate (centre, deviation, radius, result) exceeds 2M, M being the channel's largest
    absolute key.  A mean or a standard deviation of n terms costs n float32 roundings, centre,
    deviation, division and result one each; the result is rounded once more to ``dtype``, by half
    its spacing where it is subnormal.
    """
    largest = 2 * np.abs(keys).max(1)[:, None]
    rounding = torch.finfo(dtype)
    half = rounding.eps / 2
    return largest * (gamma(keys.shape[1] + 4) + half) + half * rounding.tiny


@by_implementation
@by_kind
@by_shape
@by_dtype
def test_digests_match_the_formula(build, kind, shape, dtype, guards):
    """Every element is within the roundings of the op; the keys stay as they were."""
    keys = guards.hold(offset_keys(shape, dtype), frozen=True)
    digests = build(keys, kind, dtype)
    assert digests.dtype == dtype and digests.shape == (shape[0], 2, *shape[2:])
    truth = float64(keys)
    error = np.abs(float64(digests) - expected_digests(shape, dtype, kind))
    assert (error <= tolerance(truth, dtype)).all()


@by_implementation
@by_kind
@by_shape
def test_8_bit_digests_are_the_formula_rounded_to_4_bits(build, kind, shape, guards):
    keys = guards.hold(offset_keys(shape, torch.bfloat16), frozen=True)
    digests = build(keys, kind, FP8)
    assert digests.dtype == FP8
    truth = float64(keys)
    error = np.abs(float64(digests.float()) - expected_digests(shape, torch.bfloat16, kind))
    assert (error <= tolerance(truth, FP8)).all()


@by_implementation
def test_8_bit_digests_of_huge_keys_saturate_and_of_tiny_ones_are_subnormal(build, guards):
    """Never NaN, which is what a plain cast makes of values beyond 448."""
    scale = torch.tensor([1e-4, 4e-3, 1e-2, 500.0, 1e6, 3e38]).repeat_interleave(16)
    keys = guards.hold(normal(2, 16, 1, 96) * scale / 4, frozen=True)
    digests = build(keys, "cuboid-max", FP8).float()
    expected = torch.stack((keys.amax(1), keys.amin(1)), 1).clamp(-448, 448).to(FP8).float()
    assert torch.equal(digests, expected)
    assert (digests.abs() == 448).any() and (digests.abs() < 2**-6).any()


@by_implementation
@by_dtype
def test_cuboid_max_is_exactly_the_largest_and_the_smallest_key(build, dtype, guards):
    """No rounding at all, else the digest would not bound scores from above."""
    keys = guards.hold(offset_keys((4, 16, 2, 96), dtype), frozen=True)
    upper, lower = build(keys, "cuboid-max", dtype).unbind(1)
    np.testing.assert_array_equal(float64(upper), float64(keys).max(1))
    np.testing.assert_array_equal(float64(lower), float64(keys).min(1))


@by_implementation
@pytest.mark.parametrize("kind", [kind for kind in DIGEST_KINDS if kind.startswith("cuboid")])
@by_dtype
def test_a_page_of_equal_keys_has_a_digest_without_width(build, kind, dtype, guards):
    """Both vectors are the key itself, whatever the kind of box."""
    key = normal(2, 1, 3, 64, dtype=dtype)
    upper, lower = build(key.expand(2, 32, 3, 64).contiguous(), kind, dtype).unbind(1)
    assert torch.equal(upper, key[:, 0]) and torch.equal(lower, key[:, 0])


@by_implementation
@by_kind
@pytest.mark.filterwarnings("ignore:std")
def test_no_pages_give_no_digests(build, kind, guards):
    """A pass that seals nothing is no special case for the caller."""
    assert build(torch.zeros(0, 16, 2, 64), kind, torch.float32).shape == (0, 2, 2, 64)


def arrays(dtype: torch.dtype, *shape: int) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of finite numbers, subnormal and huge ones included, whose sums do not overflow."""
    limit = 2.0**14 if dtype == torch.float16 else 2.0**100
    elements = st.floats(-limit, limit, width=32)
    return hnp.arrays(np.float32, shape, elements=elements).map(lambda a: torch.tensor(a).to(dtype))


@by_implementation
@many_examples
@given(st.data(), st.sampled_from(DIGEST_KINDS), st.sampled_from(DTYPES), st.booleans())
def test_the_upper_vector_is_never_below_the_lower(build, data, kind, dtype, in_8_bits):
    """The score formula relies on it in every channel."""
    keys = data.draw(arrays(dtype, 2, 16, 1, 4))
    upper, lower = build(keys, kind, FP8 if in_8_bits else dtype).float().unbind(1)
    assert (upper >= lower).all()


@by_implementation
@many_examples
@given(st.data(), st.sampled_from(DTYPES))
def test_cuboid_max_bounds_the_product_with_every_key_in_every_channel(build, data, dtype):
    """``max(q*u, q*l) >= q*k`` term by term, hence the sum over channels of every head.

    Products of two float32 are exact in float64, so there is no tolerance.
    """
    keys = data.draw(arrays(dtype, 2, 16, 2, 4))
    query = float64(data.draw(arrays(dtype, 2, 4)))
    upper, lower = np.moveaxis(float64(build(keys, "cuboid-max", dtype)), 1, 0)
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


def test_the_api_digests_in_the_dtype_of_the_keys_unless_told_otherwise():
    keys = normal(2, 16, 2, 64, dtype=torch.bfloat16)
    assert build_digests(keys, "cuboid-mean").dtype == torch.bfloat16
    assert build_digests(keys, "cuboid-mean", FP8).dtype == FP8
    assert unit(torch.bfloat16) < torch.finfo(FP8).eps / 2


def test_kernel_and_reference_are_called_alike():
    """The API hands the same positional arguments to whichever serves the device."""
    assert inspect.signature(kernel.build_digests) == inspect.signature(reference.build_digests)


KEYS = torch.zeros(1, 16, 2, 64)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((KEYS, "sphere"), r"'sphere'.*cuboid-mean"),
        ((KEYS[0], "cuboid-max"), r"^keys must have shape \(any, any, any, any\)"),
        ((KEYS[:, :0], "cuboid-max"), "^keys must hold at least one token"),
        ((KEYS.transpose(1, 2), "cuboid-max"), "^keys must be contiguous with shape"),
        ((KEYS.int(), "cuboid-max"), "^keys must be .*float32.*got torch.int32"),
        ((KEYS, "cuboid-max", torch.float16), "^dtype must be torch.float32 or .*e4m3fn"),
        ((KEYS, "cuboid-max", torch.float8_e5m2), "^dtype must be torch.float32 or .*e4m3fn"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    """A wrong argument is named, with what would be right."""
    with pytest.raises(ValueError, match=message):
        build_digests(*arguments)


def test_an_unknown_sphere_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'cuboid-max'.*sphere-max"):
        sphere_digests(KEYS, "cuboid-max")
