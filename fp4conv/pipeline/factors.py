"""The factors of adapters, in memory while the weights that take them are worked on.

An adapter's tensors are small, but one of them can hold the factors of all experts, and every unit of work needs
some: they are read once, in the order the kernels want, and dropped when newer ones come.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from fp4conv.codecs.dense import narrow, widen
from fp4conv.deltas import Factor
from fp4conv.safetensors_io import DTYPE_BYTES, Reader, TensorRef, numpy_dtype

F32 = npt.NDArray[np.float32]
_PIECE_BYTES = 1_000_000


class Factors:
    """Read factors; at most `capacity` bytes of them stay. Safe to share between threads."""

    def __init__(self, reader: Reader, capacity: int) -> None:
        self._reader = reader
        self._capacity = capacity
        self._held: OrderedDict[tuple[str, str, str], F32] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, factor: Factor, matrix: int, dtype: str) -> F32:
        """The factor of matrix `matrix`, F32 [rank, features] rounded to `dtype`, from the weight's first feature."""
        expert = matrix if factor.expert is None else factor.expert
        return self._all(factor, dtype)[expert, :, factor.start :]

    def vector(self, ref: TensorRef) -> F32:
        """A magnitude vector or bias as F32, flat."""
        stored = np.empty(ref.spec.elements, numpy_dtype(ref.spec.dtype))
        self._reader.read_into(ref.file, ref.offset, stored)
        return _wide(stored, ref.spec.dtype)

    def _all(self, factor: Factor, dtype: str) -> F32:
        """[experts, rank, features]."""
        key = (factor.ref.file, factor.ref.name, dtype)
        with self._lock:  # others wait: they would read the same
            held = self._held.get(key)
            if held is None:
                held = self._held[key] = self._read(factor, dtype)
                self._drop_old()
            self._held.move_to_end(key)
            return held

    def _drop_old(self) -> None:
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._capacity:
            self._held.popitem(last=False)

    def _read(self, factor: Factor, dtype: str) -> F32:
        ref = factor.ref
        rows, columns = ref.spec.shape
        out = np.empty((factor.experts, factor.rank, factor.features), np.float32)
        step = max(1, _PIECE_BYTES // (columns * DTYPE_BYTES[ref.spec.dtype]))
        for start in range(0, rows, step):
            stored = np.empty((min(step, rows - start), columns), numpy_dtype(ref.spec.dtype))
            self._reader.read_into(ref.file, ref.offset + start * columns * stored.itemsize, stored)
            piece = _rounded(_wide(stored, ref.spec.dtype), dtype)
            if factor.transposed:  # [features, rank x experts], the expert fastest
                cube = piece.reshape(-1, factor.rank, factor.experts)
                out[:, :, start : start + len(piece)] = cube.transpose(2, 1, 0)
            else:  # [experts x rank, features]
                out.reshape(rows, columns)[start : start + len(piece)] = piece
        return out


def _wide(stored: npt.NDArray[np.generic], dtype: str) -> F32:
    wide = np.empty(stored.shape, np.float32)
    widen(stored, dtype, wide)  # type: ignore[arg-type]  # dtype says which of the three it is
    return wide


def _rounded(values: F32, dtype: str) -> F32:
    if dtype == "F32":
        return values
    narrowed = np.empty(values.shape, numpy_dtype(dtype))
    narrow(values, dtype, narrowed)
    return _wide(narrowed, dtype)
