"""Kernels that measure: bit-equal to their oracle, and right by plain NumPy float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import matrices, normal, to_bf16

from fp4conv.formats import E2M1_MAGNITUDES
from fp4conv.kernels import measure, measure_reference, small_floats
from fp4conv.kernels.measure import BlockCounts

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def spoiled(shape: tuple[int, int], seed: int) -> tuple[F32, F32]:
    """Two matrices a tenth apart, with equal values, zeros of both signs, NaN and Inf on one side or both."""
    rng = np.random.default_rng(seed)
    y = normal(shape, seed, spread=8)
    x = (y * (1 + 0.1 * rng.standard_normal(shape))).astype(np.float32)
    for side in (x, y):
        for value in (np.nan, np.inf, -np.inf, 0.0, -0.0):
            side[rng.random(shape) < 0.01] = value
    same = rng.random(shape) < 0.1
    x[same] = y[same]
    return x, y


SHAPES = [(1, 1), (3, 7), (5, 64), (2, 65), (2, 1100), (4, 4096), (1100, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kn", [False, True])
@pytest.mark.parametrize("bf16", [(False, False), (True, False), (False, True), (True, True)])
def test_compare_is_bit_equal_to_its_oracle(shape: tuple[int, int], kn: bool, bf16: tuple[bool, bool]) -> None:
    x, y = (to_bf16(side) if narrow else side for side, narrow in zip(spoiled(shape, 1), bf16, strict=True))
    n = shape[1] if kn else shape[0]
    ours, theirs = np.full((4, n), np.nan), np.full((4, n), np.nan)
    assert measure.compare(x, y, kn, ours) == measure_reference.compare(x, y, kn, theirs)
    assert ours.tobytes() == theirs.tobytes()


@settings(max_examples=60, deadline=None)
@given(matrices(32), st.randoms(use_true_random=False))
def test_compare_withstands_any_values(y: F32, random: object) -> None:
    x = np.roll(y, 1, axis=1)
    ours, theirs = np.empty((4, len(y))), np.empty((4, len(y)))
    assert measure.compare(x, y, False, ours) == measure_reference.compare(x, y, False, theirs)
    assert ours.tobytes() == theirs.tobytes()


def test_compare_gives_the_figures_of_plain_float64() -> None:
    x, y = spoiled((40, 700), 2)
    sums = np.empty((4, 40))
    differ, left_out, odd, largest, relative = measure.compare(x, y, False, sums)
    good = np.isfinite(x) & np.isfinite(y)
    a, b = np.where(good, x, 0).astype(np.float64), np.where(good, y, 0).astype(np.float64)
    assert left_out == (~good).sum() > 0
    assert differ == (~((x == y) | (np.isnan(x) & np.isnan(y)))).sum()
    assert odd == (~((x == y) | (np.isnan(x) & np.isnan(y))) & ~good).sum()
    assert largest == np.abs(a - b).max()
    assert relative == (np.abs(a - b)[b != 0] / np.abs(b[b != 0])).max()
    for got, terms in zip(sums, (b * b, (a - b) ** 2, a * b, a * a), strict=True):
        assert got == pytest.approx(terms.sum(axis=1), rel=1e-12)


def test_zeros_of_both_signs_and_nans_are_equal() -> None:
    x = np.array([[0.0, -0.0, np.nan, np.inf, 1.0]], np.float32)
    y = np.array([[-0.0, 0.0, -np.nan, np.inf, 1.0]], np.float32)
    assert measure.compare(x, y, False, np.empty((4, 1)))[:3] == (0, 2, 0)
    y[0, 3] = -np.inf
    assert measure.compare(x, y, False, np.empty((4, 1)))[:3] == (1, 2, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_survey_is_equal_to_its_oracle(shape: tuple[int, int]) -> None:
    x, _ = spoiled(shape, 3)
    for values in (x, to_bf16(x), np.full(shape, np.nan, np.float32), np.full(shape, -0.0, np.float32)):
        ours = measure.survey(values)
        assert ours == measure_reference.survey(values)
        assert str(ours[0]) != "-0.0"
    assert measure.survey(np.empty(0, np.float32)) == (np.inf, -np.inf, 0, 0)


@pytest.mark.parametrize("length", [16, 32])
@pytest.mark.parametrize("kn", [False, True])
def test_count_blocks_is_equal_to_its_oracle(length: int, kn: bool) -> None:
    rng = np.random.default_rng(4)
    packed: U8 = rng.integers(0, 256, (70, 4 * length), dtype=np.uint8)
    packed[:30] &= rng.integers(0, 256, (30, 1), dtype=np.uint8)  # rows of small codes
    scales: U8 = rng.integers(0, 256, (70, 8), dtype=np.uint8)
    if kn:
        packed, scales = np.ascontiguousarray(packed.T), np.ascontiguousarray(scales.T)
    special = rng.random(256) < 0.3
    ours, theirs = BlockCounts.none(), BlockCounts.none()
    for kernels, counts in ((measure, ours), (measure_reference, theirs)):
        for _ in range(2):
            kernels.count_blocks(packed, scales, kn, special, counts)
    for name, found, expected in zip(BlockCounts._fields, ours, theirs, strict=True):
        assert np.array_equal(found, expected), name
    assert ours.magnitudes.sum() == 2 * scales.size


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tensor_scale", [1.0, 2.0**-130, 3e-5, 2.0**120, float("nan"), 0.0])
def test_block_values_are_those_of_ml_dtypes(tensor_scale: float, inverse: bool) -> None:
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.array([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)], np.float32)
    with np.errstate(all="ignore"):
        factors = scales / np.float32(tensor_scale) if inverse else scales * np.float32(tensor_scale)
        expected = factors[:, None] * codes
    found = measure.block_values(small_floats.block_factors("nvfp4", tensor_scale, inverse=inverse))
    assert np.array_equal(found, expected, equal_nan=True)
    odd = ~(np.isfinite(expected[:, 1:8]) & (expected[:, 1:8] > 0)).all(axis=1)
    assert np.array_equal(measure.special_scales(found), odd)


def test_block_values_of_mxfp4_are_those_of_ml_dtypes() -> None:
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    found = measure.block_values(small_floats.block_factors("mxfp4", 1.0, inverse=False))
    with np.errstate(over="ignore"):
        assert np.array_equal(found[:, :8], (scales[:, None] * E2M1_MAGNITUDES).astype(np.float32), equal_nan=True)
    assert np.flatnonzero(measure.special_scales(found)).tolist() == [253, 254, 255]
