"""What happens to one unit: read, one kernel, write. Errors name the tensor and the position of the value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from fp4conv.codecs import codec_named
from fp4conv.codecs.base import Codes, Coding, Rows, Tally
from fp4conv.codecs.dense import count_nonfinite, narrow, widen
from fp4conv.errors import ValuesError
from fp4conv.formats import BLOCK_FORMATS, E2M1, E4M3, MXFP4
from fp4conv.kernels import compiled
from fp4conv.layouts.parts import BLOCK_SCALE, PACKED
from fp4conv.model import FLOAT_DTYPES, Decoded, LoraMerged, Stored, Weight
from fp4conv.pipeline import hints, merging
from fp4conv.pipeline.bench import Bench, Counts, Progress, TensorScale, weight_of
from fp4conv.pipeline.comparing import compare_with_adapter_beside, compare_with_forward
from fp4conv.pipeline.matrices import Array, Scratch, at, position, read_rows, rows_shape, write_rows
from fp4conv.pipeline.reading import codes_in, decode, read_values, stored_tensor_scale
from fp4conv.pipeline.refusals import refuse_nonfinite, refuse_overflow
from fp4conv.pipeline.settle import reciprocal
from fp4conv.plan import Action, Output, Span, Step, Unit
from fp4conv.safetensors_io import DTYPE_BYTES, TensorRef


def work(bench: Bench, piece: Unit | Span, progress: Progress, scratch: Scratch) -> Counts:
    """Do one piece: read, one kernel, write."""
    if isinstance(piece, Span):
        copied = isinstance(piece.step.outputs[piece.output].origin, TensorRef)
        return {"nonfinite": (_copy if copied else _compute_span)(bench, piece, scratch)}
    return _BY_ACTION[piece.step.action](bench, piece, progress, scratch)


# ---- value by value


def _copy(bench: Bench, span: Span, scratch: Scratch) -> int:
    output = span.step.outputs[span.output]
    ref = output.origin
    assert isinstance(ref, TensorRef)
    values = _read_span(bench, ref, span, scratch)
    bench.writers[output.file].write(output.offset + span.start * values.itemsize, values)
    return count_nonfinite(values, ref.spec.dtype) if ref.spec.dtype in FLOAT_DTYPES else 0


def _compute_span(bench: Bench, span: Span, scratch: Scratch) -> int:
    """Cast to another dense dtype; or add what an adapter adds to a vector."""
    output, weight = span.step.outputs[span.output], span.step.weight
    assert weight is not None
    assert isinstance(weight.base, Stored)
    ref = weight.base.ref
    values = _read_span(bench, ref, span, scratch)
    between = scratch.array("f32", values.shape, "F32")
    widen(values, ref.spec.dtype, between)  # type: ignore[arg-type]  # dtype says which of the three it is
    if isinstance(weight.value, LoraMerged):
        merging.merge_span(bench.factors, weight.value, between, span.start)  # type: ignore[arg-type]
    out = scratch.array("cast", values.shape, output.part.spec.dtype)
    bad = narrow(between, output.part.spec.dtype, out)  # type: ignore[arg-type]
    if bad >= 0:
        refuse_overflow(weight, at(span.start + bad, weight.shape), float(between[bad]), output.part.spec.dtype)
    if weight.name in bench.plan.hints.dense:
        _check_unrounded(weight, between, out, output.part.spec.dtype, span.start)
    bench.writers[output.file].write(output.offset + span.start * out.itemsize, out)
    return count_nonfinite(values, ref.spec.dtype)


def _check_unrounded(weight: Weight, values: Array, cast: Array, dtype: str, start: int) -> None:
    """A tensor that goes back to the type that it had must not lose what it has got since."""
    again = np.empty(values.shape, np.float32)
    widen(cast, dtype, again)  # type: ignore[arg-type]
    changed = np.flatnonzero((again != values) & ~np.isnan(values))
    if changed.size:
        where = at(start + int(changed[0]), weight.shape)
        raise ValuesError(
            f"the value at {where} is {float(values[changed[0]])!r}, which {dtype} cannot hold; round-trip hints "
            f"say that this tensor was {dtype}, so it has changed since",
            where=weight.name,
            hint="keep the type that it has now, and go without hints: --no-hints",
        )


def _read_span(bench: Bench, ref: TensorRef, span: Span, scratch: Scratch) -> Array:
    values = scratch.array("span", (span.stop - span.start,), ref.spec.dtype)
    bench.reader.read_into(ref.file, ref.offset + span.start * DTYPE_BYTES[ref.spec.dtype], values)
    return values


# ---- rows of matrices


def _quantize(bench: Bench, unit: Unit, progress: Progress, scratch: Scratch) -> Counts:
    return _encode(bench, unit, read_values(bench, unit, scratch, progress), progress, scratch)


def _encode(bench: Bench, unit: Unit, rows: Rows, progress: Progress, scratch: Scratch) -> Counts:
    step, plan = unit.step, bench.plan
    assert plan.rule is not None
    scale = bench.scales[step.group] if step.group else TensorScale(_kept_scale(bench, step, rows))
    coding = Coding(plan.rule, plan.ties, scale.value)
    outputs, codes = codes_out(step, unit, scratch)
    hint = plan.hints.weights.get(weight_of(step).name) if isinstance(weight_of(step).value, Stored) else None
    if hint is not None and scale.hinted:
        hints.restore_nvfp4(bench.reader, hint, hints.Encoding(unit, rows, codes, _tally(progress, unit)), scratch)
        _write_codes(bench, outputs, codes, unit)
        return {}
    bad = codec_named(step.target).encode(rows, coding, codes, _tally(progress, unit))
    if bad >= 0:
        refuse_nonfinite(weight_of(step), position(unit, bad))
    counts: Counts = {}
    if hint is not None and hint.format is MXFP4:
        done = hints.restore_mxfp4(bench.reader, hint, hints.Encoding(unit, rows, codes, _tally(progress, unit)))
        counts = {"hints_used": done.used, "hints_stale": done.stale}
    _write_codes(bench, outputs, codes, unit)
    if step.merged is not None and step.merged.beside:
        compare_with_adapter_beside(bench, unit, step.merged, (codes, coding), progress=progress, scratch=scratch)
    trained = scale.trained.get(step.key, scale.value)
    if trained == scale.value:
        return counts
    return compare_with_forward(unit, rows, codes, (coding, replace(coding, tensor_scale=trained)), progress)


def _kept_scale(bench: Bench, step: Step, rows: Rows) -> float:
    """The tensor scale where it is known beforehand: a repaired set's, or one that others of the set keep; else 1.0."""
    weight = weight_of(step)
    if step.merged is None or not isinstance(weight.base, Decoded) or not BLOCK_FORMATS[step.target].tensor_scale:
        return step.tensor_scale or 1.0
    scale = step.tensor_scale or stored_tensor_scale(bench.reader, weight.base)
    if weight.base.inverse and step.tensor_scale is None:
        scale = reciprocal(scale, weight.name)
    amax, _ = compiled.amax(rows.array)
    # Up to 7 x 448 x scale the largest code, 6, errs by half of the step below it at most, as other codes do.
    limit = (E2M1.max_value + 1) * E4M3.max_value * scale
    if amax > limit:
        raise ValuesError(
            f"the adapter makes its largest value {amax:.4g}, and the tensor scale that it shares with weights that "
            f"the adapter leaves alone holds {limit:.4g} at most",
            where=weight.name,
            hint="--repair requantises the whole set under a new scale, also what the adapter leaves alone",
        )
    return scale


def _merge(bench: Bench, unit: Unit, progress: Progress, scratch: Scratch) -> Counts:
    """A merged weight as dense values."""
    output = unit.step.computed[0]
    rows = read_values(bench, unit, scratch, progress, kn=output.part.kn)
    _write_dense(bench, unit, rows, scratch)
    return {}


def _write_dense(bench: Bench, unit: Unit, rows: Rows, scratch: Scratch) -> Array:
    """F32 rows rounded to the dtype of the output, and written. Returns what was written."""
    output, weight = unit.step.computed[0], weight_of(unit.step)
    dtype = output.part.spec.dtype
    out = scratch.array("out", rows.array.shape, dtype)
    bad = narrow(rows.array, dtype, out)  # type: ignore[arg-type]
    if bad >= 0:
        row, column = divmod(bad, out.shape[1])
        n, k = (column, row) if rows.kn else (row, column)
        refuse_overflow(weight, position(unit, n * weight.k + k), float(rows.array.reshape(-1)[bad]), dtype)
    write_rows(bench.writers, output, unit, out)
    return out


def _dequantize(bench: Bench, unit: Unit, progress: Progress, scratch: Scratch) -> Counts:
    output = unit.step.computed[0]
    dtype, weight = output.part.spec.dtype, weight_of(unit.step)
    out = scratch.array("out", rows_shape(weight, weight.elements, output.part.kn, unit), dtype)
    if dtype == "F16":
        wide = Rows(scratch.array("f32", out.shape, "F32"), output.part.kn)  # type: ignore[arg-type]
        codes = decode(bench, unit, wide, scratch)
        written = _write_dense(bench, unit, wide, scratch)
        widen(written, dtype, wide.array)  # type: ignore[arg-type]
        _note_hints(bench, unit, codes, wide, progress)
        return {}
    rows = Rows(out, output.part.kn)  # type: ignore[arg-type]
    codes = decode(bench, unit, rows, scratch)
    write_rows(bench.writers, output, unit, out)
    _note_hints(bench, unit, codes, rows, progress)
    return {}


def _note_hints(bench: Bench, unit: Unit, codes: Codes | None, dense: Rows, progress: Progress) -> None:
    """Log what `dense` (F16 widened again) does not tell of the codes that it was decoded from."""
    value = weight_of(unit.step).value
    if bench.log is None or bench.plan.kept is None or unit.step.key not in bench.plan.kept.weights:
        return
    assert isinstance(value, Decoded)
    assert codes is not None
    scale = stored_tensor_scale(bench.reader, value)
    run = hints.note(bench.log, hints.Decoding(unit, codes, dense, unit.step.target.upper(), scale))
    if run is not None:
        progress.runs.append(run)


def _transcode(bench: Bench, unit: Unit, progress: Progress, scratch: Scratch) -> Counts:
    """Between block formats: MXFP4 -> NVFP4 in closed form, everything else by way of F32 values."""
    step, weight = unit.step, weight_of(unit.step)
    exponent = bench.scales[step.group].exponent if step.group else None
    if exponent is None:
        between = scratch.array("f32", (unit.n1 - unit.n0, weight.k), "F32")
        decode(bench, unit, Rows(between), scratch)  # type: ignore[arg-type]
        return _encode(bench, unit, Rows(between), progress, scratch)  # type: ignore[arg-type]
    source, tally = codes_in(bench.reader, unit, scratch), _tally(progress, unit)
    outputs, codes = codes_out(step, unit, scratch)
    lossy = compiled.transcode_mxfp4_nvfp4(
        source.packed,
        source.block_scale,
        exponent,
        codes.packed,
        codes.block_scale,
        tally.signal,
        tally.noise,
        codes.kn,
    )
    if lossy < 0:
        refuse_nonfinite(weight, position(unit, -1 - lossy))
    _write_codes(bench, outputs, codes, unit)
    return {"lossy_blocks": lossy}


def _reblock(bench: Bench, unit: Unit, progress: Progress, scratch: Scratch) -> Counts:
    """NVFP4 in blocks of 32 as blocks of 16: every block scale twice along K. The codes are copied as spans."""
    weight, output = weight_of(unit.step), unit.step.computed[0]
    value = weight.value
    assert isinstance(value, Decoded)
    scales = read_rows(bench.reader, value.block_scale, value.kn, unit, scratch, part=BLOCK_SCALE)
    repeated = np.repeat(scales, value.block // value.format.block, axis=0 if value.kn else 1)
    write_rows(bench.writers, output, unit, np.ascontiguousarray(repeated))
    return {}


_BY_ACTION: Mapping[Action, Callable[[Bench, Unit, Progress, Scratch], Counts]] = {
    Action.QUANTIZE: _quantize,
    Action.DEQUANTIZE: _dequantize,
    Action.TRANSCODE: _transcode,
    Action.REBLOCK: _reblock,
    Action.REQUANTIZE: _transcode,
    Action.MERGE: _merge,
}


# ---- parts


def codes_out(step: Step, unit: Unit, scratch: Scratch) -> tuple[dict[str, Output], Codes]:
    outputs = {output.part.kind: output for output in step.computed}
    arrays = {}
    for kind in (PACKED, BLOCK_SCALE):
        part = outputs[kind].part
        arrays[kind] = scratch.array(kind, rows_shape(weight_of(step), part.spec.elements, part.kn, unit), "U8")
    return outputs, Codes(arrays[PACKED], arrays[BLOCK_SCALE], outputs[PACKED].part.kn)  # type: ignore[arg-type]


def _write_codes(bench: Bench, outputs: Mapping[str, Output], codes: Codes, unit: Unit) -> None:
    write_rows(bench.writers, outputs[PACKED], unit, codes.packed)
    write_rows(bench.writers, outputs[BLOCK_SCALE], unit, codes.block_scale)


def _tally(progress: Progress, unit: Unit) -> Tally:
    return Tally(progress.row_sums("signal", unit), progress.row_sums("noise", unit))
