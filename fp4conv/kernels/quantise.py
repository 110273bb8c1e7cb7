"""The arithmetic of encoding, on tiles of lanes [position in block, LANES]: codes, errors, scales, searches.

Every function here has its slow twin in `reference`. No operation may be fused or reordered: products,
quotients and sums are separate IEEE operations. Widths are spelled out (`np.int32(...)`) because Numba widens
integers to 64 bits, which halves what a vector register holds.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np

from fp4conv.formats import E8M0_BIAS, ScaleRule, Ties
from fp4conv.kernels.contract import F32, F64, U8
from fp4conv.kernels.jit import device, helper
from fp4conv.kernels.lanes import I32, LANES
from fp4conv.kernels.reference import E4M3_ONE, E4M3_VALUES

RULES = {rule: number for number, rule in enumerate(ScaleRule)}
RCEIL, EVEN, MSE = RULES[ScaleRule.RCEIL], RULES[ScaleRule.EVEN], RULES[ScaleRule.MSE]
AMAX, FOUR_OVER_SIX = RULES[ScaleRule.AMAX], RULES[ScaleRule.FOUR_OVER_SIX]

INF_BITS = np.int32(0x7F800000)
_ABS_BITS = np.int32(0x7FFFFFFF)
_ZERO, _HALF, _ONE, _TWO, _FOUR, _SIX, _EIGHT = (np.float32(v) for v in (0, 0.5, 1, 2, 4, 6, 8))
_STEPS = np.float32(2.0**23)
_E4M3 = E4M3_VALUES[:127].copy()
SMALL_TENSOR_SCALE = 2.0**-100  # below it, halving a scale may round, which `search_e4m3` relies on

# How a value half way between two codes goes: `quantise_*` take half of the step between codes, times this, as the
# distance of a tie that was rounded up and should not have been. Twice the whole step never occurs.
TIES: dict[Ties, np.float32] = {Ties.EVEN: np.float32(2), Ties.DOWN: np.float32(0.5)}


@device
def pow2(exponent: int) -> float:
    """2.0 ** exponent as float64, for -1022 <= exponent <= 1023."""
    return np.int64((np.int64(exponent) + 1023) << 52).view(np.float64)


@helper
def amax_bits(bits: I32, out: I32) -> np.int32:
    """The largest |x| of each lane to `out` [LANES], as float32 bits; returns the largest of all."""
    out[:] = 0
    for i in range(bits.shape[0]):
        row = bits[i]
        for j in range(LANES):
            out[j] = max(out[j], np.int32(row[j] & _ABS_BITS))
    largest = np.int32(0)
    for j in range(LANES):
        largest = max(largest, out[j])
    return largest


@device
def sum_lanes(terms: F64, rows: int, out: F64) -> None:
    """Sum terms [rows x LANES] (rows a power of two) over rows: halves added onto halves; `terms` is spent."""
    while rows > 2:
        rows //= 2
        left, right = terms[: rows * LANES], terms[rows * LANES : 2 * rows * LANES]
        for j in range(rows * LANES):
            left[j] += right[j]
    for j in range(LANES):
        out[j] = terms[j] + terms[LANES + j]


@helper
def square_sums(values: F32, terms: F64, out: F64) -> None:
    """Sum of x^2 of each lane; terms [length / 2 x LANES] is scratch."""
    half = values.shape[0] // 2
    for i in range(half):
        left, right, target = values[i], values[i + half], terms[i * LANES : (i + 1) * LANES]
        for j in range(LANES):
            a, b = np.float64(left[j]), np.float64(right[j])
            target[j] = a * a + b * b
    sum_lanes(terms, half, out)


@device
def round_e2m1(quotient: np.float32, tie: np.float32) -> np.float32:
    """The E2M1 magnitude nearest to |quotient|, at most 6.

    Adding 2^23 steps to a float32 rounds it to whole steps, ties to even, and even multiples of the step are
    even codes here: steps of 0.5 below 2, 1 below 4, 2 below 8.
    """
    q = min(abs(quotient), _SIX)
    step = _HALF if q < _TWO else (_ONE if q < _FOUR else _TWO)
    shifter = np.float32(step * _STEPS)
    rounded = np.float32(np.float32(q + shifter) - shifter)
    went_up = np.float32(rounded - q)
    return rounded - (step if went_up == np.float32(step * tie) else _ZERO)


@device
def code_of(magnitude: np.float32) -> np.float32:
    """The code 0..7 of an E2M1 magnitude: 2v up to 2, v + 2 up to 4, v / 2 + 4 beyond, so the least of the three."""
    low, middle, high = magnitude + magnitude, magnitude + _TWO, magnitude * _HALF + _FOUR
    return min(low, middle, high)


@device
def squared_error(x: np.float32, magnitude: np.float32, scale: np.float32) -> float:
    error = np.float64(abs(x)) - np.float64(magnitude) * np.float64(scale)
    return error * error


@helper
def quantise_mx(values: F32, exponents: I32, tie: np.float32, codes: U8, terms: F64, errors: F64) -> None:
    """Codes [32, LANES] and squared errors [LANES] of values [32, LANES] under scale bytes `exponents`."""
    scales, inverses = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for j in range(LANES):
        scales[j] = pow2(exponents[j] - E8M0_BIAS)
        inverses[j] = pow2(E8M0_BIAS - exponents[j])
    for i in range(16):
        left, right, target = values[i], values[i + 16], terms[i * LANES : (i + 1) * LANES]
        left_codes, right_codes = codes[i], codes[i + 16]
        for j in range(LANES):
            a, b = left[j], right[j]
            p, q = round_e2m1(a * inverses[j], tie), round_e2m1(b * inverses[j], tie)
            target[j] = squared_error(a, p, scales[j]) + squared_error(b, q, scales[j])
            left_codes[j] = np.uint8(code_of(p) + (_EIGHT if np.signbit(a) else _ZERO))
            right_codes[j] = np.uint8(code_of(q) + (_EIGHT if np.signbit(b) else _ZERO))
    sum_lanes(terms, 16, errors)


@helper
def quantise_nv(values: F32, scales: F32, tie: np.float32, codes: U8, terms: F64, errors: F64) -> None:
    """Codes [16, LANES] and squared errors [LANES] of values [16, LANES] under F32 products of scales."""
    for i in range(8):
        left, right, target = values[i], values[i + 8], terms[i * LANES : (i + 1) * LANES]
        left_codes, right_codes = codes[i], codes[i + 8]
        for j in range(LANES):
            a, b, scale = left[j], right[j], scales[j]
            x, y = np.float32(a / scale), np.float32(b / scale)
            p, q = round_e2m1(x, tie), round_e2m1(y, tie)
            target[j] = squared_error(a, p, scale) + squared_error(b, q, scale)
            left_codes[j] = np.uint8(code_of(p) + (_EIGHT if x < _ZERO else _ZERO))
            right_codes[j] = np.uint8(code_of(q) + (_EIGHT if y < _ZERO else _ZERO))
    sum_lanes(terms, 8, errors)


@device
def pack(codes: U8, packed: U8) -> None:
    """codes [length, LANES] to packed [length / 2, LANES], the even position in the low nibble."""
    for i in range(packed.shape[0]):
        low, high, target = codes[2 * i], codes[2 * i + 1], packed[i]
        for j in range(LANES):
            target[j] = low[j] | (high[j] << 4)


# -- scales of MXFP4 ----------------------------------------------------------------------------


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


# -- scales of NVFP4 ----------------------------------------------------------------------------


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
