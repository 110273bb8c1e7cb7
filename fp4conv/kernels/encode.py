"""The compiled encoders: a tile in, blocks encoded, a tile of packed codes and scales out."""

from __future__ import annotations

import numpy as np

from fp4conv.kernels.compute import INF_BITS, amax_bits, encode_mx_block, encode_nv_block, square_sum
from fp4conv.kernels.jit import device, kernel
from fp4conv.kernels.tiles import TILE_VALUES, load_values, store_tile, tile_shape


@device
def pack(codes, packed, length):  # type: ignore[no-untyped-def]
    for i in range(length // 2):
        packed[i] = codes[2 * i] | (codes[2 * i + 1] << 4)


@kernel
def encode_mx(x, shift, n, k, x_kn, rule, to_even, packed, scales, signal, noise, out_kn):  # type: ignore[no-untyped-def]
    """All arrays flat. True, or False when a value is not finite (then the outputs are unspecified)."""
    tile_rows, tile_columns = tile_shape(x_kn or out_kn, 32)
    blocks = k // 32
    values = np.empty((TILE_VALUES // 32, 32), np.float32)
    bits = values.view(np.int32)
    out = np.empty((TILE_VALUES // 32, 16), np.uint8)
    out_scales = np.empty((TILE_VALUES // 32, 1), np.uint8)
    codes, terms = np.empty(32, np.uint8), np.empty(32, np.float64)
    signal[:n] = 0.0
    noise[:n] = 0.0
    for row in range(0, n, tile_rows):
        for column in range(0, blocks, tile_columns):
            corner, size = (row, column), (min(tile_rows, n - row), min(tile_columns, blocks - column))
            load_values(x, shift, x_kn, (n, k), corner, size, 32, bits)
            for r in range(size[0]):
                for c in range(size[1]):
                    j = r * size[1] + c
                    if amax_bits(bits[j], 32) >= INF_BITS:
                        return False
                    byte, error = encode_mx_block(values[j], bits[j], rule, to_even, codes, terms)
                    noise[row + r] += error
                    signal[row + r] += square_sum(values[j], 32, terms)
                    pack(codes, out[j], 32)
                    out_scales[j, 0] = byte
            store_tile(out, packed, out_kn, (n, k // 2), corner, size, 16)
            store_tile(out_scales, scales, out_kn, (n, blocks), corner, size, 1)
    return True


@kernel
def encode_nv(  # type: ignore[no-untyped-def]
    x, shift, n, k, x_kn, tensor_scale, rule, from_top, to_even, packed, scales, signal, noise, out_kn
):
    """All arrays flat. True, or False when a value is not finite (then the outputs are unspecified)."""
    tile_rows, tile_columns = tile_shape(x_kn or out_kn, 16)
    blocks = k // 16
    values = np.empty((TILE_VALUES // 16, 16), np.float32)
    bits = values.view(np.int32)
    out = np.empty((TILE_VALUES // 16, 8), np.uint8)
    out_scales = np.empty((TILE_VALUES // 16, 1), np.uint8)
    codes, terms = np.empty(16, np.uint8), np.empty(16, np.float64)
    signal[:n] = 0.0
    noise[:n] = 0.0
    for row in range(0, n, tile_rows):
        for column in range(0, blocks, tile_columns):
            corner, size = (row, column), (min(tile_rows, n - row), min(tile_columns, blocks - column))
            load_values(x, shift, x_kn, (n, k), corner, size, 16, bits)
            for r in range(size[0]):
                for c in range(size[1]):
                    j = r * size[1] + c
                    largest = amax_bits(bits[j], 16)
                    if largest >= INF_BITS:
                        return False
                    code, error = encode_nv_block(
                        values[j], largest, tensor_scale, rule, from_top, to_even, codes, terms
                    )
                    noise[row + r] += error
                    signal[row + r] += square_sum(values[j], 16, terms)
                    pack(codes, out[j], 16)
                    out_scales[j, 0] = code
            store_tile(out, packed, out_kn, (n, k // 2), corner, size, 8)
            store_tile(out_scales, scales, out_kn, (n, blocks), corner, size, 1)
    return True
