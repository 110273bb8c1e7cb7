"""The compiled decoders: packed codes and scales in, BF16 bits or float32 bits out.

Row-major to row-major runs along memory; when one side is K-major, tiles of lanes turn it (see `lanes`).
Whether every value is finite is told by the scales alone, and so with false alarms: the caller looks closer.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

import numpy as np

from fp4conv.formats import E2M1, E8M0_BIAS
from fp4conv.kernels.contract import F32, U8
from fp4conv.kernels.jit import device, helper, kernel
from fp4conv.kernels.lanes import (
    I32,
    LANES,
    FloatBits,
    lane_stride,
    load_bytes,
    origin,
    store,
    tile_count,
    tile_of,
)
from fp4conv.kernels.quantise import pow2
from fp4conv.kernels.small_floats import E4M3_VALUES

E8M0, E4M3_TIMES, E4M3_DIVIDED = range(3)  # kinds of block scale, and what the tensor scale does to it
CHUNK = 1024  # packed bytes that the row-major path handles at a time
_E4M3 = E4M3_VALUES.copy()
_QUARTER, _HALF, _ONE, _TWO, _EIGHT = (np.float32(v) for v in (0.25, 0.5, 1, 2, 8))
_LARGEST_CODE = E2M1.max_value
_LARGEST_BF16 = float.fromhex("0x1.fep127")


@device
def block_factor(byte: int, kind: int, tensor_scale: np.float32) -> np.float32:
    """What the codes of a block are multiplied by.

    2^(byte - 127); F32(block scale x tensor scale); F32(block scale / tensor scale) where its reciprocal is stored.
    """
    if kind == E8M0:
        return np.float32(np.nan) if byte == 255 else np.float32(pow2(int(byte) - E8M0_BIAS))
    if kind == E4M3_DIVIDED:
        return np.float32(_E4M3[byte] / tensor_scale)
    return np.float32(_E4M3[byte] * tensor_scale)


@device
def surely_finite(factor: np.float32) -> bool:
    return bool(abs(np.float64(factor)) * _LARGEST_CODE <= _LARGEST_BF16)


@device
def code_value(code: int) -> np.float32:
    """The E2M1 value of a code 0..15; 8 gives -0.0."""
    magnitude = np.float32(np.int32(code & 7))
    # The inverse of `quantise.code_of`: v = c / 2 up to code 4, c - 2 up to 6, 2c - 8 beyond, the greatest of three.
    high = np.float32(magnitude + magnitude) - _EIGHT
    value = max(magnitude * _HALF, magnitude - _TWO, high)
    return np.float32(value * np.float32(_ONE - np.float32(np.float32(np.int32(code & 8)) * _QUARTER)))


@device
def bf16_bits(bits: np.int32) -> np.int32:
    """Round float32 bits to BF16 bits, ties to even; a quiet NaN stays one."""
    # np.add and its like keep 32 bits where the operators of Numba widen to 64.
    last_kept = np.bitwise_and(np.right_shift(bits, np.int32(16)), np.int32(1))
    return np.right_shift(np.add(np.add(bits, np.int32(0x7FFF)), last_kept), np.int32(16))


@helper
def decode_run(packed: U8, factors: F32, out: F32) -> None:
    """packed [B] with a factor a byte to out [2B]."""
    for i in range(packed.size):
        byte, factor = packed[i], factors[i]
        out[2 * i] = code_value(byte & 15) * factor
        out[2 * i + 1] = code_value(byte >> 4) * factor


@helper
def decode_tile(packed: U8, factors: F32, out: F32) -> None:
    """packed [length / 2, LANES] with a factor a lane to out [length, LANES]."""
    for i in range(packed.shape[0]):
        row, low, high = packed[i], out[2 * i], out[2 * i + 1]
        for j in range(LANES):  # two loops: with two rows of one array written in one, LLVM fears that they overlap
            low[j] = code_value(row[j] & 15) * factors[j]
        for j in range(LANES):
            high[j] = code_value(row[j] >> 4) * factors[j]


@device
def finish(bits: I32, shift: int, out: FloatBits) -> None:
    """float32 bits to the bits of the target, one array to another."""
    if shift:
        for i in range(bits.size):
            out[i] = bf16_bits(bits[i])
    else:
        for i in range(bits.size):
            out[i] = bits[i]


@kernel
def decode_rows(
    packed: U8, scales: U8, length: int, kind: int, tensor_scale: np.float32, out: FloatBits, shift: int
) -> bool:
    """Row-major to row-major, arrays flat. False when a value may not be finite."""
    finite, half = True, length // 2
    factors, values = np.empty(CHUNK, np.float32), np.empty(2 * CHUNK, np.float32)
    bits = values.view(np.int32)
    for start in range(0, packed.size, CHUNK):
        size = min(CHUNK, packed.size - start)
        for b in range(size // half):
            factor = block_factor(scales[start // half + b], kind, tensor_scale)
            finite &= surely_finite(factor)
            factors[b * half : b * half + half] = factor
        decode_run(packed[start : start + size], factors, values)
        finish(bits[: 2 * size], shift, out[2 * start : 2 * (start + size)])
    return finite


@kernel
def decode_turning(
    packed: U8,
    scales: U8,
    n: int,
    k: int,
    length: int,
    packed_kn: bool,
    kind: int,
    tensor_scale: np.float32,
    out: FloatBits,
    shift: int,
    out_kn: bool,
) -> bool:
    """One side or both K-major, arrays flat. False when a value may not be finite."""
    blocks, half = k // length, length // 2
    codes, bytes_in = np.empty((half, LANES), np.uint8), np.empty((1, LANES), np.uint8)
    factors = np.empty(LANES, np.float32)
    values, rounded = np.empty((length, LANES), np.float32), np.empty((length, LANES), out.dtype)
    bits = values.view(np.int32)
    finite = True
    for number in range(tile_count(n, blocks, True)):
        row, block, lanes = tile_of(number, n, blocks, True)
        stride = n if packed_kn else lane_stride(k // 2, half, True)
        load_bytes(packed, origin(row, block, n, k // 2, half, packed_kn), packed_kn, stride, lanes, codes)
        stride = n if packed_kn else lane_stride(blocks, 1, True)
        load_bytes(scales, origin(row, block, n, blocks, 1, packed_kn), packed_kn, stride, lanes, bytes_in)
        for j in range(lanes):
            factors[j] = block_factor(bytes_in[0, j], kind, tensor_scale)
            finite &= surely_finite(factors[j])
        decode_tile(codes, factors, values)
        finish(bits.reshape(-1), shift, rounded.reshape(-1))
        stride = n if out_kn else lane_stride(k, length, True)
        store(rounded, out, origin(row, block, n, k, length, out_kn), out_kn, stride, lanes)
    return finite
