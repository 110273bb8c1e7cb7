"""Kernels of round-trip hints: which blocks need one, and finding the codes that given scales decode to given values.

A hint is the scale byte that a block had before it was decoded. Encoding finds another one where the largest code was
3 or less, and NVFP4's tensor scale nowhere. With the scale known, the codes follow from the values by looking them up
in the eight values that the scale has; that is exact or it is nothing, so an old hint can do no harm.

Conventions are those of `compiled`: [N, K] with K-major arrays flagged `kn`, BF16 as uint16 bits. `code_tables` holds
what codes 0..7 decode to under each scale byte, rounded as the dense checkpoint was: the kernels round nothing.
"""

# ruff: noqa: PLR0917 -- the arrays of a call come in one fixed order everywhere

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fp4conv.formats import E8M0_BIAS, MXFP4, BlockFormat
from fp4conv.kernels.contract import F32, F64, U8, Source, check_measure, check_restore, flat, float_bits
from fp4conv.kernels.jit import device, helper, kernel
from fp4conv.kernels.lanes import (
    I32,
    LANES,
    FloatBits,
    add_to_rows,
    lane_stride,
    load_bytes,
    load_floats,
    origin,
    store,
    tile_count,
    tile_of,
)
from fp4conv.kernels.quantise import pack, square_sums, squared_error, sum_lanes
from fp4conv.kernels.small_floats import E2M1_VALUES, E4M3_VALUES, bf16_to_f32, f32_to_bf16

NO_HINT = 255  # as a scale byte: NaN in E8M0 and in E4M3, which no valid checkpoint has
_ABS = np.int32(0x7FFFFFFF)
_MAGNITUDES = E2M1_VALUES[:8].copy()
_BELOW = np.array([0, 3, 2, 2, 1, 1], dtype=np.int32)  # by largest code: how far below the scale the implied one is


# -- tables -------------------------------------------------------------------------------------


def factors(fmt: BlockFormat, tensor_scale: float = 1.0, *, inverse: bool = False) -> F32:
    """[256]: what codes are multiplied by under each scale byte; NaN for bytes that no valid checkpoint has.

    2^(byte - 127) for MXFP4, F32(E4M3 x tensor scale) for NVFP4, or with `inverse` F32(E4M3 / tensor scale), where
    E4M3 bytes with a sign bit count as invalid, 0x80 too.
    """
    if fmt is MXFP4:
        powers = np.exp2(np.arange(NO_HINT) - np.float64(E8M0_BIAS)).astype(np.float32)
        return np.append(powers, np.float32(np.nan))
    scales = E4M3_VALUES.copy()
    scales[127:] = np.nan
    with np.errstate(all="ignore"):
        return scales / np.float32(tensor_scale) if inverse else scales * np.float32(tensor_scale)


def code_tables(factor: F32, dtype: str) -> F32:
    """[256, 8]: the float32 values of codes 0..7 under each factor, rounded to `dtype` ('BF16', 'F16' or 'F32')."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact: F32 = factor[:, None] * _MAGNITUDES
        if dtype == "BF16":
            return bf16_to_f32(f32_to_bf16(exact))
        return exact.astype(np.float16).astype(np.float32) if dtype == "F16" else exact


def uncertain_bytes(tables: F32, factor: F32) -> npt.NDArray[np.bool_]:
    """[256]: scale bytes under which two codes decode to one value, or a code to a value that was rounded.

    `tables` are `code_tables` of `factor`. For NVFP4 in BF16 nearly every value is rounded: ask `ambiguous_bytes`.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = (tables != factor[:, None] * _MAGNITUDES).any(axis=1)
    found: npt.NDArray[np.bool_] = ambiguous_bytes(tables) | (rounded & ~np.isnan(factor))
    return found


def ambiguous_bytes(tables: F32) -> npt.NDArray[np.bool_]:
    """[256]: scale bytes under which two codes of one sign decode to the same value."""
    found: npt.NDArray[np.bool_] = (tables[:, 1:] == tables[:, :-1]).any(axis=1)
    return found


# -- kernels ------------------------------------------------------------------------------------


def noncanonical_mxfp4(packed: U8, scales: U8, plane: U8) -> int:
    """Which blocks of MXFP4 [N, K/2], [N, K/32] have another scale than encoding their values would give them.

    Every rule gives exactly representable values the scale that puts the largest on code 4 or 6 (byte 0 at the
    least, and for a block of zeros). `plane` [N, K/32] gets the scale byte of the other blocks, and NO_HINT elsewhere.
    Returns how many there are.
    """
    assert packed.size == 16 * scales.size, f"{scales.size} scales for {packed.size} bytes of codes"
    assert plane.size == scales.size, f"a plane of {plane.size} for {scales.size} scales"
    return int(_noncanonical(flat(packed), flat(scales), plane.reshape(-1)))


def restore(
    x: Source,
    x_kn: bool,
    plane: U8,
    plane_kn: bool,
    tables: F32,
    packed: U8,
    scales: U8,
    out_kn: bool,
    matched: U8,
) -> int:
    """Put the codes and scales of hinted blocks in place of what encoding made of them.

    `plane` [N, K/g]: the scale byte of each hinted block, NO_HINT for the others, which are left as they are. A block
    matches when each |x| is in its scale's row of `tables` [256, 8]; then `packed` and `scales` get the smallest
    such codes with the signs of x, and the scale, and `matched` [N, K/g] (row-major) 1, else 0.

    Returns how many hinted blocks did not match.
    """
    n, k, length = check_restore(x, x_kn, plane, plane_kn, tables, packed, scales, out_kn, matched)
    bits, shift = float_bits(x)
    return int(
        _restore(
            bits, shift, n, k, length, x_kn, flat(plane), plane_kn, tables,
            packed.reshape(-1), scales.reshape(-1), out_kn, matched.reshape(-1),
        )
    )  # fmt: skip


def measure(
    x: Source, x_kn: bool, packed: U8, scales: U8, codes_kn: bool, factor: F32, signal: F64, noise: F64
) -> None:
    """`signal` and `noise` (see `compiled`) of given codes and scales [N, K/g], under `factors`, against x [N, K]."""
    n, k, length = check_measure(x, x_kn, packed, scales, codes_kn, factor, signal, noise)
    bits, shift = float_bits(x)
    _measure(bits, shift, n, k, length, x_kn, flat(packed), flat(scales), codes_kn, factor, signal, noise)


@kernel
def _noncanonical(packed: U8, scales: U8, plane: U8) -> int:
    count = 0
    for block in range(scales.size):
        run = packed[16 * block : 16 * block + 16]
        plane[block] = NO_HINT
        both = np.uint8(0)  # codes 6 and 7 have both of their upper bits: the scale is the implied one
        for i in range(16):
            both |= np.uint8(run[i] & (run[i] << 1))
        if both & 0x44:
            continue
        largest = 0
        for i in range(16):
            largest = max(largest, run[i] & 7, (run[i] >> 4) & 7)
        implied = 0 if largest == 0 else max(int(scales[block]) - _BELOW[largest], 0)
        if scales[block] != implied:
            plane[block] = scales[block]
            count += 1
    return count


@helper
def _load_tables(hints: U8, lanes: int, tables: F32, table: F32, fits: U8) -> int:
    """The tables of a tile's lanes side by side, [8, LANES]; `fits` is where there is a hint. Returns how many."""
    wanted = 0
    for j in range(LANES):
        fits[0, j] = j < lanes and hints[0, j] != NO_HINT
        wanted += int(fits[0, j])
        for c in range(8):
            table[c, j] = tables[hints[0, j] if j < lanes else NO_HINT, c]
    return wanted


@helper
def _look_up(bits: I32, table: F32, codes: U8, fits: U8) -> None:
    """codes [length, LANES] of float32 bits by table [8, LANES], rising; `fits` loses lanes with a value not in it."""
    magnitude, code, equal = np.empty(LANES, np.int32), np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    values = magnitude.view(np.float32)
    for i in range(bits.shape[0]):
        row, target = bits[i], codes[i]
        for j in range(LANES):
            magnitude[j] = row[j] & _ABS
            code[j] = 0
            equal[j] = 0
        for c in range(8):
            candidates = table[c]
            for j in range(LANES):
                code[j] += np.int32(candidates[j] < values[j])
                equal[j] |= np.int32(candidates[j] == values[j])
        for j in range(LANES):
            target[j] = np.uint8((code[j] & 7) | (8 if row[j] < 0 else 0))
            fits[0, j] &= np.uint8(equal[j])


@device
def _overlay(tile: U8, fits: U8, held: U8, out: U8, start: int, kn: bool, stride: int, lanes: int) -> None:
    """Store the lanes of `tile` that fit; the others keep what `out` has. `held` is scratch of the same shape."""
    load_bytes(out, start, kn, stride, lanes, held)
    for i in range(tile.shape[0]):
        kept, new = held[i], tile[i]
        for j in range(LANES):
            kept[j] = new[j] if fits[0, j] else kept[j]
    store(held, out, start, kn, stride, lanes)


@kernel
def _restore(
    x: FloatBits,
    shift: int,
    n: int,
    k: int,
    length: int,
    x_kn: bool,
    plane: U8,
    plane_kn: bool,
    tables: F32,
    packed: U8,
    scales: U8,
    out_kn: bool,
    matched: U8,
) -> int:
    """Arrays flat but for the tables."""
    by_rows, blocks, half = x_kn or plane_kn or out_kn, k // length, length // 2
    bits, codes = np.empty((length, LANES), np.int32), np.empty((length, LANES), np.uint8)
    found, held = np.zeros((half, LANES), np.uint8), np.zeros((half, LANES), np.uint8)
    hints, held_scales = np.zeros((1, LANES), np.uint8), np.zeros((1, LANES), np.uint8)
    fits, table = np.empty((1, LANES), np.uint8), np.empty((8, LANES), np.float32)
    missed = 0
    for number in range(tile_count(n, blocks, by_rows)):
        row, block, lanes = tile_of(number, n, blocks, by_rows)
        by_block = lane_stride(blocks, 1, by_rows)
        stride = n if plane_kn else by_block
        load_bytes(plane, origin(row, block, n, blocks, 1, plane_kn), plane_kn, stride, lanes, hints)
        wanted = _load_tables(hints, lanes, tables, table, fits)
        if wanted:
            stride = n if x_kn else lane_stride(k, length, by_rows)
            load_floats(x, shift, origin(row, block, n, k, length, x_kn), x_kn, stride, lanes, bits)
            _look_up(bits, table, codes, fits)
            pack(codes, found)
            stride = n if out_kn else lane_stride(k // 2, half, by_rows)
            start = origin(row, block, n, k // 2, half, out_kn)
            _overlay(found, fits, held, packed, start, out_kn, stride, lanes)
            stride = n if out_kn else by_block
            start = origin(row, block, n, blocks, 1, out_kn)
            _overlay(hints, fits, held_scales, scales, start, out_kn, stride, lanes)
            for j in range(LANES):
                missed -= int(fits[0, j])
        missed += wanted
        store(fits, matched, origin(row, block, n, blocks, 1, False), False, by_block, lanes)
    return missed


@kernel
def _measure(
    x: FloatBits,
    shift: int,
    n: int,
    k: int,
    length: int,
    x_kn: bool,
    packed: U8,
    scales: U8,
    codes_kn: bool,
    factor: F32,
    signal: F64,
    noise: F64,
) -> None:
    by_rows, blocks, half = x_kn or codes_kn, k // length, length // 2
    values, errors = np.empty((length, LANES), np.float32), np.empty((length, LANES), np.float64)
    bits = values.view(np.int32)
    codes, scale = np.empty((half, LANES), np.uint8), np.empty((1, LANES), np.uint8)
    terms, sums = np.empty(half * LANES, np.float64), np.empty(LANES, np.float64)
    signal[:] = 0.0
    noise[:] = 0.0
    codes[:, :] = 0
    scale[:, :] = 0
    for number in range(tile_count(n, blocks, by_rows)):
        row, block, lanes = tile_of(number, n, blocks, by_rows)
        stride = n if x_kn else lane_stride(k, length, by_rows)
        load_floats(x, shift, origin(row, block, n, k, length, x_kn), x_kn, stride, lanes, bits)
        stride = n if codes_kn else lane_stride(k // 2, half, by_rows)
        load_bytes(packed, origin(row, block, n, k // 2, half, codes_kn), codes_kn, stride, lanes, codes)
        stride = n if codes_kn else lane_stride(blocks, 1, by_rows)
        load_bytes(scales, origin(row, block, n, blocks, 1, codes_kn), codes_kn, stride, lanes, scale)
        for i in range(half):
            for j in range(LANES):
                by, pair = factor[scale[0, j]], codes[i, j]
                errors[2 * i, j] = squared_error(values[2 * i, j], _MAGNITUDES[pair & 7], by)
                errors[2 * i + 1, j] = squared_error(values[2 * i + 1, j], _MAGNITUDES[(pair >> 4) & 7], by)
        for i in range(half):
            for j in range(LANES):
                terms[i * LANES + j] = errors[i, j] + errors[i + half, j]
        sum_lanes(terms, half, sums)
        add_to_rows(sums, noise, row, block, blocks, lanes, by_rows)
        square_sums(values, terms, sums)
        add_to_rows(sums, signal, row, block, blocks, lanes, by_rows)


# -- blocks by number, for the few whose codes are hinted -----------------------------------------


def take_codes(packed: U8, kn: bool, blocks: npt.NDArray[np.int64], half: int) -> U8:
    """The packed codes [B, half] of the blocks numbered n * (K / g) + k / g of `packed` [N, K/2]."""
    rows, columns = _places(packed, kn, blocks, half)
    return packed[columns, rows] if kn else packed[rows, columns]


def take_blocks(x: Source, kn: bool, blocks: npt.NDArray[np.int64], length: int) -> Source:
    """The values [B, length] of numbered blocks of x [N, K]."""
    rows, columns = _places(x, kn, blocks, length)
    return x[columns, rows] if kn else x[rows, columns]


def put_codes(packed: U8, kn: bool, blocks: npt.NDArray[np.int64], codes: U8) -> None:
    """Write the packed codes [B, half] of the blocks with these numbers."""
    rows, columns = _places(packed, kn, blocks, codes.shape[1])
    packed[(columns, rows) if kn else (rows, columns)] = codes


def codes_reproduce(
    x: Source, x_kn: bool, blocks: npt.NDArray[np.int64], scale: U8, codes: U8, tables: F32
) -> npt.NDArray[np.bool_]:
    """[B]: whether packed `codes` [B, half] under scale bytes [B] decode to exactly the x of these blocks."""
    taken = take_blocks(x, x_kn, blocks, 2 * codes.shape[1])
    values = bf16_to_f32(taken) if taken.dtype == np.uint16 else taken.astype(np.float32)  # type: ignore[arg-type]
    single = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), 2 * codes.shape[1])
    decoded = tables[scale[:, None], single & 7]
    same: npt.NDArray[np.bool_] = (np.abs(values) == decoded) & (np.signbit(values) == (single > 7))
    whole: npt.NDArray[np.bool_] = np.all(same, axis=1)
    return whole


def _places(
    array: npt.NDArray[Any], kn: bool, blocks: npt.NDArray[np.int64], length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(row [B, 1], columns [B, length]) of numbered blocks of `length` items of a logical [N, items] array."""
    per_row = (array.shape[0] if kn else array.shape[1]) // length
    return (blocks // per_row)[:, None], (blocks % per_row)[:, None] * length + np.arange(length)
