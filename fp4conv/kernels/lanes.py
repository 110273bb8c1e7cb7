"""Tiles of blocks in lanes: how a kernel walks a matrix, and moves blocks to and from its scratch.

A tile holds LANES blocks side by side, [position in block, lane], so that every loop of the arithmetic runs
over lanes: it vectorises without shuffles, and no sum runs along a vector register. Lanes are neighbours in
memory: consecutive blocks of a row-major array or, when one side of the kernel is K-major, consecutive rows
of the logical matrix at one place along K. A K-major array then needs no transposing at all.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fp4conv.kernels.contract import F64, U8
from fp4conv.kernels.jit import device

LANES = 64

I32: TypeAlias = npt.NDArray[np.int32]
FloatBits: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.int32]  # BF16 bits, or those of float32


@device
def tile_of(number: int, n: int, blocks: int, by_rows: bool) -> tuple[int, int, int]:
    """(row, block of the row, lanes) where tile `number` begins; tiles of a row of lanes follow K."""
    if by_rows:
        row, block = number // blocks * LANES, number % blocks
        return row, block, min(LANES, n - row)
    first = number * LANES
    return first // blocks, first % blocks, min(LANES, n * blocks - first)


@device
def tile_count(n: int, blocks: int, by_rows: bool) -> int:
    return (n + LANES - 1) // LANES * blocks if by_rows else (n * blocks + LANES - 1) // LANES


@device
def origin(row: int, block: int, n: int, row_items: int, length: int, kn: bool) -> int:
    """Where the first item of a block lies in a flat array of `row_items` items a row, `length` a block."""
    return block * length * n + row if kn else row * row_items + block * length


@device
def lane_stride(row_items: int, length: int, by_rows: bool) -> int:
    """From one lane to the next in a row-major array."""
    return row_items if by_rows else length


@device
def load_floats(x: FloatBits, shift: int, start: int, kn: bool, stride: int, lanes: int, tile: I32) -> None:
    """Copy float32 bits of `lanes` blocks to tile [length, LANES], zeros beyond; `stride` is N or from lane to lane."""
    length = tile.shape[0]
    if lanes < LANES:
        tile[:, :] = 0
    if kn:
        for i in range(length):
            source, target = x[start + i * stride : start + i * stride + lanes], tile[i]
            for j in range(lanes):
                target[j] = source[j] << shift
    else:
        for j in range(lanes):
            source = x[start + j * stride : start + j * stride + length]
            for i in range(length):
                tile[i, j] = source[i] << shift


@device
def load_bytes(x: U8, start: int, kn: bool, stride: int, lanes: int, tile: U8) -> None:
    """Copy the bytes of `lanes` blocks to tile [bytes a block, LANES]."""
    length = tile.shape[0]
    if kn:
        for i in range(length):
            source, target = x[start + i * stride : start + i * stride + lanes], tile[i]
            for j in range(lanes):
                target[j] = source[j]
    else:
        for j in range(lanes):
            source = x[start + j * stride : start + j * stride + length]
            for i in range(length):
                tile[i, j] = source[i]


@device
def store(
    tile: npt.NDArray[np.generic], out: npt.NDArray[np.generic], start: int, kn: bool, stride: int, lanes: int
) -> None:
    """Copy `lanes` blocks of tile [length, LANES] to the flat array `out`."""
    length = tile.shape[0]
    if kn:
        for i in range(length):
            source, target = tile[i], out[start + i * stride : start + i * stride + lanes]
            for j in range(lanes):
                target[j] = source[j]
    else:
        for j in range(lanes):
            target = out[start + j * stride : start + j * stride + length]
            for i in range(length):
                target[i] = tile[i, j]


@device
def add_to_rows(sums: F64, totals: F64, row: int, block: int, blocks: int, lanes: int, by_rows: bool) -> None:
    """Add the sum of each block to its row's total; tiles come in the order of K, so the totals do too."""
    if by_rows:
        for j in range(lanes):
            totals[row + j] += sums[j]
        return
    for j in range(lanes):
        totals[row] += sums[j]
        block += 1
        if block == blocks:
            row, block = row + 1, 0
