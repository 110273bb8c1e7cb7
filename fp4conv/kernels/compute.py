"""The arithmetic of one block, compiled into the kernels: E4M3, E2M1, sums in the fixed order, searches.

Every function here has its slow twin in `reference`. Widths are spelled out (`np.int32(...)`) because
Numba widens integer sums to 64 bits, which halves what a vector register holds.

No operation may be fused or reordered: products, quotients and sums are separate IEEE operations.
"""

from __future__ import annotations

import numpy as np

from fp4conv.formats import E8M0_BIAS, ScaleRule, Ties
from fp4conv.kernels.contract import F32, F64, U8
from fp4conv.kernels.jit import device
from fp4conv.kernels.reference import E4M3_ONE, E4M3_VALUES

RULES = {rule: number for number, rule in enumerate(ScaleRule)}
FLOOR, RCEIL, EVEN = RULES[ScaleRule.FLOOR], RULES[ScaleRule.RCEIL], RULES[ScaleRule.EVEN]
AMAX, FOUR_OVER_SIX, MSE = RULES[ScaleRule.AMAX], RULES[ScaleRule.FOUR_OVER_SIX], RULES[ScaleRule.MSE]

_f32 = np.float32
_ZERO = _f32(0)
_SIX = _f32(6)
_FOUR = _f32(4)
_ABS_MASK = np.int32(0x7FFFFFFF)
INF_BITS = np.int32(0x7F800000)

# The least |x| that reaches codes 1, 3, 5 and 7: just above the midpoint, for ties go to the even code below.
_above = [_f32(np.nextafter(_f32(t), _f32(9))) for t in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)]
_TO_1, _TO_3, _TO_5, _TO_7 = _above[0], _above[2], _above[4], _above[6]
# The same for codes 2, 4 and 6, which take the tie (EVEN) or leave it to the smaller magnitude (DOWN).
TO_EVEN_CODES = {
    Ties.EVEN: (_f32(0.75), _f32(1.75), _f32(3.5)),
    Ties.DOWN: (_above[1], _above[3], _above[5]),
}

SMALL_TENSOR_SCALE = _f32(2.0**-100)  # below it halving a scale may round, which `best_e4m3` relies on
_E4M3 = E4M3_VALUES[:127].copy()


@device
def amax_bits(bits, length):  # type: ignore[no-untyped-def]
    """The largest |x| of a block as float32 bits; at or above INF_BITS when a value is not finite."""
    largest = np.int32(0)
    for i in range(length):
        largest = np.int32(max(largest, np.int32(bits[i] & _ABS_MASK)))
    return largest


@device
def halving_sum_16(terms):  # type: ignore[no-untyped-def]
    for i in range(8):
        terms[i] += terms[i + 8]
    for i in range(4):
        terms[i] += terms[i + 4]
    return (terms[0] + terms[2]) + (terms[1] + terms[3])


@device
def halving_sum(terms, length):  # type: ignore[no-untyped-def]
    """The sum of `terms` [length] (16 or 32), halves added onto halves; `terms` is spent."""
    if length == 32:
        for i in range(16):
            terms[i] += terms[i + 16]
    return halving_sum_16(terms)


@device
def square_sum(block, length, terms):  # type: ignore[no-untyped-def]
    for i in range(length):
        value = np.float64(block[i])
        terms[i] = value * value
    return halving_sum(terms, length)


@device
def magnitude_code(q, to_even):  # type: ignore[no-untyped-def]
    """(code 0..7, twice the value of that code) of a quotient q >= 0."""
    to_2, to_4, to_6 = to_even
    five = np.int32(q >= _TO_5)
    six = np.int32(q >= to_6)
    seven = np.int32(q >= _TO_7)
    low = np.int32(np.int32(q >= _TO_1) + np.int32(q >= to_2))
    mid = np.int32(np.int32(q >= _TO_3) + np.int32(q >= to_4))
    code = np.int32(low + mid + five + six + seven)
    return code, np.int32(code + five + six + seven + seven + seven)


@device
def pow2(exponent):  # type: ignore[no-untyped-def]
    """2.0 ** exponent as float64, for -1022 <= exponent <= 1023."""
    return np.int64((np.int64(exponent) + 1023) << 52).view(np.float64)


@device
def quantise_mx(block, scale_byte, to_even, codes, terms):  # type: ignore[no-untyped-def]
    """Codes of block [32] at scale 2^(scale_byte - 127); returns the squared error."""
    inverse = _f32(pow2(E8M0_BIAS - scale_byte))
    half_scale = pow2(scale_byte - E8M0_BIAS - 1)
    for i in range(32):
        magnitude = abs(block[i])
        code, twice = magnitude_code(magnitude * inverse, to_even)
        error = np.float64(magnitude) - np.float64(twice) * half_scale
        terms[i] = error * error
        codes[i] = np.uint8(code | (np.int32(np.signbit(block[i])) << 3))
    return halving_sum(terms, 32)


@device
def quantise_nv(block, scale, to_even, codes, terms):  # type: ignore[no-untyped-def]
    """Codes of block [16] at the F32 scale (block scale x tensor scale); returns the squared error."""
    half_scale = np.float64(scale) * 0.5
    for i in range(16):
        quotient = block[i] / scale
        code, twice = magnitude_code(abs(quotient), to_even)
        error = np.float64(abs(block[i])) - np.float64(twice) * half_scale
        terms[i] = error * error
        codes[i] = np.uint8(code | (np.int32(quotient < _ZERO) << 3))
    return halving_sum(terms, 16)


# -- scales -------------------------------------------------------------------------------------


@device
def e8m0_from_amax(bits, rule):  # type: ignore[no-untyped-def]
    """The scale byte of a block from the float32 bits of its amax (finite)."""
    if rule == EVEN:
        bits = bits + 0x200000  # a quarter of a power of two: 1.75 and above carry into the exponent
    exponent = bits >> 23  # biased by 127; 0 for subnormals, whose scale is byte 0 under every rule
    if rule == RCEIL and (bits & 0x7FFFFF) > 0x400000:  # above 1.5 x 2^k, so above 6 x 2^(k - 2)
        exponent += 1
    return max(exponent - 2, 0)


@device
def best_e8m0(block, amax, first, to_even, codes, terms):  # type: ignore[no-untyped-def]
    """The scale byte of the least squared error; `first` is RCEIL's byte, above which none is better.

    Every value that a scale 2s gives within the range of s is a value of s too, so halving the scale
    never loses until it clips. Downwards the clipping of amax alone ends the search.
    """
    best, best_error = 0, np.inf
    byte = first
    while byte >= 0:
        clipped = amax - 6.0 * pow2(byte - E8M0_BIAS)
        if clipped > 0 and clipped * clipped > best_error:
            break
        error = quantise_mx(block, byte, to_even, codes, terms)
        if error <= best_error:
            best, best_error = byte, error
        byte -= 1
    return best


@device
def e4m3_from_ratio(ratio):  # type: ignore[no-untyped-def]
    """The E4M3 code of a block scale >= 0, clamped to 2^-9 .. 448, roundTiesToEven; zero gives 1.0."""
    if ratio == _ZERO:
        return E4M3_ONE
    ratio = min(max(ratio, _f32(2.0**-9)), _f32(448))
    if ratio < _f32(2.0**-6):  # the last four bits of ratio + 2^14 count steps of 2^-9
        return np.int64(np.float32(ratio + _f32(16384)).view(np.int32)) & 15
    bits = np.int64(np.float32(ratio).view(np.int32))
    return ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 960 = (127 - 7) << 3, the biases


@device
def best_e4m3(block, amax, tensor_scale, from_top, to_even, codes, terms):  # type: ignore[no-untyped-def]
    """The E4M3 code 1..126 of the least squared error, the smaller of equals.

    A scale s with 3s >= amax is never better than s / 2, where that is an E4M3 number (codes above 15, and
    even codes), because every value of s up to 3s is a value of s / 2. `from_top` says that the argument
    does not hold: quotients that round onto a tie going down, or scales that round when halved.
    """
    start = 126
    if not from_top:
        start = 15
        while start < 126 and 3.0 * np.float64(_f32(_E4M3[start] * tensor_scale)) < amax:
            start += 1
    best, best_error = 1, np.inf
    for code in range(start, 0, -1):
        scale = _f32(_E4M3[code] * tensor_scale)
        clipped = amax - 6.0 * np.float64(scale)
        if clipped > 0 and clipped * clipped > best_error:
            break
        error = quantise_nv(block, scale, to_even, codes, terms)
        if error <= best_error:
            best, best_error = code, error
    return best


@device
def four_over_six(block, amax, tensor_scale, to_even, codes, terms):  # type: ignore[no-untyped-def]
    """The E4M3 code that puts amax on 6, or the one that puts it on 4 when that errs less."""
    on_six = e4m3_from_ratio(_f32(amax / _f32(_SIX * tensor_scale)))
    on_four = e4m3_from_ratio(_f32(amax / _f32(_FOUR * tensor_scale)))
    six_error = quantise_nv(block, _f32(_E4M3[on_six] * tensor_scale), to_even, codes, terms)
    four_error = quantise_nv(block, _f32(_E4M3[on_four] * tensor_scale), to_even, codes, terms)
    return on_four if four_error < six_error else on_six


@device
def encode_mx_block(block, bits, rule, to_even, codes, terms):  # type: ignore[no-untyped-def]
    """(scale byte, squared error) of a finite block [32]; its codes are left in `codes`."""
    largest = amax_bits(bits, 32)
    if rule == MSE:
        first = e8m0_from_amax(np.int64(largest), RCEIL)
        byte = best_e8m0(block, np.float64(np.int32(largest).view(np.float32)), first, to_even, codes, terms)
    else:
        byte = e8m0_from_amax(np.int64(largest), rule)
    return byte, quantise_mx(block, byte, to_even, codes, terms)


@device
def encode_nv_block(block, largest, tensor_scale, rule, from_top, to_even, codes, terms):  # type: ignore[no-untyped-def]
    """(E4M3 code, squared error) of a finite block [16]; its codes are left in `codes`."""
    amax = np.int32(largest).view(np.float32)
    if rule == AMAX or amax == _ZERO:
        code = e4m3_from_ratio(_f32(amax / _f32(_SIX * tensor_scale)))
    elif rule == MSE:
        code = best_e4m3(block, np.float64(amax), tensor_scale, from_top, to_even, codes, terms)
    else:
        code = four_over_six(block, amax, tensor_scale, to_even, codes, terms)
    return code, quantise_nv(block, _f32(_E4M3[code] * tensor_scale), to_even, codes, terms)
