"""The values of a synthetic checkpoint: drawn once into pools, then cut, scaled and never the same twice.

Drawing billions of normal values would take longer than any conversion. So some four million are drawn, and each
stretch of a tensor takes them from its own place and scales each row by its own power of two. Only raw 64-bit words
of the generator and exact arithmetic are used: NumPy promises that stream for ever, and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fp4conv.synthetic.shapes import Fill, Tensor

Words: TypeAlias = "npt.NDArray[np.uint64]"
Bits: TypeAlias = "npt.NDArray[np.uint16]"
Bytes: TypeAlias = "npt.NDArray[np.uint8]"

POOL_VALUES = 1 << 22
POOL_STRETCH = 1 << 16
POOL_BLOCKS = 1 << 18
CHUNK_VALUES = 1 << 20
CHUNK_BLOCKS = 1 << 17
BLOCK = 32  # stretches begin at whole blocks, so that the zero blocks of the pool stay whole
ROW_SPREAD = 5  # rows are scaled by 2^-2 to 2^2
BF16_ONE = 0x3F80
BF16_EXPONENT = 1 << 7
SCALE_BYTES = (112, 127)  # E8M0 scales from 2^-15 to 2^-1


class Values:
    """The pools of one seed, and the bytes of each tensor cut from them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._weights = np.concatenate([draw_weights(words) for words in word_stretches(f"{seed} weights")])
        # What one step of a row's exponent adds to the bits of each value: nothing to a zero of either sign.
        self._step = np.where(self._weights & 0x7FFF, np.uint16(BF16_EXPONENT), np.uint16(0))
        self._codes, self._scales = draw_blocks(seed)

    def chunks(self, tensor: Tensor) -> Iterator[npt.NDArray[np.generic]]:
        """The tensor's bytes in order, in pieces of a few megabytes."""
        if tensor.fill is Fill.WEIGHT:
            yield from self._weight_chunks(tensor)
        elif tensor.fill is Fill.NORM:
            (start,) = self._starts(tensor, 1, POOL_VALUES - tensor.spec.elements)
            found = self._weights[start : start + tensor.spec.elements]
            yield np.uint16(BF16_ONE) + (found & np.uint16(0x1F))
        else:
            yield from self._block_chunks(tensor)

    def _weight_chunks(self, tensor: Tensor) -> Iterator[Bits]:
        columns = tensor.spec.shape[-1]
        rows = tensor.spec.elements // columns
        rows_at_once = max(1, CHUNK_VALUES // columns)
        begins = range(0, rows, rows_at_once)
        starts = self._starts(tensor, len(begins), POOL_VALUES - rows_at_once * columns)
        shifts = raw_words(f"{self._seed} rows {tensor.name}", rows) % ROW_SPREAD
        # Added modulo 2^16, so that a negative shift is one as well.
        steps = shifts.astype(np.uint16) - np.uint16(ROW_SPREAD // 2)
        for begin, start in zip(begins, starts, strict=True):
            count = min(rows_at_once, rows - begin)
            shape = (count, columns)
            scaled = self._step[start : start + count * columns].reshape(shape) * steps[begin : begin + count, None]
            scaled += self._weights[start : start + count * columns].reshape(shape)
            yield scaled

    def _block_chunks(self, tensor: Tensor) -> Iterator[Bytes]:
        """Codes or scales: both parts of a weight take the same blocks of the pools."""
        pool = self._codes if tensor.fill is Fill.CODES else self._scales
        blocks = tensor.spec.nbytes * len(pool) // pool.nbytes
        begins = range(0, blocks, CHUNK_BLOCKS)
        for begin, start in zip(begins, self._starts(tensor, len(begins), POOL_BLOCKS - CHUNK_BLOCKS), strict=True):
            yield pool[start : start + min(CHUNK_BLOCKS, blocks - begin)]

    def _starts(self, tensor: Tensor, count: int, room: int) -> list[int]:
        """Where in a pool each of `count` stretches begins: a multiple of BLOCK, up to `room`."""
        words = raw_words(f"{self._seed} starts {tensor.weight}", count)
        return [int(word) % (room // BLOCK + 1) * BLOCK for word in words]


def generator(purpose: str) -> np.random.PCG64:
    """The generator whose words follow from `purpose` alone."""
    return np.random.PCG64(int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:16], "little"))


def raw_words(purpose: str, count: int) -> Words:
    return generator(purpose).random_raw(count)


def word_stretches(purpose: str) -> Iterator[Words]:
    """Words for the pool of weights, in stretches that keep the memory of drawing small."""
    words = generator(purpose)
    for _ in range(POOL_VALUES // POOL_STRETCH):
        yield words.random_raw(POOL_STRETCH)


def draw_weights(words: Words) -> Bits:
    """BF16 bits, one value a word: bell-shaped (deviation 0.018), 1 in 512 an outlier, 1 in 256 a zero of either sign.

    The first two blocks are all zero.
    """
    quarters = [((words >> np.uint64(12 * part)) & np.uint64(0xFFF)).astype(np.int32) for part in range(4)]
    # Four uniform values of 12 bits: their sum is a bell of deviation 2365 and mean 8190.
    bell = quarters[0] + quarters[1] + quarters[2] + quarters[3] - np.int32(8190)
    chance = (words >> np.uint64(48)) & np.uint64(0x1FF)
    stretch = (words >> np.uint64(57)) & np.uint64(3)
    exponent = np.where(chance == 0, stretch.astype(np.int32) + 2, 0) - 17
    bits = np.ldexp(np.abs(bell).astype(np.float32), exponent).view(np.uint32)
    rounded: Bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # half to even
    rounded[(chance == 1) | (chance == 2)] = 0
    rounded[: 2 * BLOCK] = 0
    rounded |= ((words >> np.uint64(59)) << np.uint64(15)).astype(np.uint16) & np.uint16(0x8000)
    return rounded


def draw_blocks(seed: int) -> tuple[Bytes, Bytes]:
    """Packed codes [n, 16] and E8M0 scales [n]; 1 block in 1024 is zero, half of those with a zero scale byte."""
    codes = raw_words(f"{seed} codes", POOL_BLOCKS * 2).astype("<u8").view(np.uint8).reshape(POOL_BLOCKS, 16)
    words = raw_words(f"{seed} scales", POOL_BLOCKS)
    low, beyond = SCALE_BYTES
    scales = (words % np.uint64(beyond - low)).astype(np.uint8) + np.uint8(low)
    chance = (words >> np.uint64(32)) & np.uint64(0x7FF)
    codes[chance < 2] = 0
    scales[chance == 0] = 0
    return codes, scales
