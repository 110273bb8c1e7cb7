"""Find the tensor scale that a set of weights shares, before any of them is encoded.

For dense weights that is their largest magnitude; for MXFP4 on its way to NVFP4 the power of two that holds
most blocks exactly. Maxima and integer counts do not depend on the order in which blocks are looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fp4conv.codecs.dense import widen
from fp4conv.codecs.nvfp4 import tensor_scale
from fp4conv.formats import MXFP4, NVFP4
from fp4conv.hints.values import Hint
from fp4conv.kernels import compiled
from fp4conv.kernels.window import choose_window, new_window_counts
from fp4conv.layouts.parts import BLOCK_SCALE, PACKED
from fp4conv.model import Decoded, Stored, Weight
from fp4conv.pipeline.bench import Bench, TensorScale
from fp4conv.pipeline.hints import Encoding, hinted_tensor_scale, restore_nvfp4
from fp4conv.pipeline.matrices import Scratch, at, position, read_rows
from fp4conv.pipeline.operations import codes_out
from fp4conv.pipeline.reading import read_values
from fp4conv.pipeline.refusals import refuse_nonfinite
from fp4conv.pipeline.scalars import frozen_amax
from fp4conv.plan import UNIT_BYTES, Span, Step, Unit, matrix_units
from fp4conv.safetensors_io import DTYPE_BYTES


class Scan:
    """The search for one set's tensor scale. Workers `look` at pieces; whoever did the last one `finish`es."""

    def __init__(self, group: str, steps: Sequence[Step], budget: int, hints: Mapping[str, Hint]) -> None:
        self.group = group
        self.steps = steps
        self.ready = threading.Event()
        values = [_weight(step).value for step in steps]
        self._closed_form = all(isinstance(value, Decoded) and value.format is MXFP4 for value in values)
        self._amax: dict[str, float] = dict.fromkeys((step.key for step in steps), 0.0)
        self._starts, self._ends = new_window_counts()
        self._hints, self._stale = _hints_of_set(steps, hints)
        self._pieces = tuple(piece for step in steps for piece in _scan_pieces(step, budget, bool(self._hints)))
        self._remaining = len(self._pieces)
        self._lock = threading.Lock()

    def pieces(self) -> Iterator[Unit | Span]:
        return iter(self._pieces)

    def look(self, bench: Bench, piece: Unit | Span, scratch: Scratch) -> TensorScale | None:
        """Take one piece into account. Returns the scale after the last one."""
        step = piece.step
        amax = 0.0
        if step.amax is not None:
            amax = frozen_amax(bench, step.amax)
        elif isinstance(piece, Span):
            amax = _dense_amax(bench, piece, scratch)
        elif self._hints:
            amax = self._check_hint(bench, piece, scratch)
        elif self._closed_form:
            self._count_windows(bench, piece, scratch)
        else:
            rows = read_values(bench, piece, scratch)
            amax, bad = compiled.amax(rows.array)
            if bad >= 0:
                row, column = divmod(bad, rows.array.shape[1])
                n, k = (column, row) if rows.kn else (row, column)
                refuse_nonfinite(_weight(step), position(piece, n * _weight(step).k + k))
        with self._lock:
            self._amax[step.key] = max(self._amax[step.key], amax)
            self._remaining -= 1
            return self._scale(bench) if self._remaining == 0 else None

    def _check_hint(self, bench: Bench, unit: Unit, scratch: Scratch) -> float:
        """The amax of a dense unit; on the way, whether its hint gives these values back."""
        rows = read_values(bench, unit, scratch)
        if not self._stale:
            codes = codes_out(unit.step, unit, scratch)[1]
            hint = self._hints[unit.step.key]
            if restore_nvfp4(bench.reader, hint, Encoding(unit, rows, codes), scratch).stale:
                self._stale = True
        return _finite_amax(_weight(unit.step), rows.array, unit)

    def _count_windows(self, bench: Bench, unit: Unit, scratch: Scratch) -> None:
        value = _weight(unit.step).value
        assert isinstance(value, Decoded)
        packed = read_rows(bench.reader, value.packed, value.kn, unit, scratch, part=PACKED)
        scales = read_rows(bench.reader, value.block_scale, value.kn, unit, scratch, part=BLOCK_SCALE)
        starts, ends = new_window_counts()
        bad = compiled.window_counts(packed, scales, starts, ends)  # type: ignore[arg-type]
        if bad >= 0:
            refuse_nonfinite(_weight(unit.step), position(unit, bad))
        with self._lock:
            self._starts += starts
            self._ends += ends

    def _scale(self, bench: Bench) -> TensorScale:
        if self._closed_form:
            exponent, _ = choose_window(self._starts, self._ends)
            return TensorScale(2.0**exponent, exponent)
        rule = bench.plan.rule
        assert rule is not None
        trained = {step.key: tensor_scale(self._amax[step.key], rule) for step in self.steps if step.amax}
        found = tensor_scale(max(self._amax.values()), rule)
        if self._stale:
            return TensorScale(found, trained=trained, hinted={})
        if not self._hints:
            return TensorScale(found, trained=trained)
        hinted = {key: hinted_tensor_scale(bench.reader, hint) for key, hint in self._hints.items()}
        return TensorScale(found, hinted=hinted)


def _weight(step: Step) -> Weight:
    assert step.weight is not None
    return step.weight


def _hints_of_set(steps: Sequence[Step], hints: Mapping[str, Hint]) -> tuple[dict[str, Hint], bool]:
    """(step -> the hint of its weight, where every weight of a set of dense ones has one; whether just some have)."""
    found: dict[str, Hint] = {}
    for step in steps:
        weight = _weight(step)
        hint = hints.get(weight.name)
        if hint is None or hint.format is not NVFP4 or step.amax is not None or not isinstance(weight.value, Stored):
            return {}, any(_weight(each).name in hints for each in steps)
        found[step.key] = hint
    return found, False


def _finite_amax(weight: Weight, values: npt.NDArray[np.generic], unit: Unit) -> float:
    amax, bad = compiled.amax(values)  # type: ignore[arg-type]
    if bad >= 0:
        row, column = divmod(bad, values.shape[1])
        n, k = (column, row) if weight.kn else (row, column)
        refuse_nonfinite(weight, position(unit, n * weight.k + k))
    return float(amax)


def _scan_pieces(step: Step, budget: int, by_rows: bool) -> Iterator[Unit | Span]:
    weight = _weight(step)
    if step.amax is not None or not weight.elements:
        yield Span(step, 0, 0, 0)
        return
    if by_rows or not isinstance(weight.value, Stored):
        yield from matrix_units(step, budget)
        return
    chunk = min(budget, UNIT_BYTES) // 8
    yield from (Span(step, 0, i, min(i + chunk, weight.elements)) for i in range(0, weight.elements, chunk))


def _dense_amax(bench: Bench, span: Span, scratch: Scratch) -> float:
    weight = _weight(span.step)
    assert isinstance(weight.value, Stored)
    ref = weight.value.ref
    values = scratch.array("span", (span.stop - span.start,), ref.spec.dtype)
    bench.reader.read_into(ref.file, ref.offset + span.start * DTYPE_BYTES[ref.spec.dtype], values)
    if ref.spec.dtype == "F16":
        wide = scratch.array("f32", values.shape, "F32")
        widen(values, "F16", wide)  # type: ignore[arg-type]
        values = wide
    amax, bad = compiled.amax(values)  # type: ignore[arg-type]
    if bad >= 0:
        refuse_nonfinite(weight, at(span.start + bad, weight.shape))
    return float(amax)
