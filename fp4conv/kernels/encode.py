"""The compiled encoders: a tile of blocks in, scales and codes found, packed codes and sums out."""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np

from fp4conv.kernels.contract import F64, U8
from fp4conv.kernels.jit import kernel
from fp4conv.kernels.lanes import (
    LANES,
    FloatBits,
    add_to_rows,
    lane_stride,
    load_floats,
    origin,
    store,
    tile_count,
    tile_of,
)
from fp4conv.kernels.quantise import INF_BITS, amax_bits, pack, quantise_mx, quantise_nv, square_sums
from fp4conv.kernels.scales import AMAX, MSE, SIX, e4m3_from_amax, e8m0_from_amax, four_over_six, scale_products
from fp4conv.kernels.search import search_e4m3, search_e8m0


@kernel
def encode_mx(
    x: FloatBits,
    shift: int,
    n: int,
    k: int,
    x_kn: bool,
    rule: int,
    tie: np.float32,
    packed: U8,
    scales: U8,
    signal: F64,
    noise: F64,
    out_kn: bool,
) -> bool:
    """Arrays flat. True, or False when a value is not finite (then the outputs are unspecified)."""
    by_rows, blocks = x_kn or out_kn, k // 32
    values, terms = np.empty((32, LANES), np.float32), np.empty(16 * LANES, np.float64)
    bits = values.view(np.int32)
    amax, exponents = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    errors, squares = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    codes, out = np.empty((32, LANES), np.uint8), np.empty((16, LANES), np.uint8)
    out_scales = np.empty((1, LANES), np.uint8)
    signal[:] = 0.0
    noise[:] = 0.0
    for number in range(tile_count(n, blocks, by_rows)):
        row, block, lanes = tile_of(number, n, blocks, by_rows)
        stride = n if x_kn else lane_stride(k, 32, by_rows)
        load_floats(x, shift, origin(row, block, n, k, 32, x_kn), x_kn, stride, lanes, bits)
        if amax_bits(bits, amax) >= INF_BITS:
            return False
        if rule == MSE:
            search_e8m0(values, amax, tie, codes, terms, exponents)
        else:
            e8m0_from_amax(amax, rule, exponents)
        quantise_mx(values, exponents, tie, codes, terms, errors)
        square_sums(values, terms, squares)
        add_to_rows(errors, noise, row, block, blocks, lanes, by_rows)
        add_to_rows(squares, signal, row, block, blocks, lanes, by_rows)
        pack(codes, out)
        for j in range(LANES):
            out_scales[0, j] = exponents[j]
        stride = n if out_kn else lane_stride(k // 2, 16, by_rows)
        store(out, packed, origin(row, block, n, k // 2, 16, out_kn), out_kn, stride, lanes)
        stride = n if out_kn else lane_stride(blocks, 1, by_rows)
        store(out_scales, scales, origin(row, block, n, blocks, 1, out_kn), out_kn, stride, lanes)
    return True


@kernel
def encode_nv(
    x: FloatBits,
    shift: int,
    n: int,
    k: int,
    x_kn: bool,
    tensor_scale: np.float32,
    rule: int,
    from_top: bool,
    tie: np.float32,
    packed: U8,
    scales: U8,
    signal: F64,
    noise: F64,
    out_kn: bool,
) -> bool:
    """Arrays flat. True, or False when a value is not finite (then the outputs are unspecified)."""
    by_rows, blocks = x_kn or out_kn, k // 16
    values, terms = np.empty((16, LANES), np.float32), np.empty(8 * LANES, np.float64)
    bits = values.view(np.int32)
    amax, block_scale = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    products = np.empty(LANES, np.float32)
    errors, squares = np.empty(LANES, np.float64), np.empty(LANES, np.float64)
    codes, out = np.empty((16, LANES), np.uint8), np.empty((8, LANES), np.uint8)
    out_scales = np.empty((1, LANES), np.uint8)
    signal[:] = 0.0
    noise[:] = 0.0
    for number in range(tile_count(n, blocks, by_rows)):
        row, block, lanes = tile_of(number, n, blocks, by_rows)
        stride = n if x_kn else lane_stride(k, 16, by_rows)
        load_floats(x, shift, origin(row, block, n, k, 16, x_kn), x_kn, stride, lanes, bits)
        if amax_bits(bits, amax) >= INF_BITS:
            return False
        if rule == AMAX:
            e4m3_from_amax(amax, np.float32(SIX * tensor_scale), block_scale)
        elif rule == MSE:
            search_e4m3(values, amax, tensor_scale, from_top, tie, codes, terms, block_scale)
        else:
            four_over_six(values, amax, tensor_scale, tie, codes, terms, block_scale)
        scale_products(block_scale, tensor_scale, products)
        quantise_nv(values, products, tie, codes, terms, errors)
        square_sums(values, terms, squares)
        add_to_rows(errors, noise, row, block, blocks, lanes, by_rows)
        add_to_rows(squares, signal, row, block, blocks, lanes, by_rows)
        pack(codes, out)
        for j in range(LANES):
            out_scales[0, j] = block_scale[j]
        stride = n if out_kn else lane_stride(k // 2, 8, by_rows)
        store(out, packed, origin(row, block, n, k // 2, 8, out_kn), out_kn, stride, lanes)
        stride = n if out_kn else lane_stride(blocks, 1, by_rows)
        store(out_scales, scales, origin(row, block, n, blocks, 1, out_kn), out_kn, stride, lanes)
    return True
