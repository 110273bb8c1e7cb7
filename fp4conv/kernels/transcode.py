"""The compiled MXFP4 -> NVFP4: which exponents hold a half block, and the conversion itself."""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.formats import E8M0_BIAS, Ties
from fp4conv.kernels.contract import F32, F64, U8
from fp4conv.kernels.decode import code_value
from fp4conv.kernels.jit import device, helper, kernel
from fp4conv.kernels.lanes import I32, LANES, lane_stride, load_bytes, origin, store, tile_count, tile_of
from fp4conv.kernels.quantise import TIES, pow2, quantise_nv
from fp4conv.kernels.scales import scale_products
from fp4conv.kernels.search import SMALL_TENSOR_SCALE, search_e4m3
from fp4conv.kernels.small_floats import E2M1_VALUES, E4M3_ONE, E4M3_VALUES
from fp4conv.kernels.window import E4M3_EXPONENTS, MAX_SHIFT, WINDOW_OFFSET, valid_shifts

_LOW, _HIGH = E4M3_EXPONENTS
_NO_SHIFT = MAX_SHIFT + 1
_LOSSY = 0
_TWO = np.float32(2)
_TIE = TIES[Ties.EVEN]
_LARGEST_F32 = float(np.finfo(np.float32).max)
_SMALL = SMALL_TENSOR_SCALE


def _shift_limits() -> npt.NDArray[np.int64]:
    """[256, 2]: the least and the greatest valid shift for a set of magnitude codes, a mask with a bit a code."""
    limits = np.zeros((256, 2), dtype=np.int64)
    for mask in range(2, 256):
        shifts = valid_shifts(np.array([code for code in range(8) if mask >> code & 1], dtype=np.uint8))
        assert shifts == list(range(min(shifts), max(shifts) + 1)), "shifts form an interval around 0"
        limits[mask] = shifts[0], shifts[-1]
    return limits


def _shifted_bytes() -> U8:
    """[7, 256]: row d + MAX_SHIFT holds, for a byte of two codes, the byte of the codes of value x 2^-d."""
    magnitudes = [float(v) for v in E2M1_VALUES[:8]]
    table = np.zeros((2 * MAX_SHIFT + 1, 256), dtype=np.uint8)
    for d in range(-MAX_SHIFT, MAX_SHIFT + 1):
        moved = [m * 2.0**-d for m in magnitudes]
        codes = [magnitudes.index(m) if m in magnitudes else 0 for m in moved]
        signed = [*codes, *(c + 8 for c in codes)]
        table[d + MAX_SHIFT] = [signed[byte & 15] | signed[byte >> 4] << 4 for byte in range(256)]
    return table


_LIMITS = _shift_limits()
_SHIFTED = _shifted_bytes()
_PRESENT = np.array([1 << (byte & 7) | 1 << (byte >> 4 & 7) for byte in range(256)], dtype=np.uint8)
_E4M3_OF_POWER = np.array([np.searchsorted(E4M3_VALUES[:127], 2.0**e) for e in range(_LOW, _HIGH + 1)], dtype=np.uint8)


@device
def present_codes(packed: U8) -> int:
    """A mask with bit c set when magnitude code c occurs in packed [8]; 1 when all are zeros."""
    mask = 0
    for i in range(8):
        mask |= _PRESENT[packed[i]]
    return mask


@kernel
def count_windows(packed: U8, scales: U8, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> int:
    """Arrays flat. Returns the index of the first scale byte 255, or -1; see `compiled.window_counts`."""
    for block in range(scales.size):
        if scales[block] == 255:
            return block
        k = np.int64(scales[block]) - E8M0_BIAS
        for half in range(2):
            start = block * 16 + half * 8
            mask = present_codes(packed[start : start + 8])
            if mask > 1:
                starts[k + _LIMITS[mask, 0] - _HIGH + WINDOW_OFFSET] += 1
                ends[k + _LIMITS[mask, 1] - _LOW + WINDOW_OFFSET] += 1
    return -1


@helper
def survey(tile: U8, masks: I32, squares: F32) -> None:
    """The mask of magnitude codes and the sum of squares of each lane of packed [8, LANES].

    The squares are whole quarters below 2^10, so their sum in float32 is exact in any order.
    """
    masks[:] = 0
    squares[:] = 0.0
    for i in range(8):
        row = tile[i]
        for j in range(LANES):
            low, high = np.int32(row[j] & 7), np.int32(row[j] >> 4 & 7)
            masks[j] |= np.int32(1 << low) | np.int32(1 << high)
        for j in range(LANES):
            a, b = code_value(row[j] & 7), code_value(row[j] >> 4 & 7)
            squares[j] += np.float32(a * a) + np.float32(b * b)


@device
def nearest_shift(offset: int, mask: int) -> int:
    """The valid d nearest to 0 that puts offset + d within E4M3's exponents, or _NO_SHIFT."""
    d = min(_HIGH - offset, 0) + max(_LOW - offset, 0)
    return d if _LIMITS[mask, 0] <= d <= _LIMITS[mask, 1] else _NO_SHIFT


@device
def convert_lane(tile: U8, lane: int, k: int, m: int, mask: int) -> int:
    """The E4M3 code of one lane of scale 2^k, its codes shifted in place; _LOSSY when it cannot be held."""
    if mask == 1:
        return E4M3_ONE
    d = nearest_shift(k - m, mask)
    if d == _NO_SHIFT:
        return _LOSSY
    if d != 0:
        for i in range(8):
            tile[i, lane] = _SHIFTED[d + MAX_SHIFT, tile[i, lane]]
    return int(_E4M3_OF_POWER[k + d - m - _LOW])


@helper
def reencode(
    tile: U8, exponents: I32, lossy: npt.NDArray[np.bool_], tensor_scale: np.float32, codes: I32, errors: F64
) -> bool:
    """Encode the lossy lanes of packed [8, LANES] in place by the MSE rule; their E4M3 codes and squared errors.

    False when a value overflows float32; the position is then for `first_overflow`.
    """
    values, terms = np.zeros((16, LANES), np.float32), np.empty(8 * LANES, np.float64)
    new_codes, products = np.empty((16, LANES), np.uint8), np.empty(LANES, np.float32)
    amax, best = np.zeros(LANES, np.float32), np.zeros(LANES, np.int32)
    for j in range(LANES):
        if lossy[j]:
            for i in range(16):
                value = np.float64(code_value(tile[i // 2, j] >> (4 * (i % 2)) & 15)) * pow2(exponents[j])
                if abs(value) > _LARGEST_F32:
                    return False
                values[i, j] = value
                amax[j] = max(amax[j], abs(values[i, j]))
    search_e4m3(values, amax.view(np.int32), tensor_scale, bool(tensor_scale < _SMALL), _TIE, new_codes, terms, best)
    scale_products(best, tensor_scale, products)
    quantise_nv(values, products, _TIE, new_codes, terms, errors)
    for j in range(LANES):
        if lossy[j]:
            codes[j] = best[j]
            for i in range(8):
                tile[i, j] = new_codes[2 * i, j] | (new_codes[2 * i + 1, j] << 4)
    return True


@device
def first_overflow(packed: U8, scales: U8, start: int) -> int:
    """The first value at or after block `start` of 16 that is beyond float32: only scale byte 254 has them."""
    for at in range(start * 16, packed.size * 2):
        if scales[at // 32] == 254 and abs(code_value(packed[at // 2] >> (4 * (at % 2)) & 15)) >= _TWO:
            return at
    return start * 16


@kernel
def transcode(
    packed: U8,
    scales: U8,
    n: int,
    k: int,
    m: int,
    out_packed: U8,
    out_scales: U8,
    signal: F64,
    noise: F64,
    out_kn: bool,
) -> int:
    """Arrays flat. The number of lossy halves, or -1 - the flat index of a value that is not a float32."""
    halves = k // 16
    tile, scale_out = np.zeros((8, LANES), np.uint8), np.empty((1, LANES), np.uint8)
    masks, squares = np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    exponents, codes = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    lossy, errors = np.zeros(LANES, np.bool_), np.zeros(LANES, np.float64)
    tensor_scale = np.float32(pow2(m))
    lossy_halves = 0
    signal[:] = 0.0
    noise[:] = 0.0
    for number in range(tile_count(n, halves, out_kn)):
        row, block, lanes = tile_of(number, n, halves, out_kn)
        stride = lane_stride(halves, 1, out_kn)
        first = row * halves + block
        load_bytes(packed, first * 8, False, stride * 8, lanes, tile)
        survey(tile, masks, squares)
        lossy_here = 0
        lossy[:] = False
        for j in range(lanes):
            byte = scales[(first + j * stride) // 2]
            if byte == 255:
                return -1 - (first + j * stride) * 16
            exponents[j] = np.int64(byte) - E8M0_BIAS
            codes[j] = convert_lane(tile, j, exponents[j], m, masks[j])
            lossy[j] = codes[j] == _LOSSY
            lossy_here += lossy[j]
        if lossy_here > 0:
            if not reencode(tile, exponents, lossy, tensor_scale, codes, errors):
                return -1 - first_overflow(packed, scales, first)
            for j in range(lanes):
                noise[(first + j * stride) // halves] += errors[j] if lossy[j] else 0.0
        for j in range(lanes):
            signal[(first + j * stride) // halves] += np.float64(squares[j]) * pow2(2 * exponents[j])
            scale_out[0, j] = codes[j]
        lossy_halves += lossy_here
        stride = n if out_kn else lane_stride(k // 2, 8, False)
        store(tile, out_packed, origin(row, block, n, k // 2, 8, out_kn), out_kn, stride, lanes)
        stride = n if out_kn else lane_stride(halves, 1, False)
        store(scale_out, out_scales, origin(row, block, n, halves, 1, out_kn), out_kn, stride, lanes)
    return lossy_halves
