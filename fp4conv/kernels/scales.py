"""The scales of blocks, on tiles of lanes: from amax by each rule, or by searching for the least error.

Every function has its slow twin in `reference`, whose searches are brute force over every scale there is.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np

from fp4conv.formats import E8M0_BIAS, ScaleRule
from fp4conv.kernels.contract import F32, F64, U8
from fp4conv.kernels.jit import device, helper
from fp4conv.kernels.lanes import I32, LANES
from fp4conv.kernels.quantise import pow2, quantise_mx, quantise_nv
from fp4conv.kernels.small_floats import E4M3_ONE, E4M3_VALUES

RULES = {rule: number for number, rule in enumerate(ScaleRule)}
RCEIL, EVEN, MSE, AMAX = (RULES[rule] for rule in (ScaleRule.RCEIL, ScaleRule.EVEN, ScaleRule.MSE, ScaleRule.AMAX))

SMALL_TENSOR_SCALE = 2.0**-100  # below it, halving a scale may round, which `search_e4m3` relies on
_E4M3 = E4M3_VALUES[:127].copy()
_ZERO, _ONE, _FOUR, _SIX = (np.float32(v) for v in (0, 1, 4, 6))


@helper
def e8m0_from_amax(amax: I32, rule: int, out: I32) -> None:
    """The scale byte of each lane from the float32 bits of its amax."""
    # EVEN: 1.75 and above carry into the exponent. RCEIL: above 1.5 x 2^k does, for 6 is 1.5 x 2^2.
    carry = np.int32(0x200000 if rule == EVEN else 0x3FFFFF if rule == RCEIL else 0)
    for j in range(LANES):
        # The exponent is biased by 127, and 0 for subnormals, whose scale is byte 0 under every rule.
        out[j] = max(int(np.int32(amax[j] + carry) >> 23) - 2, 0)


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
def e4m3_from_amax(amax: I32, divisor: np.float32, out: I32) -> None:
    """E4M3 codes of amax / divisor, clamped to 2^-9 .. 448, roundTiesToEven; a ratio of zero gives 1.0."""
    largest = amax.view(np.float32)
    for j in range(LANES):
        ratio = np.float32(largest[j] / divisor)
        ratio = ratio if ratio != _ZERO else _ONE
        ratio = np.float32(min(max(ratio, np.float32(2.0**-9)), np.float32(448)))
        bits = np.float32(ratio).view(np.int32)
        # 0x7FFFF and the last kept bit round to even; 960 = (127 - 7) << 3 is the difference of the biases.
        normal = np.int32(np.int32(np.int32(bits + np.int32(0x7FFFF)) + np.int32((bits >> 20) & 1)) >> 20) - 960
        # The last four bits of ratio + 2^14 count steps of 2^-9.
        subnormal = np.float32(ratio + np.float32(16384)).view(np.int32) & 15
        out[j] = subnormal if ratio < np.float32(2.0**-6) else normal


@helper
def scale_products(block_scale: I32, tensor_scale: np.float32, out: F32) -> None:
    """F32(block scale x tensor scale) of each lane."""
    for j in range(LANES):
        out[j] = _E4M3[block_scale[j]] * tensor_scale


@helper
def search_e4m3(
    values: F32,
    amax: I32,
    tensor_scale: np.float32,
    from_top: bool,
    tie: np.float32,
    codes: U8,
    terms: F64,
    best: I32,
) -> None:
    """The E4M3 code 1..126 of the least squared error of each lane, the smaller of equals; 1.0 for zeros.

    A scale s with 3s >= amax is never better than s / 2, where that is an E4M3 number (codes above 15, and even
    codes), because every value of s up to 3s is a value of s / 2. `from_top` says that the argument does not
    hold: quotients that round onto a tie that then goes down, or scales that round when halved.
    """
    trial, tried, errors, least = _search_scratch()
    scales, largest = np.empty(LANES, np.float32), amax.view(np.float32)
    for j in range(LANES):
        trial[j] = 126 if from_top else 15
        top = np.float64(largest[j])
        while trial[j] < 126 and 3.0 * np.float64(np.float32(_E4M3[trial[j]] * tensor_scale)) < top:
            trial[j] += 1
        best[j] = 1
    while True:
        active = 0
        for j in range(LANES):
            tried[j] = max(trial[j], 1)
            scales[j] = _E4M3[tried[j]] * tensor_scale
            clipped = np.float64(largest[j]) - 6.0 * np.float64(scales[j])
            if clipped > 0 and clipped * clipped > least[j]:
                trial[j] = 0
            active += trial[j] > 0
        if active == 0:
            break
        quantise_nv(values, scales, tie, codes, terms, errors)
        _keep_better(trial, 1, errors, least, best)
    for j in range(LANES):
        if amax[j] == 0:
            best[j] = E4M3_ONE


@helper
def four_over_six(
    values: F32, amax: I32, tensor_scale: np.float32, tie: np.float32, codes: U8, terms: F64, best: I32
) -> None:
    """The E4M3 code that puts amax on 6, or the one that puts it on 4 where that errs less."""
    on_four, scales = np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    six_errors, four_errors = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    e4m3_from_amax(amax, np.float32(_SIX * tensor_scale), best)
    scale_products(best, tensor_scale, scales)
    quantise_nv(values, scales, tie, codes, terms, six_errors)
    e4m3_from_amax(amax, np.float32(_FOUR * tensor_scale), on_four)
    scale_products(on_four, tensor_scale, scales)
    quantise_nv(values, scales, tie, codes, terms, four_errors)
    for j in range(LANES):
        best[j] = on_four[j] if four_errors[j] < six_errors[j] else best[j]


@helper
def nvfp4_scales(
    values: F32,
    amax: I32,
    tensor_scale: np.float32,
    rule: int,
    from_top: bool,
    tie: np.float32,
    codes: U8,
    terms: F64,
    best: I32,
) -> None:
    """The E4M3 codes of the lanes under a scale rule."""
    if rule == AMAX:
        e4m3_from_amax(amax, np.float32(_SIX * tensor_scale), best)
    elif rule == MSE:
        search_e4m3(values, amax, tensor_scale, from_top, tie, codes, terms, best)
    else:
        four_over_six(values, amax, tensor_scale, tie, codes, terms, best)
