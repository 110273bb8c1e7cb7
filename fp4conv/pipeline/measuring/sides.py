"""One side of a comparison: what a band of a tensor is as floating-point values, whatever it is on disk."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fp4conv.codecs import codec_named
from fp4conv.codecs.base import Codes, Rows
from fp4conv.kernels.contract import Source
from fp4conv.model import Decoded, Stored, Weight
from fp4conv.pipeline.matrices import Array, Scratch, read_rows
from fp4conv.pipeline.reading import codes_in, decode_tiles
from fp4conv.plan import Action, Step, Unit
from fp4conv.safetensors_io import DTYPE_BYTES, Reader

F64 = npt.NDArray[np.float64]

_SMALL_FLOATS = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
KERNEL_DTYPES = ("BF16", "F32")  # what the kernels take as it lies


@dataclass(frozen=True)
class Side:
    """A weight and the memory and the file that its rows come through. `tensor_scale`: of a four-bit weight."""

    weight: Weight
    reader: Reader
    scratch: Scratch
    tensor_scale: float = 1.0

    def load(self, unit: Unit) -> Loaded:
        """Read the rows of `unit`, as they are on disk."""
        own = Unit(_step(self.weight), unit.index, unit.n0, unit.n1)
        base = self.weight.base
        if isinstance(base, Decoded):
            return Loaded(self, own, codes_in(self.reader, own, self.scratch))
        if isinstance(base, Stored):
            stored = read_rows(self.reader, base.ref, self.weight.kn, own, self.scratch, part="dense")
            return Loaded(self, own, dense=stored)
        return Loaded(self, own)


@dataclass(frozen=True)
class Loaded:
    """The rows of a unit: the codes of a four-bit weight, a dense array [N, K] (or [K, N]), or neither yet for FP8."""

    side: Side
    unit: Unit
    codes: Codes | None = None
    dense: Array | None = None

    def values(self, first: int, last: int, kn: bool) -> Source:
        """Rows first:last of the unit as BF16 bits or float32, [N, K], or [K, N] with `kn`; NaN where a scale is."""
        weight, rows = self.side.weight, last - first
        if self.dense is not None:
            assert weight.kn == kn, "a dense side decides which way both lie"
            cut = self.dense[:, first:last] if kn else self.dense[first:last]
            assert isinstance(weight.base, Stored)
            return floats(np.ascontiguousarray(cut), weight.base.ref.spec.dtype, self.side.scratch)
        shape = (weight.k, rows) if kn else (rows, weight.k)
        out = Rows(self.side.scratch.array("decoded", shape, "F32"), kn)  # type: ignore[arg-type]
        if self.codes is None:
            own = Unit(self.unit.step, self.unit.index, self.unit.n0 + first, self.unit.n0 + last)
            decode_tiles(self.side.reader, own, out, self.side.scratch)
        else:
            base = weight.base
            assert isinstance(base, Decoded)
            codec = codec_named(base.format_name)
            codec.decode(self.codes_of(first, last), self.side.tensor_scale, out, inverse=base.inverse)
        return out.array

    def codes_of(self, first: int, last: int) -> Codes:
        """Codes and scales of rows first:last."""
        codes = self.codes
        assert codes is not None
        if not codes.kn:
            return Codes(codes.packed[first:last], codes.block_scale[first:last])
        packed, scales = (np.ascontiguousarray(part[:, first:last]) for part in (codes.packed, codes.block_scale))
        return Codes(packed, scales, True)


def read_flat(reader: Reader, weight: Weight, start: int, stop: int, scratch: Scratch) -> Array:
    """Elements start:stop of a dense tensor, flat and as they are stored."""
    assert isinstance(weight.base, Stored)
    ref = weight.base.ref
    out = scratch.array("flat", (stop - start,), ref.spec.dtype)
    reader.read_into(ref.file, ref.offset + start * DTYPE_BYTES[ref.spec.dtype], out)
    return out


def floats(stored: Array, dtype: str, scratch: Scratch) -> Source:
    """A dense array of a floating type of at most 32 bits as the kernels take it: BF16 bits or float32."""
    if dtype in KERNEL_DTYPES:
        return stored  # type: ignore[return-value]
    wide = scratch.array("wide", stored.shape, "F32")
    small = _SMALL_FLOATS.get(dtype)
    wide[...] = stored if small is None else stored.view(small)
    return wide  # type: ignore[return-value]


def wide_floats(stored: Array, dtype: str) -> F64:
    """A dense array of any type as float64."""
    small = ml_dtypes.bfloat16 if dtype == "BF16" else _SMALL_FLOATS.get(dtype)
    values: Array = stored if small is None else stored.view(small)
    wide: F64 = values.astype(np.float64)
    return wide


def is_small_float(dtype: str) -> bool:
    """Whether every value of the type is a float32."""
    return dtype in (*KERNEL_DTYPES, "F16", *_SMALL_FLOATS)


def _step(weight: Weight) -> Step:
    """What the readers of rows take: a step that does nothing."""
    return Step(weight.name, Action.COPY, (), "", weight)
