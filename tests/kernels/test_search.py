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
from fp4conv.kernels.scales import SMALL_TENSOR_SCALE

MANY = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def tensor_scale_for(values: F32, ratio: float) -> float:
    """A tensor scale that puts amax / 6 of a block near `ratio`, wherever in E4M3's range that is."""
    return float(np.float32(np.clip(float(np.abs(values).max()) / 6 / ratio, 2.0**-139, 2.0**118)))


@pytest.mark.parametrize("ties", list(Ties))
@MANY
@given(block_values(16), st.sampled_from([2.0**-9, 0.003, 0.01, 2.0**-6, 0.02, 0.03, 0.1, 1.0, 17.0, 448.0, 2000.0]))
def test_nvfp4_search_equals_brute_force(ties: Ties, values: F32, ratio: float) -> None:
    """From block scales below E4M3's subnormals to ones that clip even at 448."""
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
