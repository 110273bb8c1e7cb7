"""Low-rank sums: the compiled kernels against the oracle, bit for bit, and the oracle against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4conv.kernels import merge, merge_reference

F32 = np.float32
DTYPES = ("F32", "BF16", "F16")


def bits(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.ascontiguousarray(values).view(np.int32)


def wild(rng: np.random.Generator, *shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """F32 values of every size, zeros of both signs among them."""
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 6, shape)
    values[rng.random(shape) < 0.1] = 0.0
    signed: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = (values * rng.choice([-1.0, 1.0], shape)).astype(F32)
    return signed


@settings(deadline=None)  # the first call compiles
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(1, 5),
    width=st.sampled_from([1, 63, 64, 65, 2047, 2049, 4200]),
    rank=st.integers(1, 11),
    delta_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    from_bf16=st.booleans(),
)
def test_sums_are_those_of_the_oracle(
    *, seed: int, height: int, width: int, rank: int, delta_dtype: str, dtype: str, from_bf16: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = wild(rng, height, width)
    source = x.astype(ml_dtypes.bfloat16).view(np.uint16) if from_bf16 else x
    left, right = wild(rng, rank, height + 3)[:, 2 : 2 + height], wild(rng, rank, width + 1)[:, 1:]
    ours, theirs = np.full(x.shape, np.nan, F32), np.full(x.shape, np.nan, F32)
    merge.add_product(source, left, right, 0.37, ours, delta_dtype=delta_dtype, dtype=dtype)
    merge_reference.add_product(source, left, right, 0.37, theirs, delta_dtype=delta_dtype, dtype=dtype)
    assert np.array_equal(bits(ours), bits(theirs))
    again = x.copy()
    if not from_bf16:
        merge.add_product(again, left, right, 0.37, again, delta_dtype=delta_dtype, dtype=dtype)
        assert np.array_equal(bits(again), bits(theirs)), "in place"


@settings(deadline=None)  # the first call compiles
@given(seed=st.integers(0, 2**32), n=st.integers(1, 6), k=st.sampled_from([1, 63, 64, 129, 2100]), kn=st.booleans())
def test_sizes_and_scaled_rows_are_those_of_the_oracle(seed: int, n: int, k: int, kn: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (k, n) if kn else (n, k)
    x, after = wild(rng, *shape), wild(rng, *shape)
    ours, theirs = np.empty((2, n)), np.empty((2, n))
    merge.change_sums(x, after, kn, ours[0], ours[1])
    merge_reference.change_sums(x, after, kn, theirs[0], theirs[1])
    assert np.array_equal(ours, theirs)
    assert np.array_equal(merge.square_sums(x, kn), ours[1])
    for dtype in DTYPES:
        factors = wild(rng, n)
        one, other = x.copy(), x.copy()
        merge.scale_rows(one, factors, kn, dtype)
        merge_reference.scale_rows(other, factors, kn, dtype)
        assert np.array_equal(bits(one), bits(other))


def test_a_sum_runs_along_the_rank_from_the_first_to_the_last() -> None:
    """2^24 + 1 + 1 in F32: one by one each 1 is lost; in any other order they count."""
    left, right = np.ones((3, 1), F32), np.array([[2**24], [1], [1]], F32)
    out = np.empty((1, 1), F32)
    merge.add_product(np.zeros((1, 1), F32), left, right, 1.0, out)
    assert out[0, 0] == 2**24
    merge.add_product(np.zeros((1, 1), F32), left, right[::-1].copy(), 1.0, out)
    assert out[0, 0] == 2**24 + 2


def test_a_product_and_its_sum_are_rounded_once() -> None:
    """(1 + 2^-12)^2 - 1 has the bit 2^-24, which the product alone would lose beside 1."""
    small = F32(1 + 2.0**-12)
    out = np.empty((1, 1), F32)
    left, right = np.array([[1], [small]], F32), np.array([[-1], [small]], F32)
    merge.add_product(np.zeros((1, 1), F32), left, right, 1.0, out)
    assert Fraction(float(out[0, 0])) == Fraction(float(small)) ** 2 - 1


@given(st.integers(0, 2**32))
def test_the_oracles_fused_sum_is_the_exact_one_rounded_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = wild(rng, 50), wild(rng, 50)
    c = np.where(rng.random(50) < 0.5, -(a * b), wild(rng, 50)).astype(F32)  # often nearly cancelling
    for values in zip(a, b, c, merge_reference.fma(a, b, c), strict=True):
        exact = Fraction(float(values[0])) * Fraction(float(values[1])) + Fraction(float(values[2]))
        error = abs(Fraction(float(values[3])) - exact)
        for other in (np.nextafter(values[3], F32(np.inf)), np.nextafter(values[3], F32(-np.inf))):
            assert error <= abs(Fraction(float(other)) - exact)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_is_numpys_for_every_pattern_of_the_leading_bits(dtype: str) -> None:
    """All 2^16 leading halves of a float32 with the lower halves that decide: below, at and above a tie."""
    leading = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (leading[:, None] | lower[None]).view(F32)
    values = values[np.isfinite(values)][None]
    ours, theirs = np.empty_like(values), np.empty_like(values)
    none = np.zeros((1, 1), F32), np.zeros((1, values.shape[1]), F32)
    with np.errstate(over="ignore"):
        merge.add_product(values, *none, 1.0, ours, dtype=dtype)
        merge_reference.add_product(values, *none, 1.0, theirs, dtype=dtype)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype: str) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 3e38]], F32)
    nan_with_payload = np.array([[0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF]], np.uint32).view(F32)
    for x in (values, nan_with_payload):
        out = np.empty_like(x)
        with np.errstate(over="ignore", invalid="ignore"):
            merge.add_product(x, np.zeros((1, 1), F32), np.zeros((1, x.shape[1]), F32), 1.0, out, dtype=dtype)
        finite = np.isfinite(x) & (dtype != "F16")
        assert np.array_equal(np.isfinite(out), finite)
        assert np.array_equal(np.isnan(out), np.isnan(x))
        change, before = np.empty((2, 1))
        merge.change_sums(x, out, False, change, before)
        assert not np.isfinite(change[0])
