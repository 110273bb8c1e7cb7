"""The compiled decoders: packed codes and F32 scales in, BF16 bits or float32 out."""

from __future__ import annotations

import numpy as np

from fp4conv.formats import E8M0_BIAS
from fp4conv.kernels.compute import pow2
from fp4conv.kernels.jit import device, kernel
from fp4conv.kernels.reference import E2M1_VALUES, E4M3_VALUES
from fp4conv.kernels.tiles import TILE_VALUES, load_bytes, store_tile, tile_shape

_E4M3 = E4M3_VALUES.copy()
_E2M1 = E2M1_VALUES.copy()
_F32_EXPONENT = np.int32(0x7F800000)


@device
def round_to_bf16(bits):  # type: ignore[no-untyped-def]
    """float32 bits of a number to BF16 bits, roundTiesToEven; not for NaN."""
    return np.int32((bits + np.int32(0x7FFF) + ((bits >> 16) & np.int32(1))) >> 16)


@device
def block_factor(byte, mx, tensor_scale):  # type: ignore[no-untyped-def]
    """What a code of a block is multiplied by, float32."""
    if mx:
        return np.float32(np.nan) if byte == 255 else np.float32(pow2(np.int64(byte) - E8M0_BIAS))
    return np.float32(_E4M3[byte] * tensor_scale)


@kernel
def decode(packed, scales, n, k, length, packed_kn, mx, tensor_scale, out, shift, out_kn):  # type: ignore[no-untyped-def]
    """All arrays flat, `out` int32 float bits or uint16 BF16 bits. True when every value is finite."""
    tile_rows, tile_columns = tile_shape(packed_kn or out_kn, length)
    blocks = k // length
    codes = np.empty((TILE_VALUES // length, length // 2), np.uint8)
    factors = np.empty((TILE_VALUES // length, 1), np.uint8)
    table = np.empty(16, out.dtype)
    values = np.empty((TILE_VALUES // length, length), out.dtype)
    finite = True
    for row in range(0, n, tile_rows):
        for column in range(0, blocks, tile_columns):
            corner, size = (row, column), (min(tile_rows, n - row), min(tile_columns, blocks - column))
            load_bytes(packed, packed_kn, (n, k // 2), corner, size, length // 2, codes)
            load_bytes(scales, packed_kn, (n, blocks), corner, size, 1, factors)
            for j in range(size[0] * size[1]):
                factor = block_factor(factors[j, 0], mx, tensor_scale)
                for code in range(16):
                    bits = np.float32(_E2M1[code] * factor).view(np.int32)
                    if shift == 16:
                        bits = np.int32(round_to_bf16(bits)) if factor == factor else np.int32(0x7FC0)
                    table[code] = bits
                source, target = codes[j], values[j]
                largest = 0
                for i in range(length // 2):
                    low, high = table[source[i] & 15], table[source[i] >> 4]
                    target[2 * i], target[2 * i + 1] = low, high
                    largest = max(largest, (np.int64(low) << shift) & _F32_EXPONENT)
                    largest = max(largest, (np.int64(high) << shift) & _F32_EXPONENT)
                finite &= largest < _F32_EXPONENT
            store_tile(values, out, out_kn, (n, k), corner, size, length)
    return finite
