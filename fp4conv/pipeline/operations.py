"""What happens to one unit: read, one kernel, write. Errors name the tensor and the position of the value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fp4conv.codecs import codec_named, fp8
from fp4conv.codecs.base import Codes, Coding, Rows, Tally
from fp4conv.codecs.dense import count_nonfinite, narrow, widen
from fp4conv.errors import ValuesError
from fp4conv.formats import BLOCK_FORMATS, MXFP4, NVFP4_AMAX_DIVISOR, MergeRounding
from fp4conv.hints.runs import Run
from fp4conv.kernels import compiled
from fp4conv.layouts.parts import BLOCK_SCALE, PACKED
from fp4conv.model import FLOAT_DTYPES, BlockScaled, Decoded, LoraMerged, Stored, Weight
from fp4conv.patterns import exclude
from fp4conv.pipeline import hints, merging
from fp4conv.pipeline.factors import Factors
from fp4conv.pipeline.hint_log import HintLog
from fp4conv.pipeline.matrices import Array, Scratch, at, position, read_rows, rows_shape, write_rows
from fp4conv.pipeline.settle import reciprocal, stored_scale
from fp4conv.plan import Action, Output, Plan, Span, Step, Unit
from fp4conv.safetensors_io import DTYPE_BYTES, Reader, TensorRef, Writer

_LARGEST_E4M3 = 0x7E  # the byte of 448; above it are NaN and what has a sign


@dataclass(frozen=True)
class TensorScale:
    """The scale of a set: `value`, and `exponent` where it is a power of two chosen for MXFP4 sources.

    `trained`: step -> the scale that its own frozen amax gives, which training's forward pass used. `hinted`: step ->
    the scalar of its round-trip hint where those of the set fit, empty where they do not, None where there are none.
    """

    value: float
    exponent: int | None = None
    trained: Mapping[str, float] = field(default_factory=dict)
    hinted: Mapping[str, float] | None = None


# What one piece counted, by the names in StepResult.
Counts: TypeAlias = Mapping[str, int]


@dataclass
class Progress:
    """What is known of a step while its units are worked on; merged under the run's lock.

    `sums`: what is summed over values, a float64 array [rows of all matrices] each, of which a unit fills its own
    rows: 'signal', 'noise'; 'forward_signal', 'forward_noise' against training's forward pass.
    """

    rows: int = 0
    sums: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    runs: list[Run] = field(default_factory=list)
    remaining: int = 0

    def row_sums(self, name: str, unit: Unit) -> npt.NDArray[np.float64]:
        """The unit's rows of the sum `name`, to be filled in."""
        weight = unit.step.weight
        assert weight is not None
        held = self.sums.get(name)
        if held is None:
            held = self.sums.setdefault(name, np.zeros(self.rows))  # atomic: two workers get the same array
        return held[unit.index * weight.n + unit.n0 : unit.index * weight.n + unit.n1]


@dataclass(frozen=True)
class Bench:
    """All that an operation needs beside its unit. `scales`: by set, filled in as scans end."""

    plan: Plan
    reader: Reader
    writers: Mapping[str, Writer]
    factors: Factors
    scales: dict[str, TensorScale] = field(default_factory=dict)
    log: HintLog | None = None


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
        _refuse_overflow(weight, at(span.start + bad, weight.shape), float(between[bad]), output.part.spec.dtype)
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


def read_values(
    bench: Bench, unit: Unit, scratch: Scratch, progress: Progress | None = None, *, kn: bool = False
) -> Rows:
    """The unit's rows of any weight as the kernels take them: BF16 or F32, with adapters merged.

    A dense base lies as it is stored, a quantised one is decoded to [N, K], or to [K, N] with `kn`. With `progress`
    the sizes of a merged weight and of its change are kept, and a value that is not finite is refused.
    """
    weight = _weight(unit.step)
    base = read_base(bench, unit, scratch, kn=kn)
    if not isinstance(weight.value, LoraMerged):
        return base
    merged = merging.merge_rows(bench.factors, weight.value, unit, base, scratch)
    if progress is not None and weight.value.deltas:
        sums = progress.row_sums("change", unit), progress.row_sums("base", unit)
        bad = merging.measure_change(base, merged, sums)
        if bad >= 0:
            _refuse_merged(weight, position(unit, bad))
    return merged


def read_base(bench: Bench, unit: Unit, scratch: Scratch, *, kn: bool = False) -> Rows:
    """The same without adapters."""
    weight = _weight(unit.step)
    if isinstance(weight.base, Stored):
        return _dense_rows(bench, weight.base.ref, unit, scratch)
    dtype = merging.base_dtype(weight.value) if isinstance(weight.value, LoraMerged) else "F32"
    rows = Rows(scratch.array("base", rows_shape(weight, weight.elements, kn, unit), dtype), kn)  # type: ignore[arg-type]
    decode(bench, unit, rows, scratch)
    return rows


def _dense_rows(bench: Bench, ref: TensorRef, unit: Unit, scratch: Scratch) -> Rows:
    """The unit's rows of a dense weight: BF16 and F32 as they are, F16 widened."""
    weight = _weight(unit.step)
    values = read_rows(bench.reader, ref, weight.kn, unit, scratch, part="dense")
    if ref.spec.dtype == "F16":
        wide = scratch.array("f32", values.shape, "F32")
        widen(values, "F16", wide)  # type: ignore[arg-type]
        values = wide
    return Rows(values, weight.kn)  # type: ignore[arg-type]


def _encode(bench: Bench, unit: Unit, rows: Rows, progress: Progress, scratch: Scratch) -> Counts:
    step, plan = unit.step, bench.plan
    assert plan.rule is not None
    scale = bench.scales[step.group] if step.group else TensorScale(_kept_scale(bench, step, rows))
    coding = Coding(plan.rule, plan.ties, scale.value)
    outputs, codes = codes_out(step, unit, scratch)
    hint = plan.hints.weights.get(_weight(step).name) if isinstance(_weight(step).value, Stored) else None
    if hint is not None and scale.hinted:
        hints.restore_nvfp4(bench.reader, hint, hints.Encoding(unit, rows, codes, _tally(progress, unit)), scratch)
        _write_codes(bench, outputs, codes, unit)
        return {}
    bad = codec_named(step.target).encode(rows, coding, codes, _tally(progress, unit))
    if bad >= 0:
        refuse_nonfinite(_weight(step), position(unit, bad))
    counts: Counts = {}
    if hint is not None and hint.format is MXFP4:
        done = hints.restore_mxfp4(bench.reader, hint, hints.Encoding(unit, rows, codes, _tally(progress, unit)))
        counts = {"hints_used": done.used, "hints_stale": done.stale}
    _write_codes(bench, outputs, codes, unit)
    if step.merged is not None and step.merged.beside:
        _compare_with_adapter_beside(bench, unit, step.merged, (codes, coding), progress=progress, scratch=scratch)
    trained = scale.trained.get(step.key, scale.value)
    if trained == scale.value:
        return counts
    return _compare_with_forward(unit, rows, codes, (coding, replace(coding, tensor_scale=trained)), progress)


def _kept_scale(bench: Bench, step: Step, rows: Rows) -> float:
    """The tensor scale where it is known beforehand: a repaired set's, or one that others of the set keep; else 1.0."""
    weight = _weight(step)
    if step.merged is None or not isinstance(weight.base, Decoded) or not BLOCK_FORMATS[step.target].tensor_scale:
        return step.tensor_scale or 1.0
    scale = step.tensor_scale or stored_tensor_scale(bench.reader, weight.base)
    if weight.base.inverse and step.tensor_scale is None:
        scale = reciprocal(scale, weight.name)
    amax, _ = compiled.amax(rows.array)
    if amax > NVFP4_AMAX_DIVISOR * scale:
        raise ValuesError(
            f"the adapter makes its largest value {amax:.4g}, and the tensor scale that it shares with weights that "
            f"the adapter leaves alone holds {NVFP4_AMAX_DIVISOR * scale:.4g} at most",
            where=weight.name,
            hint="convert the base with --to bf16 first and merge into that: the whole set then gets a new scale",
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
    output, weight = unit.step.computed[0], _weight(unit.step)
    dtype = output.part.spec.dtype
    out = scratch.array("out", rows.array.shape, dtype)
    bad = narrow(rows.array, dtype, out)  # type: ignore[arg-type]
    if bad >= 0:
        row, column = divmod(bad, out.shape[1])
        n, k = (column, row) if rows.kn else (row, column)
        _refuse_overflow(weight, position(unit, n * weight.k + k), float(rows.array.reshape(-1)[bad]), dtype)
    write_rows(bench.writers, output, unit, out)
    return out


def _compare_with_adapter_beside(
    bench: Bench,
    unit: Unit,
    value: LoraMerged,
    result: tuple[Codes, Coding],
    *,
    progress: Progress,
    scratch: Scratch,
) -> None:
    """Sum up how far the merged codes are from Q(W) + B A, what LoRA-QAT ran; Q(W) under the result's tensor scale."""
    (codes, coding), codec = result, codec_named(unit.step.target)
    base = read_base(bench, unit, scratch)
    own = Codes(np.empty_like(codes.packed), np.empty_like(codes.block_scale), codes.kn)
    rows = unit.n1 - unit.n0
    codec.encode(base, coding, own, Tally(np.empty(rows), np.empty(rows)))
    quantized = Rows(np.empty(base.array.shape, np.float32), base.kn)
    codec.decode(own, coding.tensor_scale, quantized)
    forward = merging.merge_rows(
        bench.factors, replace(value, rounding=MergeRounding.ONCE, dtype="F32"), unit, quantized, scratch
    )
    codec.decode(codes, coding.tensor_scale, quantized)
    sums = progress.row_sums("beside_noise", unit), progress.row_sums("beside_signal", unit)
    merging.measure_change(forward, quantized, sums)


def _compare_with_forward(
    unit: Unit, rows: Rows, codes: Codes, codings: tuple[Coding, Coding], progress: Progress
) -> Counts:
    """Count the values of `codes` that differ from training's forward pass. `codings`: the export's, and training's."""
    shared, forward = codings
    codec = codec_named(unit.step.target)
    shape = (rows.array.shape[1], rows.array.shape[0]) if rows.kn else rows.array.shape
    own = Codes(np.empty_like(codes.packed), np.empty_like(codes.block_scale), codes.kn)
    codec.encode(rows, forward, own, Tally(np.empty(shape[0]), np.empty(shape[0])))
    exported, trained = np.empty(shape, np.float32), np.empty(shape, np.float32)
    codec.decode(codes, shared.tensor_scale, Rows(exported))
    codec.decode(own, forward.tensor_scale, Rows(trained))
    differs = int(np.count_nonzero(exported != trained))
    difference = exported.astype(np.float64)
    difference -= trained
    progress.row_sums("forward_noise", unit)[:] = np.square(difference, out=difference).sum(axis=1)
    progress.row_sums("forward_signal", unit)[:] = np.square(trained, dtype=np.float64).sum(axis=1)
    return {"forward_differs": differs, "forward_values": exported.size}


def _dequantize(bench: Bench, unit: Unit, progress: Progress, scratch: Scratch) -> Counts:
    output = unit.step.computed[0]
    dtype, weight = output.part.spec.dtype, _weight(unit.step)
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
    value = _weight(unit.step).value
    if bench.log is None or bench.plan.kept is None or unit.step.key not in bench.plan.kept.weights:
        return
    assert isinstance(value, Decoded)
    assert codes is not None
    scale = stored_tensor_scale(bench.reader, value)
    run = hints.note(bench.log, hints.Decoding(unit, codes, dense, unit.step.target.upper(), scale))
    if run is not None:
        progress.runs.append(run)


def decode(bench: Bench, unit: Unit, out: Rows, scratch: Scratch) -> Codes | None:
    """Decode the unit's rows of a quantised weight into `out`. ValuesError where a value is not finite.

    Returns the codes of a four-bit weight.
    """
    weight = _weight(unit.step)
    value, codes = weight.base, None
    if isinstance(value, BlockScaled):
        bad = _decode_tiles(bench, unit, value, out, scratch)
    else:
        assert isinstance(value, Decoded)
        codes, scale = _codes_in(bench, unit, scratch), stored_tensor_scale(bench.reader, value)
        bad = codec_named(value.format_name).decode(codes, scale, out, inverse=value.inverse)
    if bad >= 0:
        kind = "BF16" if out.array.dtype == np.uint16 else "F32"
        raise ValuesError(
            f"the value at {position(unit, bad)} is not finite in {kind}: it or its scale is NaN or too large",
            where=weight.name,
            hint="the checkpoint is damaged: download or export it again",
        )
    if isinstance(value, Decoded) and value.format.tensor_scale and codes is not None:
        _refuse_negative_scales(weight, unit, codes)
    return codes


def _refuse_negative_scales(weight: Weight, unit: Unit, codes: Codes) -> None:
    """E4M3 has a sign bit that no block scale uses; what a negative one would mean, programs do not agree on."""
    if not codes.block_scale.size or codes.block_scale.max() <= _LARGEST_E4M3:
        return
    scales = codes.block_scale.T if codes.kn else codes.block_scale
    row, block = (int(i) for i in np.argwhere(scales > _LARGEST_E4M3)[0])
    byte = int(scales[row, block])
    found = "NaN" if byte & 0x7F == 0x7F else "negative"
    first = position(unit, row * weight.k + block * weight.k // scales.shape[1])
    raise ValuesError(
        f"the block scale of the values from {first} on is {found} (E4M3 byte 0x{byte:02X}); expected a finite one "
        "without a sign",
        where=weight.name,
        hint="the checkpoint is damaged: download or export it again",
    )


def _decode_tiles(bench: Bench, unit: Unit, value: BlockScaled, out: Rows, scratch: Scratch) -> int:
    """FP8: the unit's rows, and the rows of scales that cover them."""
    assert not out.kn, "a linear layer's rows are rows everywhere"
    codes = read_rows(bench.reader, value.values, False, unit, scratch, part=PACKED)
    columns, dtype = value.scale.spec.shape[1], value.scale.spec.dtype
    first, count = fp8.tile_rows(unit.n0, unit.n1 - unit.n0, value.block[0])
    scales = scratch.array("tiles", (count, columns), dtype)
    bench.reader.read_into(value.scale.file, value.scale.offset + first * columns * DTYPE_BYTES[dtype], scales)
    return fp8.decode(codes.view(np.uint8), fp8.Tiles(scales, dtype, unit.n0, value.block), out.array)


def _transcode(bench: Bench, unit: Unit, progress: Progress, scratch: Scratch) -> Counts:
    """Between block formats: MXFP4 -> NVFP4 in closed form, everything else by way of F32 values."""
    step, weight = unit.step, _weight(unit.step)
    exponent = bench.scales[step.group].exponent if step.group else None
    if exponent is None:
        between = scratch.array("f32", (unit.n1 - unit.n0, weight.k), "F32")
        decode(bench, unit, Rows(between), scratch)  # type: ignore[arg-type]
        return _encode(bench, unit, Rows(between), progress, scratch)  # type: ignore[arg-type]
    source, tally = _codes_in(bench, unit, scratch), _tally(progress, unit)
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
    weight, output = _weight(unit.step), unit.step.computed[0]
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


def _weight(step: Step) -> Weight:
    assert step.weight is not None
    return step.weight


def _codes_in(bench: Bench, unit: Unit, scratch: Scratch) -> Codes:
    value = _weight(unit.step).base
    assert isinstance(value, Decoded)
    packed = read_rows(bench.reader, value.packed, value.kn, unit, scratch, part=PACKED)
    scale = read_rows(bench.reader, value.block_scale, value.kn, unit, scratch, part=BLOCK_SCALE)
    return Codes(packed, scale, value.kn)  # type: ignore[arg-type]  # both are bytes, whatever dtype names them


def codes_out(step: Step, unit: Unit, scratch: Scratch) -> tuple[dict[str, Output], Codes]:
    outputs = {output.part.kind: output for output in step.computed}
    arrays = {}
    for kind in (PACKED, BLOCK_SCALE):
        part = outputs[kind].part
        arrays[kind] = scratch.array(kind, rows_shape(_weight(step), part.spec.elements, part.kn, unit), "U8")
    return outputs, Codes(arrays[PACKED], arrays[BLOCK_SCALE], outputs[PACKED].part.kn)  # type: ignore[arg-type]


def _write_codes(bench: Bench, outputs: Mapping[str, Output], codes: Codes, unit: Unit) -> None:
    write_rows(bench.writers, outputs[PACKED], unit, codes.packed)
    write_rows(bench.writers, outputs[BLOCK_SCALE], unit, codes.block_scale)


def _tally(progress: Progress, unit: Unit) -> Tally:
    return Tally(progress.row_sums("signal", unit), progress.row_sums("noise", unit))


def stored_tensor_scale(reader: Reader, value: Decoded) -> float:
    """The F32 tensor scale of an NVFP4 weight, which must be finite and > 0; 1.0 for formats without one."""
    if value.tensor_scale is None:
        return 1.0
    return stored_scale(reader, value.tensor_scale)


def refuse_nonfinite(weight: Weight, where: list[int]) -> None:
    raise ValuesError(
        f"the value at {where} is NaN or Inf and cannot be quantised",
        where=weight.name,
        hint=f"mend the source, or leave this module as it is with: {exclude(weight.module)}",
    )


def _refuse_merged(weight: Weight, where: list[int]) -> None:
    raise ValuesError(
        f"the merged value at {where} is NaN or Inf",
        where=weight.name,
        hint="the base or the adapter is broken there, or DoRA met a row of zeros: nothing sensible can be written",
    )


def _refuse_overflow(weight: Weight, where: list[int], value: float, dtype: str) -> None:
    raise ValuesError(
        f"the value {value!r} at {where} is too large for {dtype}",
        where=weight.name,
        hint="choose a target with more range: --to bf16 or --to f32",
    )
