"""`open`: any tensor of a checkpoint as a NumPy array, decoded."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fp4conv.errors import SourceError, ValuesError
from fp4conv.layouts import parse
from fp4conv.model import BlockScaled, Decoded, Model, Stored, Weight
from fp4conv.safetensors_io import DTYPE_BYTES, TensorRef, numpy_dtype
from fp4conv.sources import open_source

if TYPE_CHECKING:
    from fp4conv.codecs.base import Codes

_ML_DTYPES = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}

Array = npt.NDArray[np.generic]


class Checkpoint:
    """A checkpoint opened for reading by `open`; also a context manager.

    `names` are the tensors of the model as the HF BF16 checkpoint names them, whatever the layout on disk.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._reader = model.source.reader()
        self._weights = {weight.name: weight for weight in model.weights}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._weights)

    def read(self, name: str, rows: slice | range | None = None) -> Array:
        """The tensor `name`, or `rows` of its first axis (a slice or range of step 1).

        A dense tensor keeps its dtype (BF16 as ml_dtypes.bfloat16); a quantised weight is decoded to float32 in
        the shape that the BF16 checkpoint gives it. A name of a stored part (`…_blocks`, `….weight_scale`) gives
        its bytes as stored. Raises SourceError for a name that is not there, ValuesError for a NaN scale.
        """
        weight = self._weights.get(name)
        if weight is not None and isinstance(weight.value, Decoded):
            return self._decode(weight, weight.value, rows)
        if weight is not None and isinstance(weight.value, BlockScaled):
            return self._decode_tiles(weight, weight.value, rows)
        ref = self.model.source.tensors.get(name)
        if weight is not None and isinstance(weight.value, Stored):
            ref = weight.value.ref
        if ref is None:
            raise SourceError(
                f"there is no tensor {name!r}",
                where=self.model.source.name,
                hint="list the names with: fp4conv inspect SRC --headers-only",
            )
        return self._read_stored(ref, rows)

    def _read_stored(self, ref: TensorRef, rows: slice | range | None, *, plain: bool = False) -> Array:
        """Rows of a tensor; `plain`: floats that NumPy does not know as the integers that hold them."""
        shape, start = _first_axis(ref.spec.shape, rows)
        out = np.empty(shape, numpy_dtype(ref.spec.dtype))
        row_bytes = ref.spec.nbytes // max(1, ref.spec.shape[0] if ref.spec.shape else 1)
        self._reader.read_into(ref.file, ref.offset + start * row_bytes, out)
        special = None if plain else _ML_DTYPES.get(ref.spec.dtype)
        return out.view(special) if special is not None else out

    def _decode(self, weight: Weight, value: Decoded, rows: slice | range | None) -> npt.NDArray[np.float32]:
        from fp4conv.codecs import codec_named
        from fp4conv.codecs.base import Codes, Rows
        from fp4conv.pipeline.reading import stored_tensor_scale

        shape, start = _first_axis(weight.shape, rows)
        linear = len(weight.shape) == 2
        scale = stored_tensor_scale(self._reader, value)
        out = np.empty(shape, np.float32)
        for index in range(1 if linear else shape[0]):
            first, count = (start, shape[0]) if linear else ((start + index) * weight.n, weight.n)
            codes = self._codes(value, weight, first, count, Codes)
            target = out if linear else out[index]
            values = Rows(target, weight.kn)
            bad = codec_named(value.format_name).decode(codes, scale, values, inverse=value.inverse)
            if bad >= 0:
                raise ValuesError(
                    f"the value at {_position(weight, first + bad // weight.k, bad % weight.k)} is not finite: "
                    "its block scale is NaN or too large",
                    where=weight.name,
                    hint="the checkpoint is damaged: download or export it again",
                )
        return out

    def _decode_tiles(self, weight: Weight, value: BlockScaled, rows: slice | range | None) -> npt.NDArray[np.float32]:
        from fp4conv.codecs.fp8 import Tiles, decode, tile_rows

        shape, start = _first_axis(weight.shape, rows)
        out = np.empty(shape, np.float32)
        if not out.size:
            return out
        first, count = tile_rows(start, shape[0], value.block[0])
        scales = self._read_stored(value.scale, slice(first, first + count), plain=True)
        codes = self._read_stored(value.values, slice(start, start + shape[0]), plain=True)
        bad = decode(codes.view(np.uint8), Tiles(scales, value.scale.spec.dtype, start, value.block), out)
        if bad >= 0:
            raise ValuesError(
                f"the value at {_position(weight, start + bad // weight.k, bad % weight.k)} is not finite: "
                "it or its scale is NaN or too large",
                where=weight.name,
                hint="the checkpoint is damaged: download or export it again",
            )
        return out

    def _codes(self, value: Decoded, weight: Weight, first: int, count: int, codes: type[Codes]) -> Codes:
        """Rows first:first+count of all matrices' rows; for K-major codes a whole matrix."""
        parts = []
        for ref in (value.packed, value.block_scale):
            columns = ref.spec.elements // (weight.matrices * weight.n)
            part = np.empty((columns, count) if value.kn else (count, columns), np.uint8)
            self._reader.read_into(ref.file, ref.offset + first * columns * DTYPE_BYTES[ref.spec.dtype], part)
            parts.append(part)
        return codes(parts[0], parts[1], value.kn)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open(source: str | Path) -> Checkpoint:
    """Open the checkpoint in `source`, a folder or a repository on the Hub.

        with fp4conv.open("gpt-oss-20b") as checkpoint:
            norm = checkpoint.read("model.norm.weight")

    Headers are read and checked now, tensors when asked for. Raises SourceError for what is no sound checkpoint.
    """
    return Checkpoint(parse(open_source(source)))


def _position(weight: Weight, row: int, k: int) -> list[int]:
    """Index in the weight's own shape; `row` counts over all its matrices."""
    e, n = divmod(row, weight.n)
    place = [k, n] if weight.kn else [n, k]
    return place if len(weight.shape) == 2 else [e, *place]


def _first_axis(shape: tuple[int, ...], rows: slice | range | None) -> tuple[tuple[int, ...], int]:
    """(shape of the rows asked for, the first row)."""
    if rows is None:
        return shape, 0
    if not shape:
        raise SourceError("a scalar has no rows")
    wanted = rows if isinstance(rows, slice) else slice(rows.start, rows.stop, rows.step)
    start, stop, step = wanted.indices(shape[0])
    if step != 1:
        raise SourceError(f"rows come in steps of 1, not {step}")
    return (max(0, stop - start), *shape[1:]), start
