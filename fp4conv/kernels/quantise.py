"""Values to codes under given scales, on tiles of lanes [position in block, LANES], with their squared errors.

Every function here has its slow twin in `reference`. No operation may be fused or reordered: products,
quotients and sums are separate IEEE operations. Codes are found in float32, for Numba widens sums of integers to 64
bits, which halves what a vector register holds.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np

from fp4conv.formats import E8M0_BIAS, Ties
from fp4conv.kernels.contract import F32, F64, U8
from fp4conv.kernels.jit import device, helper
from fp4conv.kernels.lanes import I32, LANES

INF_BITS = np.int32(0x7F800000)
_ABS_BITS = np.int32(0x7FFFFFFF)
_ZERO, _HALF, _ONE, _TWO, _FOUR, _SIX, _EIGHT = (np.float32(v) for v in (0, 0.5, 1, 2, 4, 6, 8))
_STEPS = np.float32(2.0**23)

# After rounding to the nearest, ties to even: how far up, in steps between codes, a value must have gone to be taken
# one step back. Half a step is a tie that went up, which DOWN takes back; two steps never occur.
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
def nearest_e2m1(magnitude: np.float32) -> tuple[np.float32, np.float32]:
    """(The E2M1 value nearest to a magnitude, ties to even, at most 6; the step between codes there).

    Adding 2^23 steps to a float32 rounds it to whole steps, ties to even, and even multiples of the step are
    even codes here: steps of 0.5 below 2, 1 below 4, 2 below 8.
    """
    q = min(magnitude, _SIX)
    step = _HALF if q < _TWO else (_ONE if q < _FOUR else _TWO)
    shifter = np.float32(step * _STEPS)
    return np.float32(np.float32(q + shifter) - shifter), step


@device
def round_e2m1(quotient: np.float32, tie: np.float32) -> np.float32:
    """The E2M1 magnitude nearest to |quotient|, at most 6; `tie` is one of TIES."""
    rounded, step = nearest_e2m1(abs(quotient))
    went_up = np.float32(rounded - min(abs(quotient), _SIX))
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
