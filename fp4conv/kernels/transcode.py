"""The compiled MXFP4 -> NVFP4: which exponents hold a half block, and the conversion itself."""

from __future__ import annotations

import numpy as np

from fp4conv.formats import E8M0_BIAS, Ties
from fp4conv.kernels.compute import MSE, TO_EVEN_CODES, encode_nv_block, halving_sum_16, pow2
from fp4conv.kernels.jit import device, kernel
from fp4conv.kernels.reference import E2M1_VALUES, E4M3_ONE, E4M3_VALUES, valid_shifts
from fp4conv.kernels.tiles import TILE_VALUES, store_tile, tile_shape
from fp4conv.kernels.window import E4M3_EXPONENTS, MAX_SHIFT, WINDOW_OFFSET

_LOW, _HIGH = E4M3_EXPONENTS
_EVEN = TO_EVEN_CODES[Ties.EVEN]
_VALUES = E2M1_VALUES.copy()


def _shift_table() -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """[256, 2]: the least and greatest valid shift for a set of magnitude codes, given as a mask of bits."""
    table = np.zeros((256, 2), dtype=np.int64)
    for mask in range(2, 256):
        present = np.array([code for code in range(1, 8) if mask >> code & 1], dtype=np.uint8)
        shifts = valid_shifts(present)
        table[mask] = (min(shifts), max(shifts)) if present.size else (0, 0)
        assert shifts == list(range(min(shifts), max(shifts) + 1)) or not present.size
    return table


def _shifted_codes() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[7, 16]: row d + MAX_SHIFT holds the code of value x 2^-d for each code that has one."""
    magnitudes = [float(v) for v in E2M1_VALUES[:8]]
    table = np.zeros((2 * MAX_SHIFT + 1, 16), dtype=np.uint8)
    for row in range(2 * MAX_SHIFT + 1):
        for code in range(8):
            moved = magnitudes[code] * 2.0 ** (MAX_SHIFT - row)
            if moved in magnitudes:
                table[row, code] = magnitudes.index(moved)
                table[row, code + 8] = magnitudes.index(moved) + 8
    return table


_SHIFTS = _shift_table()
_SHIFTED = _shifted_codes()
_E4M3_OF_POWER = np.array(
    [int(np.searchsorted(E4M3_VALUES[:127], 2.0**e)) for e in range(_LOW, _HIGH + 1)], dtype=np.int64
)


@device
def present_codes(packed):  # type: ignore[no-untyped-def]
    """A mask with bit c set when magnitude code c occurs in packed [8]."""
    mask = 0
    for i in range(8):
        mask |= (1 << (packed[i] & 7)) | (1 << ((packed[i] >> 4) & 7))
    return mask


@kernel
def count_windows(packed, scales, starts, ends):  # type: ignore[no-untyped-def]
    """Arrays flat. Returns the index of the first scale byte 255, or -1; see `compiled.window_counts`."""
    for block in range(scales.size):
        if scales[block] == 255:
            return block
        k = np.int64(scales[block]) - E8M0_BIAS
        for half in range(2):
            start = block * 16 + half * 8
            mask = present_codes(packed[start : start + 8])
            if mask > 1:
                starts[k + _SHIFTS[mask, 0] - _HIGH + WINDOW_OFFSET] += 1
                ends[k + _SHIFTS[mask, 1] - _LOW + WINDOW_OFFSET] += 1
    return -1


@device
def smallest_shift(offset, mask):  # type: ignore[no-untyped-def]
    """The shift d nearest to 0 with offset + d within E4M3's exponents, or MAX_SHIFT + 1 when none is valid."""
    least, greatest = _SHIFTS[mask, 0], _SHIFTS[mask, 1]
    d = 0
    if offset > _HIGH:
        d = _HIGH - offset
    elif offset < _LOW:
        d = _LOW - offset
    return d if least <= d and d <= greatest else MAX_SHIFT + 1


@kernel
def transcode(packed, scales, n, k, m, out_packed, out_scales, signal, noise, out_kn):  # type: ignore[no-untyped-def]
    """Arrays flat. The number of lossy halves, or -1 - the flat index of a value that is not a float32."""
    tile_rows, tile_columns = tile_shape(out_kn, 16)
    halves = k // 16
    out = np.empty((TILE_VALUES // 16, 8), np.uint8)
    scale_out = np.empty((TILE_VALUES // 16, 1), np.uint8)
    codes, terms = np.empty(16, np.uint8), np.empty(16, np.float64)
    block = np.empty(16, np.float32)
    tensor_scale = np.float32(pow2(m))
    from_top = m < -100
    lossy = 0
    signal[:n] = 0.0
    noise[:n] = 0.0
    for row in range(0, n, tile_rows):
        for column in range(0, halves, tile_columns):
            corner, size = (row, column), (min(tile_rows, n - row), min(tile_columns, halves - column))
            for r in range(size[0]):
                for c in range(size[1]):
                    j = r * size[1] + c
                    at = (row + r) * halves + column + c
                    byte = scales[at // 2]
                    if byte == 255:
                        return -1 - at * 16
                    source, target = packed[at * 8 : at * 8 + 8], out[j]
                    factor = pow2(np.int64(byte) - E8M0_BIAS)
                    for i in range(8):
                        low = np.float64(_VALUES[source[i] & 15]) * factor
                        high = np.float64(_VALUES[source[i] >> 4]) * factor
                        terms[2 * i], terms[2 * i + 1] = low * low, high * high
                    signal[row + r] += halving_sum_16(terms)
                    mask = present_codes(source)
                    offset = np.int64(byte) - E8M0_BIAS - m
                    d = smallest_shift(offset, mask)
                    if mask == 1:
                        target[:] = source
                        scale_out[j, 0] = E4M3_ONE
                    elif d <= MAX_SHIFT:
                        for i in range(8):
                            low = _SHIFTED[d + MAX_SHIFT, source[i] & 15]
                            target[i] = low | (_SHIFTED[d + MAX_SHIFT, source[i] >> 4] << 4)
                        scale_out[j, 0] = _E4M3_OF_POWER[offset + d - _LOW]
                    else:
                        lossy += 1
                        largest = np.float32(0)
                        for i in range(16):
                            code = source[i // 2] >> (4 * (i % 2)) & 15
                            block[i] = np.float32(np.float64(_VALUES[code]) * factor)
                            if np.isinf(block[i]):
                                return -1 - (at * 16 + i)
                            largest = max(largest, abs(block[i]))
                        code, error = encode_nv_block(
                            block, np.float32(largest).view(np.int32), tensor_scale, MSE, from_top, _EVEN, codes, terms
                        )
                        noise[row + r] += error
                        scale_out[j, 0] = code
                        for i in range(8):
                            target[i] = codes[2 * i] | (codes[2 * i + 1] << 4)
            store_tile(out, out_packed, out_kn, (n, k // 2), corner, size, 8)
            store_tile(scale_out, out_scales, out_kn, (n, halves), corner, size, 1)
    return lossy
