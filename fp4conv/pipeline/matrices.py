"""Rows of stored matrices: where they lie, in either orientation, and the memory that holds them meanwhile."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.model import Weight
from fp4conv.pipeline.shelf import Shelf
from fp4conv.plan import Output, Unit
from fp4conv.safetensors_io import DTYPE_BYTES, Reader, TensorRef, numpy_dtype

Array = npt.NDArray[np.generic]


class Scratch:
    """The memory of one worker: an array a purpose, kept and grown, so that nothing is allocated a unit."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def array(self, purpose: str, shape: tuple[int, ...], dtype: str) -> Array:
        """A C-contiguous array of safetensors type `dtype` for `purpose`; its old contents are gone."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
        held = self._held.get(purpose)
        if held is None or held.nbytes < nbytes:
            held = self._held[purpose] = np.empty(nbytes, np.uint8)
        return held[:nbytes].view(numpy_dtype(dtype)).reshape(shape)


def rows_shape(weight: Weight, elements: int, kn: bool, unit: Unit) -> tuple[int, int]:
    """Shape of a unit's rows of a part that has `elements` elements in all: (rows, columns), or swapped when `kn`."""
    columns = elements // (weight.matrices * weight.n)
    rows = unit.n1 - unit.n0
    return (columns, rows) if kn else (rows, columns)


def read_rows(reader: Reader, ref: TensorRef, kn: bool, unit: Unit, scratch: Scratch, *, part: str) -> Array:
    """The unit's rows of one stored part: [rows, columns], or [columns, rows] when it lies K-major.

    `part` names the memory that holds them until the worker's next read of the same part.
    """
    weight = unit.step.weight
    assert weight is not None
    shape = rows_shape(weight, ref.spec.elements, kn, unit)
    out = scratch.array(f"stored {part}", shape, ref.spec.dtype)
    item = DTYPE_BYTES[ref.spec.dtype]
    if not kn:
        start = (unit.index * weight.n + unit.n0) * shape[1] * item
        reader.read_into(ref.file, ref.offset + start, out)
        return out
    start = (unit.index * shape[0] * weight.n + unit.n0) * item
    reader.read_strided(
        ref.file, ref.offset + start, out, row_bytes=shape[1] * item, row_stride=weight.n * item, rows=shape[0]
    )
    return out


def write_rows(writers: Shelf, output: Output, unit: Unit, rows: Array) -> None:
    """Put the unit's rows of one output where they belong; `rows` as `rows_shape` has it."""
    weight = unit.step.weight
    assert weight is not None
    writer, item = writers[output.file], rows.itemsize
    if not output.part.kn:
        start = (unit.index * weight.n + unit.n0) * rows.shape[1] * item
        writer.write(output.offset + start, rows)
        return
    start = (unit.index * rows.shape[0] * weight.n + unit.n0) * item
    writer.write_strided(
        output.offset + start, rows, row_bytes=rows.shape[1] * item, row_stride=weight.n * item, rows=rows.shape[0]
    )


def position(unit: Unit, flat: int) -> list[int]:
    """Index in the weight's own shape of the unit's logical element `flat` = n * K + k."""
    weight = unit.step.weight
    assert weight is not None
    n, k = unit.n0 + flat // weight.k, flat % weight.k
    matrix = [k, n] if weight.kn else [n, k]
    return [*at(unit.index, weight.shape[:-2]), *matrix] if len(weight.shape) > 2 else matrix


def at(flat: int, shape: tuple[int, ...]) -> list[int]:
    """The index in `shape` of its element number `flat`."""
    return [int(i) for i in np.unravel_index(flat, shape)]
