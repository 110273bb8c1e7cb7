"""The compiled decoder of FP8 weights that have one scale a tile of rows and columns."""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np

from fp4conv.formats import E4M3
from fp4conv.kernels.contract import F32, U8
from fp4conv.kernels.decode import finish
from fp4conv.kernels.jit import helper, kernel
from fp4conv.kernels.lanes import I32, FloatBits

# E4M3's exponent and mantissa bits, put where float32 has its own, make the value times 2^(7 - 127).
_REBIAS = np.float32(2.0**120)
_LARGEST_CODE, _LARGEST_BF16 = E4M3.max_value, float.fromhex("0x1.fep127")
_NAN_CODE = np.int32(0x7F)
_NAN_BITS = np.int32(0x7FC00000)


@helper
def spread_codes(values: U8, bits: I32) -> bool:
    """E4M3 bytes to float32 bits of the value times 2^-120. False when a byte is NaN, whose bits are then NaN's."""
    nans = 0
    for i in range(values.size):
        byte = np.int32(values[i])
        magnitude = np.bitwise_and(byte, _NAN_CODE)
        sign = np.left_shift(np.bitwise_and(byte, np.int32(0x80)), np.int32(24))
        spread = np.bitwise_or(sign, np.left_shift(magnitude, np.int32(20)))
        nans += int(magnitude == _NAN_CODE)
        bits[i] = _NAN_BITS if magnitude == _NAN_CODE else spread
    return nans == 0


@helper
def scale_run(floats: F32, scale: np.float32) -> None:
    """The product with 2^120 is exact; the one with the scale is rounded."""
    for i in range(floats.size):
        floats[i] = np.float32(np.float32(floats[i] * _REBIAS) * scale)


@kernel
def decode_tiles(
    values: U8,
    scales: F32,
    n: int,
    k: int,
    skipped: int,
    tile_rows: int,
    tile_columns: int,
    out: FloatBits,
    shift: int,
) -> bool:
    """Arrays flat; `skipped` rows of the first row of tiles lie before the first row. False: perhaps not all finite."""
    across = (k + tile_columns - 1) // tile_columns
    bits = np.empty(min(tile_columns, k), np.int32)
    floats = bits.view(np.float32)
    finite = True
    for row in range(n):
        tiles = (skipped + row) // tile_rows * across
        for tile in range(across):
            start, scale = row * k + tile * tile_columns, scales[tiles + tile]
            size = min(tile_columns, k - tile * tile_columns)
            finite &= spread_codes(values[start : start + size], bits[:size])
            finite &= bool(abs(np.float64(scale)) * _LARGEST_CODE <= _LARGEST_BF16)
            scale_run(floats[:size], scale)
            finish(bits[:size], shift, out[start : start + size])
    return finite
