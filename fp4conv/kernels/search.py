"""The scale of the least squared error of each block, on tiles of lanes.

The result is that of brute force over every scale there is (`reference` does just that), in every bit: a scale is
left out only where it cannot win. Why it cannot is said at each place, and tested in tests/kernels/test_search.py.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np

from fp4conv.formats import E8M0_BIAS, Ties
from fp4conv.kernels.contract import F32, F64, U8
from fp4conv.kernels.jit import device, helper
from fp4conv.kernels.lanes import I32, LANES
from fp4conv.kernels.quantise import (
    TIES,
    nearest_e2m1,
    pow2,
    quantise_mx,
    quantise_nv,
    round_e2m1,
    squared_error,
)
from fp4conv.kernels.scales import RCEIL, e4m3_from_amax, e8m0_from_amax, scale_products
from fp4conv.kernels.small_floats import E4M3_ONE, E4M3_VALUES

SMALL_TENSOR_SCALE = 2.0**-100  # below it, halving a scale may round, which `search_e4m3` relies on
# Beyond these, blocks are searched without estimates.
_SMALL_AMAX, _LARGE_AMAX = np.float32(2.0**-90), np.float32(2.0**100)
_LARGE_TENSOR_SCALE, _LARGE_RATIO = np.float32(2.0**30), np.float32(2.0**20)
_TOP = 126  # the E4M3 code of 448
_E4M3 = E4M3_VALUES[:127].copy()
_EVEN = TIES[Ties.EVEN]
_ZERO, _ONE, _THREE, _SIX = (np.float32(v) for v in (0, 1, 3, 6))
# How far, relative to a block's sum of squares, the estimates of two scales may mislead: see `estimate`.
_SLACK = np.float32(2.0**-16)


@helper
def search_e8m0(values: F32, amax: I32, tie: np.float32, codes: U8, terms: F64, best: I32) -> None:
    """The scale byte of the least squared error of each lane, the smaller of equals.

    RCEIL's byte comes first: above it none is better, because every value of a scale 2s that is within the range
    of s is a value of s too. Below, the error of amax alone, once it is clipped, ends the search.
    """
    trial, tried, errors, least = _search_scratch()
    largest = amax.view(np.float32)
    e8m0_from_amax(amax, RCEIL, trial)
    best[:] = 0
    while True:
        active = 0
        for j in range(LANES):
            clipped = np.float64(largest[j]) - 6.0 * pow2(trial[j] - E8M0_BIAS)
            if clipped > 0 and clipped * clipped > least[j]:
                trial[j] = -1
            tried[j] = max(trial[j], 0)
            active += trial[j] >= 0
        if active == 0:
            return
        quantise_mx(values, tried, tie, codes, terms, errors)
        _keep_better(trial, 0, errors, least, best)


@device
def _search_scratch() -> tuple[I32, I32, F64, F64]:
    least = np.full(LANES, np.inf, np.float64)
    return np.empty(LANES, np.int32), np.empty(LANES, np.int32), np.empty(LANES, np.float64), least


@device
def _keep_better(trial: I32, lowest: int, errors: F64, least: F64, best: I32) -> None:
    """Note the lanes whose trial was no worse, which is the smaller scale; step every running lane down."""
    for j in range(LANES):
        if trial[j] >= lowest:
            if errors[j] <= least[j]:
                best[j], least[j] = trial[j], errors[j]
            trial[j] -= 1


@helper
def first_trials(amax: I32, tensor_scale: np.float32, from_top: bool, out: I32) -> None:
    """The E4M3 code from which each lane is searched downwards; 0 for lanes of zeros.

    A scale s with 3s >= amax is never better than s / 2, where that is an E4M3 number (codes above 15, and even
    codes), because every value of s up to 3s is a value of s / 2. One code above the rounded amax / 3 is at or beyond
    the first such s. `from_top` says that the argument does not hold: quotients that round onto a tie that then goes
    down, or scales that round when halved.
    """
    e4m3_from_amax(amax, np.float32(_THREE * tensor_scale), out)
    for j in range(LANES):
        start = _TOP if from_top else min(max(out[j] + 1, 15), _TOP)
        out[j] = 0 if amax[j] == 0 else start


@helper
def search_e4m3(
    values: F32, amax: I32, tensor_scale: np.float32, from_top: bool, tie: np.float32, codes: U8, terms: F64, best: I32
) -> None:
    """The E4M3 code 1..126 of the least squared error of each lane, the smaller of equals; 1.0 for zeros."""
    trial = np.empty(LANES, np.int32)
    first_trials(amax, tensor_scale, from_top, trial)
    if from_top or not _ordinary(amax, tensor_scale):
        every_trial(values, amax, tensor_scale, trial, tie, codes, terms, best)
    else:
        likely_trials(values, amax, tensor_scale, trial, terms, best)
    for j in range(LANES):
        if amax[j] == 0:
            best[j] = E4M3_ONE


@device
def _ordinary(amax: I32, tensor_scale: np.float32) -> bool:
    """Whether estimates in float32 are safe: no block or scale is so small or so large that they could leave it."""
    largest, ordinary = amax.view(np.float32), tensor_scale < _LARGE_TENSOR_SCALE
    limit = min(_LARGE_AMAX, np.float32(tensor_scale * _LARGE_RATIO))  # 2688 x tensor scale is what 448 x 6 can hold
    for j in range(LANES):
        ordinary &= largest[j] == _ZERO or (largest[j] > _SMALL_AMAX and largest[j] < limit)
    return bool(ordinary)


@helper
def every_trial(
    values: F32, amax: I32, tensor_scale: np.float32, trial: I32, tie: np.float32, codes: U8, terms: F64, best: I32
) -> None:
    """Compute the error of every scale downwards, until that of amax alone, once clipped, is beyond the least."""
    _, tried, errors, least = _search_scratch()
    scales, largest = np.empty(LANES, np.float32), amax.view(np.float32)
    best[:] = 1
    while True:
        active = 0
        for j in range(LANES):
            tried[j] = max(trial[j], 1)
            clipped = np.float64(largest[j]) - 6.0 * np.float64(np.float32(_E4M3[tried[j]] * tensor_scale))
            if clipped > 0 and clipped * clipped > least[j]:
                trial[j] = 0
            active += trial[j] > 0
        if active == 0:
            return
        scale_products(tried, tensor_scale, scales)
        quantise_nv(values, scales, tie, codes, terms, errors)
        _keep_better(trial, 1, errors, least, best)


@helper
def estimate(unit: F32, scales: F32, out: F32) -> None:
    """Squared errors in float32, from reciprocals, of unit [16, LANES] (|x| over a power of two, amax in [1, 2)).

    Against the exact error this is wrong by less than 2^-18 of the sum of squares: a quotient that is off by 2^-22
    lands on another code only next to a midpoint, where both codes err alike up to x^2 2^-20; product, difference and
    square add x^2 2^-21, and sixteen sums x^2 2^-20.
    """
    inverses = np.empty(LANES, np.float32)
    for j in range(LANES):
        inverses[j] = _ONE / scales[j]
        out[j] = _ZERO
    for i in range(0, 16, 2):
        row, other = unit[i], unit[i + 1]
        for j in range(LANES):
            a = row[j] - nearest_e2m1(row[j] * inverses[j])[0] * scales[j]
            b = other[j] - nearest_e2m1(other[j] * inverses[j])[0] * scales[j]
            out[j] += a * a + b * b


@helper
def to_unit(values: F32, amax: I32, unit: F32, squares: F32, factors: F32) -> None:
    """|x| times the power of two that takes amax to [1, 2), the sum of its squares, and that factor, of each lane."""
    for j in range(LANES):
        factors[j] = pow2(127 - (amax[j] >> 23)) if amax[j] != 0 else 1.0
        squares[j] = _ZERO
    for i in range(16):
        source, target = values[i], unit[i]
        for j in range(LANES):
            target[j] = abs(source[j]) * factors[j]
        for j in range(LANES):
            squares[j] += target[j] * target[j]


@device
def lane_error(values: F32, lane: int, scale: np.float32, terms: F64) -> float:
    """The exact squared error of one lane under one scale, ties to even: what `quantise_nv` gives for it."""
    for i in range(8):
        a, b = values[i, lane], values[i + 8, lane]
        left = squared_error(a, round_e2m1(np.float32(a / scale), _EVEN), scale)
        terms[i] = left + squared_error(b, round_e2m1(np.float32(b / scale), _EVEN), scale)
    for i in range(4):
        terms[i] += terms[i + 4]
    return (terms[0] + terms[2]) + (terms[1] + terms[3])


@helper
def likely_trials(values: F32, amax: I32, tensor_scale: np.float32, first: I32, terms: F64, best: I32) -> None:
    """Like `every_trial`, ties to even, but exact errors only for scales whose estimate is near the least one.

    A scale whose estimate is beyond the least by _SLACK of the sum of squares, twice what two estimates can be wrong
    by, is not the best. Mostly one scale is left, and is best without being computed.
    """
    unit, factors, squares = np.empty((16, LANES), np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    estimates, limit = np.empty((_TOP + 1, LANES), np.float32), np.empty(LANES, np.float32)
    to_unit(values, amax, unit, squares, factors)
    steps = estimate_trials(unit, amax, tensor_scale, first, factors, squares, estimates, limit)
    left = np.zeros(LANES, np.int32)
    best[:] = 1
    for step in range(steps):
        row = estimates[step]
        for j in range(LANES):
            best[j] = first[j] - step if row[j] <= limit[j] else best[j]
            left[j] += np.int32(row[j] <= limit[j])
    for j in range(LANES):
        if left[j] > 1:
            least = np.inf
            for step in range(steps):
                if estimates[step, j] <= limit[j]:
                    scale = np.float32(_E4M3[first[j] - step] * tensor_scale)
                    error = lane_error(values, j, scale, terms)
                    if error <= least:  # downwards, so the smaller of equals
                        best[j], least = first[j] - step, error


@helper
def estimate_trials(
    unit: F32, amax: I32, tensor_scale: np.float32, first: I32, factors: F32, squares: F32, estimates: F32, limit: F32
) -> int:
    """Estimate the errors of codes first, first - 1, ... in rows of `estimates`; returns the rows filled.

    `limit` [LANES] is the estimate up to which a scale may be the best. A lane that has ended holds inf.
    """
    scales, largest = np.empty(LANES, np.float32), amax.view(np.float32)
    running = np.ones(LANES, np.bool_)
    limit[:] = np.inf
    steps = 0
    while True:
        active = 0
        for j in range(LANES):
            code = first[j] - steps
            scales[j] = np.float32(_E4M3[max(code, 1)] * tensor_scale) * factors[j]
            clipped = np.float32(largest[j] * factors[j]) - np.float32(_SIX * scales[j])
            running[j] &= code >= 1 and not (clipped > _ZERO and clipped * clipped > limit[j])
            active += running[j]
        if active == 0:
            return steps
        row = estimates[steps]
        estimate(unit, scales, row)
        for j in range(LANES):
            row[j] = row[j] if running[j] else np.float32(np.inf)
            limit[j] = min(limit[j], row[j] + squares[j] * _SLACK)
        steps += 1
