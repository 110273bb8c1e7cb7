"""Moving tiles of blocks between arrays and the caches: rows along K or along N, one loop for both.

A tile is `rows` x `columns` blocks; block (r, c) is entry r * columns + c. Row-major arrays are walked a
row at a time. K-major arrays are walked in tiles of 64 rows of the logical matrix, so that every line of
memory that is touched is used whole.
"""

from __future__ import annotations

from fp4conv.kernels.jit import device

TILE_VALUES = 4096  # 16 KB of float32: with its results it stays in the first-level cache
TILE_ROWS = 64


@device
def tile_shape(kn, length):  # type: ignore[no-untyped-def]
    """(rows, columns in blocks of `length`) of a tile, when any side of the kernel is K-major or none is."""
    rows = TILE_ROWS if kn else 1
    return rows, TILE_VALUES // (rows * length)


@device
def load_values(x, shift, kn, shape, corner, size, length, bits):  # type: ignore[no-untyped-def]
    """Copy a tile of `x` (flat; int32 float bits, or uint16 BF16 bits and shift 16) to bits [blocks, length]."""
    n, k = shape
    row, column = corner
    rows, columns = size
    if kn:
        for kk in range(columns * length):
            source = x[(column * length + kk) * n + row : (column * length + kk) * n + row + rows]
            c, i = kk // length, kk % length
            for r in range(rows):
                bits[r * columns + c, i] = source[r] << shift
    else:
        for r in range(rows):
            for c in range(columns):
                start = (row + r) * k + (column + c) * length
                source = x[start : start + length]
                block = bits[r * columns + c]
                for i in range(length):
                    block[i] = source[i] << shift


@device
def load_bytes(source, kn, shape, corner, size, length, tile):  # type: ignore[no-untyped-def]
    """Copy bytes of a tile to tile [blocks, length]; `length` bytes a block, shape [N, bytes a row]."""
    n, k = shape
    row, column = corner
    rows, columns = size
    if kn:
        for kk in range(columns * length):
            start = (column * length + kk) * n + row
            line = source[start : start + rows]
            c, i = kk // length, kk % length
            for r in range(rows):
                tile[r * columns + c, i] = line[r]
    else:
        for r in range(rows):
            start = (row + r) * k + column * length
            line = source[start : start + columns * length]
            for c in range(columns):
                for i in range(length):
                    tile[r * columns + c, i] = line[c * length + i]


@device
def store_tile(tile, target, kn, shape, corner, size, length):  # type: ignore[no-untyped-def]
    """The inverse of `load_bytes`, for items of any width."""
    n, k = shape
    row, column = corner
    rows, columns = size
    if kn:
        for kk in range(columns * length):
            start = (column * length + kk) * n + row
            line = target[start : start + rows]
            c, i = kk // length, kk % length
            for r in range(rows):
                line[r] = tile[r * columns + c, i]
    else:
        for r in range(rows):
            start = (row + r) * k + column * length
            line = target[start : start + columns * length]
            for c in range(columns):
                for i in range(length):
                    line[c * length + i] = tile[r * columns + c, i]
