"""The values of a unit's rows, whatever the weight is on disk and whatever adapters add to it."""

from __future__ import annotations

import numpy as np

from fp4conv.codecs import codec_named, fp8
from fp4conv.codecs.base import Codes, Rows
from fp4conv.codecs.dense import widen
from fp4conv.errors import ValuesError
from fp4conv.layouts.parts import BLOCK_SCALE, PACKED
from fp4conv.model import BlockScaled, Decoded, LoraMerged, Stored, Weight
from fp4conv.pipeline import merging
from fp4conv.pipeline.bench import Bench, Progress, weight_of
from fp4conv.pipeline.matrices import Scratch, position, read_rows, rows_shape
from fp4conv.pipeline.refusals import refuse_merged
from fp4conv.pipeline.settle import stored_scale
from fp4conv.plan import Unit
from fp4conv.safetensors_io import DTYPE_BYTES, Reader, TensorRef

_LARGEST_E4M3 = 0x7E  # the byte of 448; above it are NaN and what has a sign


def read_values(
    bench: Bench, unit: Unit, scratch: Scratch, progress: Progress | None = None, *, kn: bool = False
) -> Rows:
    """The unit's rows of any weight as the kernels take them: BF16 or F32, with adapters merged.

    A dense base lies as it is stored, a quantised one is decoded to [N, K], or to [K, N] with `kn`. With `progress`
    the sizes of a merged weight and of its change are kept, and a value that is not finite is refused.
    """
    weight = weight_of(unit.step)
    base = read_base(bench, unit, scratch, kn=kn)
    if not isinstance(weight.value, LoraMerged):
        return base
    merged = merging.merge_rows(bench.factors, weight.value, unit, base, scratch)
    if progress is not None and weight.value.deltas:
        sums = progress.row_sums("change", unit), progress.row_sums("base", unit)
        bad = merging.measure_change(base, merged, sums)
        if bad >= 0:
            refuse_merged(weight, position(unit, bad))
    return merged


def read_base(bench: Bench, unit: Unit, scratch: Scratch, *, kn: bool = False) -> Rows:
    """The same without adapters."""
    weight = weight_of(unit.step)
    if isinstance(weight.base, Stored):
        return _dense_rows(bench, weight.base.ref, unit, scratch)
    dtype = merging.base_dtype(weight.value) if isinstance(weight.value, LoraMerged) else "F32"
    rows = Rows(scratch.array("base", rows_shape(weight, weight.elements, kn, unit), dtype), kn)  # type: ignore[arg-type]
    decode(bench, unit, rows, scratch)
    return rows


def _dense_rows(bench: Bench, ref: TensorRef, unit: Unit, scratch: Scratch) -> Rows:
    """The unit's rows of a dense weight: BF16 and F32 as they are, F16 widened."""
    weight = weight_of(unit.step)
    values = read_rows(bench.reader, ref, weight.kn, unit, scratch, part="dense")
    if ref.spec.dtype == "F16":
        wide = scratch.array("f32", values.shape, "F32")
        widen(values, "F16", wide)  # type: ignore[arg-type]
        values = wide
    return Rows(values, weight.kn)  # type: ignore[arg-type]


def decode(bench: Bench, unit: Unit, out: Rows, scratch: Scratch) -> Codes | None:
    """Decode the unit's rows of a quantised weight into `out`. ValuesError where a value is not finite.

    Returns the codes of a four-bit weight.
    """
    weight = weight_of(unit.step)
    value, codes = weight.base, None
    if isinstance(value, BlockScaled):
        bad = decode_tiles(bench.reader, unit, out, scratch)
    else:
        assert isinstance(value, Decoded)
        codes, scale = codes_in(bench.reader, unit, scratch), stored_tensor_scale(bench.reader, value)
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


def decode_tiles(reader: Reader, unit: Unit, out: Rows, scratch: Scratch) -> int:
    """FP8: decode the unit's rows by the rows of scales that cover them; see `fp8.decode`."""
    value = weight_of(unit.step).base
    assert isinstance(value, BlockScaled)
    assert not out.kn, "a linear layer's rows are rows everywhere"
    codes = read_rows(reader, value.values, False, unit, scratch, part=PACKED)
    columns, dtype = value.scale.spec.shape[1], value.scale.spec.dtype
    first, count = fp8.tile_rows(unit.n0, unit.n1 - unit.n0, value.block[0])
    scales = scratch.array("tiles", (count, columns), dtype)
    reader.read_into(value.scale.file, value.scale.offset + first * columns * DTYPE_BYTES[dtype], scales)
    return fp8.decode(codes.view(np.uint8), fp8.Tiles(scales, dtype, unit.n0, value.block), out.array)


def codes_in(reader: Reader, unit: Unit, scratch: Scratch) -> Codes:
    """The unit's rows of a four-bit weight as they lie on disk."""
    value = weight_of(unit.step).base
    assert isinstance(value, Decoded)
    packed = read_rows(reader, value.packed, value.kn, unit, scratch, part=PACKED)
    scale = read_rows(reader, value.block_scale, value.kn, unit, scratch, part=BLOCK_SCALE)
    return Codes(packed, scale, value.kn)  # type: ignore[arg-type]  # both are bytes, whatever dtype names them


def stored_tensor_scale(reader: Reader, value: Decoded) -> float:
    """The F32 tensor scale of an NVFP4 weight, which must be finite and > 0; 1.0 for formats without one."""
    if value.tensor_scale is None:
        return 1.0
    return stored_scale(reader, value.tensor_scale)
