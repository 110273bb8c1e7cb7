"""The MSE rule: what the compiled search leaves out can never win. Brute force is the oracle's search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kernel_cases import F32, assert_same, block_values, encode, normal

from fp4conv.formats import MXFP4, NVFP4, ScaleRule, Ties
from fp4conv.kernels import compiled, reference, small_floats
from fp4conv.kernels.contract import MAX_TENSOR_SCALE
from fp4conv.kernels.lanes import LANES
from fp4conv.kernels.search import SMALL_TENSOR_SCALE, estimate

# amax / (6 x tensor scale): from far below E4M3's range, by all of it, to far above, where every scale clips.
RATIOS = [2.0**-60, 2.0**-16, 2.0**-9, 0.003, 0.01, 2.0**-6, 0.02, 0.03, 0.1, 1.0, 17.0, 448.0, 2e3, 2.0**21, 2.0**70]
MANY = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def tensor_scale_for(values: F32, ratio: float) -> float:
    """A tensor scale that puts amax / 6 of a block near `ratio`, wherever in E4M3's range that is."""
    return float(np.float32(np.clip(float(np.abs(values).max()) / 6 / ratio, 2.0**-139, 2.0**118)))


@pytest.mark.parametrize("ties", list(Ties))
@MANY
@given(block_values(16), st.sampled_from(RATIOS))
def test_nvfp4_search_equals_brute_force(ties: Ties, values: F32, ratio: float) -> None:
    scale = tensor_scale_for(values, ratio)
    x = values[None]
    found = encode(compiled, NVFP4, x, ScaleRule.MSE, ties, tensor_scale=scale)
    assert_same(found, encode(reference, NVFP4, x, ScaleRule.MSE, ties, tensor_scale=scale))


@pytest.mark.parametrize("ties", list(Ties))
@MANY
@given(block_values(32))
def test_mxfp4_search_equals_brute_force(ties: Ties, values: F32) -> None:
    x = values[None]
    assert_same(encode(compiled, MXFP4, x, ScaleRule.MSE, ties), encode(reference, MXFP4, x, ScaleRule.MSE, ties))


@pytest.mark.parametrize("size", [2.0**-60, 1.0, 2.0**60])
@pytest.mark.parametrize("ratio", [*RATIOS, 2.0**125])
def test_search_of_a_whole_tile_equals_brute_force(ratio: float, size: float) -> None:
    """More blocks than a tile has lanes, with different needs; the ratio is that of the largest."""
    x = normal((20, 64), seed=8, spread=6) * np.float32(size)
    scale = tensor_scale_for(x, ratio)
    found = encode(compiled, NVFP4, x, ScaleRule.MSE, tensor_scale=scale)
    assert_same(found, encode(reference, NVFP4, x, ScaleRule.MSE, tensor_scale=scale))


def test_near_ties_between_scales_are_decided_exactly() -> None:
    """Blocks enlarged until the best scale changes: on either side of that size two scales err alike to a few ulp."""
    scale, every = np.float32(0.0123), np.arange(1, 127, dtype=np.uint8)

    def best(block: F32) -> int:
        _, errors = reference._nv_quantise(np.broadcast_to(block, (126, 16)), every, scale, Ties.EVEN)
        return int(np.argmin(errors))

    blocks = []
    for block in np.random.default_rng(11).standard_normal((150, 16)).astype(np.float32):
        low, high = np.float32(1), np.float32(1.05)
        while best(block * high) == best(block):
            high *= np.float32(1.05)
        while (middle := np.float32((low + high) / 2)) not in (low, high):
            low, high = (middle, high) if best(block * middle) == best(block * low) else (low, middle)
        blocks += [block * low, block * high]
    x = np.array(blocks)
    found = encode(compiled, NVFP4, x, ScaleRule.MSE, tensor_scale=float(scale))
    assert_same(found, encode(reference, NVFP4, x, ScaleRule.MSE, tensor_scale=float(scale)))


@pytest.mark.parametrize("ties", list(Ties))
def test_search_of_ordinary_weights_equals_brute_force(ties: Ties) -> None:
    x = normal((64, 256), seed=7) * np.float32(0.02)
    scale = float(np.abs(x).max() / np.float32(2688))
    assert_same(
        encode(compiled, NVFP4, x, ScaleRule.MSE, ties, tensor_scale=scale),
        encode(reference, NVFP4, x, ScaleRule.MSE, ties, tensor_scale=scale),
    )
    assert_same(encode(compiled, MXFP4, x, ScaleRule.MSE, ties), encode(reference, MXFP4, x, ScaleRule.MSE, ties))


@MANY
@given(block_values(16), st.integers(16, 126), st.floats(0.05, 0.999))
def test_half_a_scale_is_never_worse_within_its_range(values: F32, code: int, fill: float) -> None:
    """The claim that lets the search start at amax / 3: amax <= 3s implies error(s / 2) <= error(s), ties to even."""
    amax, block_scale = float(np.abs(values).max()), float(small_floats.E4M3_VALUES[code])
    scale = np.float32(np.clip(amax / (3 * fill * block_scale), SMALL_TENSOR_SCALE, MAX_TENSOR_SCALE))
    whole, half = np.array([code], dtype=np.uint8), np.array([code - 8], dtype=np.uint8)
    assert small_floats.E4M3_VALUES[code - 8] * 2 == small_floats.E4M3_VALUES[code]
    assume(amax <= 3 * float(np.float32(scale * small_floats.E4M3_VALUES[code])))
    _, error = reference._nv_quantise(values[None], whole, scale, Ties.EVEN)
    _, half_error = reference._nv_quantise(values[None], half, scale, Ties.EVEN)
    assert half_error[0] <= error[0]


@MANY
@given(block_values(16), st.integers(1, 126), st.floats(-3.0, 3.0))
def test_estimate_is_as_near_as_its_use_needs(values: F32, code: int, fill: float) -> None:
    """Within 2^-18 of the sum of squares, wherever amax lies between 2^-3 and 2^3 of the scale's range."""
    amax = float(np.abs(values).max())
    assume(2.0**-90 < amax < 2.0**100)
    scale = np.float32(amax / 6 / float(small_floats.E4M3_VALUES[code]) * 2.0**fill)
    assume(SMALL_TENSOR_SCALE < scale < 2.0**30)
    factor = np.float32(2.0 ** (1 - np.frexp(amax)[1]))
    unit, estimates = np.zeros((16, LANES), dtype=np.float32), np.empty(LANES, dtype=np.float32)
    unit[:, 5] = np.abs(values) * factor
    product = np.float32(small_floats.E4M3_VALUES[code] * scale)
    estimate(unit, np.full(LANES, product * factor, dtype=np.float32), estimates)
    _, exact = reference._nv_quantise(values[None], np.array([code], dtype=np.uint8), scale, Ties.EVEN)
    squares = float((values.astype(np.float64) ** 2).sum())
    wrong_by = abs(float(estimates[5]) / float(factor) ** 2 - float(exact[0]))
    assert wrong_by <= 2.0**-18 * squares


def test_search_is_better_than_every_rule() -> None:
    x = normal((32, 256), seed=9)
    scale = float(np.abs(x).max() / np.float32(2688))
    best = encode(compiled, NVFP4, x, ScaleRule.MSE, tensor_scale=scale).noise
    for rule in (ScaleRule.AMAX, ScaleRule.FOUR_OVER_SIX):
        assert (best <= encode(compiled, NVFP4, x, rule, tensor_scale=scale).noise).all()
    best = encode(compiled, MXFP4, x, ScaleRule.MSE).noise
    for rule in (ScaleRule.FLOOR, ScaleRule.RCEIL, ScaleRule.EVEN):
        assert (best <= encode(compiled, MXFP4, x, rule).noise).all()


def test_block_that_no_scale_can_hold_takes_the_smallest() -> None:
    """Every scale gives zeros, so all err alike: 2^-9, the smallest."""
    x = np.full((1, 16), 1e-30, dtype=np.float32)
    found = encode(compiled, NVFP4, x, ScaleRule.MSE, tensor_scale=1.0)
    assert found.scales.tolist() == [[1]]
    assert not found.codes.any()
    assert_same(found, encode(reference, NVFP4, x, ScaleRule.MSE, tensor_scale=1.0))
