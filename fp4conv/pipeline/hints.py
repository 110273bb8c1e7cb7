"""What happens to one unit for its round-trip hints: noted when it is decoded, put back when it is encoded.

On the way back nothing is believed: a block, or a set that shares a tensor scale, takes its hint only where the codes
found under it decode to exactly the values that are there now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fp4conv.codecs.base import Codes, Rows, Tally
from fp4conv.formats import MXFP4, BlockFormat
from fp4conv.hints.runs import Run
from fp4conv.hints.values import INDEX_BYTES, Hint
from fp4conv.kernels import hints as kernels
from fp4conv.kernels.hints import NO_HINT
from fp4conv.model import Decoded, Weight
from fp4conv.pipeline.hint_log import HintLog
from fp4conv.pipeline.matrices import Scratch, read_rows
from fp4conv.plan import Unit
from fp4conv.safetensors_io import Reader, TensorRef

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
CHUNK_BLOCKS = 512  # blocks looked at together where they have to be gathered one by one


def blocks_of(unit: Unit, fmt: BlockFormat) -> tuple[int, int]:
    """(first, end): the numbers of a unit's blocks within its weight; see `hints.values.Hint`."""
    weight = _weight(unit)
    per_row = weight.k // fmt.block
    first = unit.index * weight.n
    return (first + unit.n0) * per_row, (first + unit.n1) * per_row


# ---- the way there


@dataclass(frozen=True)
class Decoding:
    """A unit that was decoded: its codes, and what became of them in `dense` (F16 widened) of type `dtype`.

    `tensor_scale`: as stored, of NVFP4.
    """

    unit: Unit
    codes: Codes
    dense: Rows
    dtype: str
    tensor_scale: float = 1.0


def note(log: HintLog, decoding: Decoding) -> Run | None:
    """Log what a unit's values do not tell of its codes and, for MXFP4, of its scales. None where they tell all."""
    value = _decoded(decoding.unit)
    fmt = value.format
    factor = kernels.factors(fmt, decoding.tensor_scale, inverse=value.inverse)
    tables = kernels.code_tables(factor, decoding.dtype)
    unsure = kernels.uncertain_bytes(tables, factor) if fmt is MXFP4 else kernels.ambiguous_bytes(tables)
    if fmt is not MXFP4 and not unsure[decoding.codes.block_scale].any():
        return None
    scales = _own_blocks(decoding.codes, value)
    plane = np.full(scales.size, NO_HINT, np.uint8)
    if fmt is MXFP4:
        assert not decoding.codes.kn, "no layout holds MXFP4 K-major"
        kernels.noncanonical_mxfp4(decoding.codes.packed, decoding.codes.block_scale, plane)
    lost = []
    for blocks in _chunks(np.flatnonzero(unsure[scales])):
        packed = kernels.take_codes(decoding.codes.packed, decoding.codes.kn, blocks, fmt.block // 2)
        if fmt is MXFP4:  # but a block of zeros with scale byte 0 is what encoding makes of zeros
            told = blocks[(packed & 0x77).any(axis=1) | (scales[blocks] != 0)]
            plane[told] = scales[told]
        lost.append(blocks[_not_found(decoding, blocks, packed, scales[blocks], tables)])
    index = np.concatenate([*lost, np.empty(0, np.int64)])
    noted = kernels.take_codes(decoding.codes.packed, decoding.codes.kn, index, fmt.block // 2)
    return log.append(blocks_of(decoding.unit, fmt)[0], plane, index, noted)


def _own_blocks(codes: Codes, value: Decoded) -> U8:
    """Scale bytes in the order of the blocks' numbers, for blocks of the format's own length."""
    scales = codes.block_scale.T if codes.kn else codes.block_scale
    return np.repeat(scales, value.block // value.format.block, axis=1).reshape(-1)


def _chunks(blocks: Numbers) -> Iterator[Numbers]:
    return (blocks[i : i + CHUNK_BLOCKS] for i in range(0, blocks.size, CHUNK_BLOCKS))


def _not_found(decoding: Decoding, blocks: Numbers, packed: U8, scales: U8, tables: F32) -> npt.NDArray[np.bool_]:
    """Which blocks [B] of `packed` [B, half] are not the codes that their values give under their scales."""
    values = kernels.take_blocks(decoding.dense.array, decoding.dense.kn, blocks, 2 * packed.shape[1])
    found, matched = np.empty_like(packed), np.empty((blocks.size, 1), np.uint8)
    column = scales[:, None]
    missed = kernels.restore(values, False, column, False, tables, found, column.copy(), False, matched)
    assert missed == 0, "what was decoded is in its table"
    wrong: npt.NDArray[np.bool_] = (found != packed).any(axis=1)
    return wrong


# ---- the way back


@dataclass(frozen=True)
class Encoding:
    """A dense unit that is encoded: `rows` (F16 widened) to `codes`. `tally` is None where nothing is measured."""

    unit: Unit
    rows: Rows
    codes: Codes
    tally: Tally | None = None


@dataclass(frozen=True)
class Restored:
    """How many blocks took their hint, and how many have one that does not fit any more."""

    used: int
    stale: int


def restore_mxfp4(reader: Reader, hint: Hint, encoding: Encoding) -> Restored:
    """Put the hinted blocks of a unit in place of what encoding its rows made of them."""
    plane = read_plane(reader, hint, *blocks_of(encoding.unit, MXFP4))
    if plane is None:
        return Restored(0, 0)
    rows = encoding.unit.n1 - encoding.unit.n0
    factor = kernels.factors(MXFP4)
    done = _restore(reader, hint, encoding, (plane.reshape(rows, -1), False), factor)
    if hint.dtype == "F16":  # which rounded: the error is that of the codes that came back
        _measure(encoding, factor)
    return done


def restore_nvfp4(reader: Reader, hint: Hint, encoding: Encoding, scratch: Scratch) -> Restored:
    """Encode a unit by its hint alone. Where a block is stale its codes are unspecified."""
    assert hint.block_scale is not None
    plane = read_rows(reader, hint.block_scale, hint.kn, encoding.unit, scratch, part="hinted scales")
    if hint.block != hint.format.block:
        plane = np.repeat(plane, hint.block // hint.format.block, axis=0 if hint.kn else 1)
    factor = kernels.factors(hint.format, hinted_tensor_scale(reader, hint), inverse=hint.inverse)
    done = _restore(reader, hint, encoding, (plane, hint.kn), factor)  # type: ignore[arg-type]
    if encoding.tally is not None:
        _measure(encoding, factor)
    return done


def hinted_tensor_scale(reader: Reader, hint: Hint) -> float:
    """The F32 scalar as it was stored; NaN, which fits nothing, where it is not finite and greater than zero."""
    assert hint.tensor_scale is not None
    scale = np.empty(1, np.float32)
    reader.read_into(hint.tensor_scale.file, hint.tensor_scale.offset, scale)
    return float(scale[0]) if np.isfinite(scale[0]) and scale[0] > 0 else float("nan")


def _restore(reader: Reader, hint: Hint, encoding: Encoding, plane: tuple[U8, bool], factor: F32) -> Restored:
    """`plane`: (scale bytes or NO_HINT, whether they lie K-major)."""
    tables, rows, codes = kernels.code_tables(factor, hint.dtype), encoding.rows, encoding.codes
    scales, scales_kn = plane
    index, noted = read_codes(reader, hint, *blocks_of(encoding.unit, hint.format))
    bad = np.empty(0, np.int64)
    if index.size:
        scales, scales_kn = (np.ascontiguousarray(scales.T) if scales_kn else scales.copy()), False
        flat = scales.reshape(-1)
        bad = index[~_reproduced(rows, index, flat[index], noted, tables)]
        flat[bad] = NO_HINT  # stale: other codes might give these values, but they are not what was there
    matched = np.empty(scales.T.shape if scales_kn else scales.shape, np.uint8)
    missed = kernels.restore(
        rows.array, rows.kn, scales, scales_kn, tables, codes.packed, codes.block_scale, codes.kn, matched
    )
    kept = ~np.isin(index, bad)
    for part in _chunks(np.flatnonzero(kept)):
        kernels.put_codes(codes.packed, codes.kn, index[part], noted[part])
    return Restored(int(matched.sum(dtype=np.int64)), missed + bad.size)


def _reproduced(rows: Rows, index: Numbers, scales: U8, noted: U8, tables: F32) -> npt.NDArray[np.bool_]:
    """Which numbered blocks [B] are what their noted codes decode to."""
    found = np.empty(index.size, np.bool_)
    for part in _chunks(np.arange(index.size)):
        found[part] = kernels.codes_reproduce(rows.array, rows.kn, index[part], scales[part], noted[part], tables)
    return found


def _measure(encoding: Encoding, factor: F32) -> None:
    rows, codes, tally = encoding.rows, encoding.codes, encoding.tally
    assert tally is not None
    kernels.measure(rows.array, rows.kn, codes.packed, codes.block_scale, codes.kn, factor, tally.signal, tally.noise)


# ---- records in their final place


def read_plane(reader: Reader, hint: Hint, first: int, end: int) -> U8 | None:
    """The scale bytes [end - first] of MXFP4 blocks first:end, NO_HINT where none was noted; None where none was."""
    if hint.scales is None:
        return None
    if hint.index is None:
        plane = np.empty(end - first, np.uint8)
        reader.read_into(hint.scales.file, hint.scales.offset + first, plane)
        return plane if (plane != NO_HINT).any() else None
    start, numbers = _numbers(reader, hint.index, first, end)
    if not numbers.size:
        return None
    noted = np.empty(numbers.size, np.uint8)
    reader.read_into(hint.scales.file, hint.scales.offset + start, noted)
    plane = np.full(end - first, NO_HINT, np.uint8)
    plane[numbers - first] = noted
    return plane


def read_codes(reader: Reader, hint: Hint, first: int, end: int) -> tuple[Numbers, U8]:
    """(numbers counted from `first` [C], codes [C, half]) of the blocks first:end whose codes were noted."""
    half = hint.format.block // 2
    if hint.codes is None or hint.code_index is None:
        return np.empty(0, np.int64), np.empty((0, half), np.uint8)
    start, numbers = _numbers(reader, hint.code_index, first, end)
    noted = np.empty((numbers.size, half), np.uint8)
    if numbers.size:
        reader.read_into(hint.codes.file, hint.codes.offset + start * half, noted)
    return numbers - first, noted


def _numbers(reader: Reader, index: TensorRef, first: int, end: int) -> tuple[int, Numbers]:
    """(where they begin, the numbers) of a rising U32 `index` that lie in first:end."""
    start, stop = _search(reader, index, first), _search(reader, index, end)
    numbers = np.empty(stop - start, "<u4")
    if numbers.size:
        reader.read_into(index.file, index.offset + start * INDEX_BYTES, numbers)
    return start, numbers.astype(np.int64)


def _search(reader: Reader, index: TensorRef, number: int) -> int:
    """How many of the rising numbers of `index` are below `number`."""
    low, high = 0, index.spec.elements
    probe = np.empty(1, "<u4")
    while low < high:
        middle = (low + high) // 2
        reader.read_into(index.file, index.offset + middle * INDEX_BYTES, probe)
        low, high = (middle + 1, high) if int(probe[0]) < number else (low, middle)
    return low


def _decoded(unit: Unit) -> Decoded:
    value = _weight(unit).value
    assert isinstance(value, Decoded)
    return value


def _weight(unit: Unit) -> Weight:
    assert unit.step.weight is not None
    return unit.step.weight
