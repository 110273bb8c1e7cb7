"""Kernels that look at values and change none: what a tensor's values are, what its codes are, how far two tensors lie
apart.

Conventions are those of `compiled`: [N, K] with K-major arrays flagged `kn`, BF16 as uint16 bits, one thread, no GIL.
Sums are float64 and per row of N, in one fixed order: of a row-major array position j of every run of 64 values is
added up from left to right, then the 64 sums in halves; of a K-major array a row's values follow K. Counts and maxima
do not depend on an order. Differences of two float32 and their products are taken in float64.
"""

# ruff: noqa: PLR0917 -- compiled functions take their arguments by position

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fp4conv.kernels.contract import F32, F64, U8, Source, check_compare, flat, float_bits, logical
from fp4conv.kernels.jit import device, helper, kernel
from fp4conv.kernels.lanes import I32, FloatBits
from fp4conv.kernels.quantise import INF_BITS
from fp4conv.kernels.small_floats import E2M1_VALUES

I64 = npt.NDArray[np.int64]

SUMS = ("signal", "noise", "dot", "power")  # the order of the first axis of `sums`
LANES = 64  # sums of a row-major row that run side by side
CHUNK = 16 * LANES  # values taken at a time: what is held of them stays in the nearest cache
_ABS = np.int32(0x7FFFFFFF)
_NEUTRAL_LOW, _NEUTRAL_HIGH = np.int32(0x7FFFFFFF), np.int32(-0x80000000)

# Codes in the order of their values: -7 (code 15) .. 7, both zeros 0. Of each byte, the larger and the smaller of two.
_ORDER = np.array([code if code < 8 else 8 - code for code in range(16)], dtype=np.int8)
_HIGHER = np.array([max(_ORDER[byte & 15], _ORDER[byte >> 4]) for byte in range(256)], dtype=np.int8)
_LOWER = np.array([min(_ORDER[byte & 15], _ORDER[byte >> 4]) for byte in range(256)], dtype=np.int8)


# -- plain values -------------------------------------------------------------------------------


def survey(x: Source) -> tuple[float, float, int, int]:
    """(smallest, largest, zeros, not finite) of an array of any shape; inf and -inf where no value is finite."""
    bits, shift = float_bits(x)
    low, high, zeros, bad = _survey(bits, shift)
    if bad == bits.size:
        return np.inf, -np.inf, 0, int(bad)
    return _value_of(low), _value_of(high), int(zeros), int(bad)


def _value_of(key: int) -> float:
    """The float32 whose place in the order of values is `key`; 0.0 for both zeros."""
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    return float(np.int32(bits).view(np.float32)) + 0.0


@kernel
def _survey(x: FloatBits, shift: int) -> tuple[int, int, int, int]:
    low, high = _NEUTRAL_LOW, _NEUTRAL_HIGH
    zeros, bad = 0, 0
    for i in range(x.size):
        bits = np.int32(x[i] << shift)
        size = np.bitwise_and(bits, _ABS)
        # Sign and magnitude to two's complement: the order of integers is then that of the values.
        key = np.bitwise_xor(bits, np.bitwise_and(np.right_shift(bits, np.int32(31)), _ABS))
        finite = size < INF_BITS
        low = min(low, key if finite else _NEUTRAL_LOW)
        high = max(high, key if finite else _NEUTRAL_HIGH)
        zeros += int(size == np.int32(0))
        bad += int(size >= INF_BITS)
    return int(low), int(high), zeros, bad


# -- two tensors --------------------------------------------------------------------------------


def compare(x: Source, reference: Source, kn: bool, sums: F64) -> tuple[int, int, int, float, float]:
    """How far `x` lies from `reference`, both [N, K], or both [K, N] when `kn`.

    `sums` (float64 [4, N], overwritten) gets a row's sums of reference^2, (x - reference)^2, x * reference and x^2
    over pairs that are finite on both sides. Returns (pairs that differ, pairs that are not finite on both sides, those
    of them that differ, largest |x - reference|, largest |x - reference| / |reference| where the reference is not
    zero). Values differ as numbers: -0.0 is 0.0, and NaN is NaN.
    """
    n, k = check_compare(x, reference, kn, sums)
    (a, a_shift), (b, b_shift) = float_bits(x), float_bits(reference)
    peaks = np.zeros((2, CHUNK))
    run = _compare_columns if kn else _compare_rows
    differ, bad, odd = run(a, a_shift, b, b_shift, n, k, sums, peaks)
    return int(differ + odd), int(bad), int(odd), float(peaks[0].max()), float(peaks[1].max())


@kernel
def _compare_rows(
    a: FloatBits, a_shift: int, b: FloatBits, b_shift: int, n: int, k: int, sums: F64, peaks: F64
) -> tuple[int, int, int]:
    x, y = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
    lanes = np.empty((4, LANES), np.float64)
    differ, bad, bad_differ = 0, 0, 0
    for row in range(n):
        lanes[:] = 0.0
        for start in range(row * k, row * k + k, CHUNK):
            stop = min(start + CHUNK, row * k + k)
            size = stop - start
            padded = (size + LANES - 1) // LANES * LANES
            x[size:padded] = 0
            y[size:padded] = 0
            out, apart = _take(a[start:stop], a_shift, b[start:stop], b_shift, x[:size], y[:size])
            bad, bad_differ = bad + out, bad_differ + apart
            differ += _add(x[:padded], y[:padded], lanes[0], lanes[1], lanes[2], lanes[3], peaks)
        for number in range(4):
            sums[number, row] = _halved(lanes[number])
    return differ, bad, bad_differ


@kernel
def _compare_columns(
    a: FloatBits, a_shift: int, b: FloatBits, b_shift: int, n: int, k: int, sums: F64, peaks: F64
) -> tuple[int, int, int]:
    x, y = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    sums[:] = 0.0
    differ, bad, bad_differ = 0, 0, 0
    for row in range(k):
        for first in range(0, n, CHUNK):
            last = min(first + CHUNK, n)
            start, stop, size = row * n + first, row * n + last, last - first
            out, apart = _take(a[start:stop], a_shift, b[start:stop], b_shift, x[:size], y[:size])
            bad, bad_differ = bad + out, bad_differ + apart
            signal, noise = sums[0, first:last], sums[1, first:last]
            dot, power = sums[2, first:last], sums[3, first:last]
            differ += _add(x[:size], y[:size], signal, noise, dot, power, peaks)
    return differ, bad, bad_differ


@device
def _take(a: FloatBits, a_shift: int, b: FloatBits, b_shift: int, x: F32, y: F32) -> tuple[int, int]:
    """A chunk of pairs to `x` and `y`, with zeros for those that are not finite on both sides: (how many those are,
    how many of them differ)."""
    largest = max(_widen(a, a_shift, x.view(np.int32)), _widen(b, b_shift, y.view(np.int32)))
    return _leave_out(x, y) if largest >= INF_BITS else (0, 0)


@helper
def _widen(values: FloatBits, shift: int, out: I32) -> np.int32:
    """float32 bits to `out`; returns the largest magnitude among them."""
    largest = np.int32(0)
    for i in range(values.size):
        bits = np.int32(values[i] << shift)
        out[i] = bits
        largest = max(largest, np.bitwise_and(bits, _ABS))
    return largest


@helper
def _leave_out(x: F32, y: F32) -> tuple[int, int]:
    """Zero the pairs that are not finite on both sides: (how many there are, how many of them differ)."""
    bad, differ = 0, 0
    for i in range(x.size):
        if not (np.isfinite(x[i]) and np.isfinite(y[i])):
            bad += 1
            differ += int(not (x[i] == y[i] or (np.isnan(x[i]) and np.isnan(y[i]))))
            x[i] = np.float32(0)
            y[i] = np.float32(0)
    return bad, differ


@helper
def _add(x: F32, y: F32, signal: F64, noise: F64, dot: F64, power: F64, peaks: F64) -> int:
    """Add a chunk of pairs to sums of as many lanes as they have; returns how many differ. One loop a result: with
    several arrays written in one, LLVM fears that they overlap."""
    largest, relative = peaks[0], peaks[1]
    differ = 0
    for i in range(x.size):
        differ += int(x[i] != y[i])
    _add_products(y, y, signal)
    _add_products(x, y, dot)
    _add_products(x, x, power)
    if differ:
        _add_squares(x, y, noise)
        for i in range(x.size):
            apart = abs(np.float64(x[i]) - np.float64(y[i]))
            largest[i] = apart if apart > largest[i] else largest[i]
        for i in range(x.size):
            apart, size = abs(np.float64(x[i]) - np.float64(y[i])), abs(np.float64(y[i]))
            ratio = apart / size if size > 0.0 else 0.0
            relative[i] = ratio if ratio > relative[i] else relative[i]
    return differ


@helper
def _add_products(x: F32, y: F32, lanes: F64) -> None:
    width = lanes.size
    for start in range(0, x.size, width):
        left, right = x[start : start + width], y[start : start + width]
        for j in range(width):
            lanes[j] += np.float64(left[j]) * np.float64(right[j])


@helper
def _add_squares(x: F32, y: F32, lanes: F64) -> None:
    width = lanes.size
    for start in range(0, x.size, width):
        left, right = x[start : start + width], y[start : start + width]
        for j in range(width):
            apart = np.float64(left[j]) - np.float64(right[j])
            lanes[j] += apart * apart


@helper
def _halved(lanes: F64) -> float:
    """The sum of LANES sums, first half onto second until one is left."""
    half = LANES // 2
    while half:
        for j in range(half):
            lanes[j] += lanes[j + half]
        half //= 2
    return float(lanes[0])


# -- codes and scales ---------------------------------------------------------------------------


class BlockCounts(NamedTuple):
    """What the blocks of a tensor are, added up over the pieces of it that were counted.

    `pairs` [256]: packed bytes. `magnitudes` [256, 8]: blocks by scale byte and by the largest |code| in them.
    `high`, `low` [256]: under each scale byte, the highest and lowest code in the order -7 .. 7. `codes` [256, 16]:
    codes under each scale byte that was named special.
    """

    pairs: I64
    magnitudes: I64
    high: I64
    low: I64
    codes: I64

    @classmethod
    def none(cls) -> BlockCounts:
        pairs, magnitudes, codes = np.zeros(256, np.int64), np.zeros((256, 8), np.int64), np.zeros((256, 16), np.int64)
        return cls(pairs, magnitudes, np.full(256, -8, np.int64), np.full(256, 8, np.int64), codes)

    def add(self, other: BlockCounts) -> None:
        np.add(self.pairs, other.pairs, out=self.pairs)
        np.add(self.magnitudes, other.magnitudes, out=self.magnitudes)
        np.maximum(self.high, other.high, out=self.high)
        np.minimum(self.low, other.low, out=self.low)
        np.add(self.codes, other.codes, out=self.codes)


def count_blocks(packed: U8, scales: U8, kn: bool, special: npt.NDArray[np.bool_], counts: BlockCounts) -> None:
    """Add the blocks of packed [N, K/2] under scales [N, K/g] (both K-major when `kn`) to `counts`.

    `special` [256]: scale bytes under which every code is counted, for they make values that are zero or not finite.
    """
    n, blocks = logical(scales.shape, kn)
    half = logical(packed.shape, kn)[1] // blocks if blocks else 1
    assert logical(packed.shape, kn) == (n, half * blocks), f"{scales.shape} scales for codes {packed.shape}"
    assert packed.dtype == scales.dtype == np.uint8, "packed codes and scales are bytes"
    run = _count_columns if kn else _count_rows
    run(flat(packed), flat(scales), n, blocks, half, special, counts)


@kernel
def _count_rows(
    packed: U8, scales: U8, n: int, blocks: int, half: int, special: npt.NDArray[np.bool_], counts: BlockCounts
) -> None:
    # Two tables by turns: equal bytes often follow each other, and an addition waits for the one before it.
    even, odd = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for block in range(n * blocks):
        start = block * half
        highest, lowest = -8, 8
        for i in range(start, start + half, 2):
            first, second = packed[i], packed[i + 1]
            even[first] += 1
            odd[second] += 1
            highest = max(highest, _HIGHER[first], _HIGHER[second])
            lowest = min(lowest, _LOWER[first], _LOWER[second])
        _note(counts, int(scales[block]), lowest, highest)
        if special[scales[block]]:
            _count_codes(packed, range(start, start + half), counts, int(scales[block]))
    counts.pairs[:] += even + odd


@kernel
def _count_columns(
    packed: U8, scales: U8, n: int, blocks: int, half: int, special: npt.NDArray[np.bool_], counts: BlockCounts
) -> None:
    highest, lowest = np.empty(n, np.int8), np.empty(n, np.int8)
    for block in range(blocks):
        highest[:] = -8
        lowest[:] = 8
        for i in range(block * half, block * half + half):
            row = packed[i * n : i * n + n]
            for j in range(n):
                byte = row[j]
                counts.pairs[byte] += 1
                highest[j] = max(highest[j], _HIGHER[byte])
                lowest[j] = min(lowest[j], _LOWER[byte])
        for j in range(n):
            scale = int(scales[block * n + j])
            _note(counts, scale, int(lowest[j]), int(highest[j]))
            if special[scale]:
                _count_codes(packed, range(block * half * n + j, (block + 1) * half * n, n), counts, scale)


@device
def _note(counts: BlockCounts, scale: int, lowest: int, highest: int) -> None:
    """Count a block under scale byte `scale`, by its lowest and highest code in the order of values."""
    counts.magnitudes[scale, max(highest, -lowest)] += 1
    counts.high[scale] = max(counts.high[scale], highest)
    counts.low[scale] = min(counts.low[scale], lowest)


@device
def _count_codes(packed: U8, places: range, counts: BlockCounts, scale: int) -> None:
    for i in places:
        counts.codes[scale, packed[i] & 15] += 1
        counts.codes[scale, packed[i] >> 4] += 1


def block_values(factors: F32) -> F32:
    """[256, 16]: what each code is under each factor."""
    with np.errstate(all="ignore"):
        return (factors[:, None] * E2M1_VALUES[None, :]).astype(np.float32)


def special_scales(values: F32) -> npt.NDArray[np.bool_]:
    """[256]: scale bytes that turn a code into a value of another order, a zero or something not finite.

    `values` [256, 16] are those of `block_values`.
    """
    positive = values[:, 1:8]
    return ~np.logical_and(np.isfinite(positive), positive > 0).all(axis=1)  # type: ignore[return-value]
