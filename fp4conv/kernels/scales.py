"""The scales of blocks from their amax, on tiles of lanes, by each rule that does not search.

Every function has its slow twin in `reference`.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np

from fp4conv.formats import ScaleRule
from fp4conv.kernels.contract import F32, F64, U8
from fp4conv.kernels.jit import helper
from fp4conv.kernels.lanes import I32, LANES
from fp4conv.kernels.quantise import quantise_nv
from fp4conv.kernels.small_floats import E4M3_VALUES

RULES = {rule: number for number, rule in enumerate(ScaleRule)}
RCEIL, EVEN, MSE, AMAX = (RULES[rule] for rule in (ScaleRule.RCEIL, ScaleRule.EVEN, ScaleRule.MSE, ScaleRule.AMAX))

_E4M3 = E4M3_VALUES[:127].copy()
_ZERO, _ONE, _FOUR, SIX = (np.float32(v) for v in (0, 1, 4, 6))


@helper
def e8m0_from_amax(amax: I32, rule: int, out: I32) -> None:
    """The scale byte of each lane from the float32 bits of its amax."""
    # EVEN: 1.75 and above carry into the exponent. RCEIL: above 1.5 x 2^k does, for 6 is 1.5 x 2^2.
    carry = np.int32(0x200000 if rule == EVEN else 0x3FFFFF if rule == RCEIL else 0)
    for j in range(LANES):
        # The exponent is biased by 127, and 0 for subnormals, whose scale is byte 0 under every rule.
        out[j] = max(int(np.int32(amax[j] + carry) >> 23) - 2, 0)


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
def four_over_six(
    values: F32, amax: I32, tensor_scale: np.float32, tie: np.float32, codes: U8, terms: F64, best: I32
) -> None:
    """The E4M3 code that puts amax on 6, or the one that puts it on 4 where that errs less."""
    on_four, scales = np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    six_errors, four_errors = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    e4m3_from_amax(amax, np.float32(SIX * tensor_scale), best)
    scale_products(best, tensor_scale, scales)
    quantise_nv(values, scales, tie, codes, terms, six_errors)
    e4m3_from_amax(amax, np.float32(_FOUR * tensor_scale), on_four)
    scale_products(on_four, tensor_scale, scales)
    quantise_nv(values, scales, tie, codes, terms, four_errors)
    for j in range(LANES):
        best[j] = on_four[j] if four_errors[j] < six_errors[j] else best[j]
