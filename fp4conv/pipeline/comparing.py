"""How far what is written is from the forward pass of the training that made it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fp4conv.codecs import codec_named
from fp4conv.codecs.base import Codes, Coding, Rows, Tally
from fp4conv.formats import MergeRounding
from fp4conv.model import LoraMerged
from fp4conv.pipeline import merging
from fp4conv.pipeline.bench import Bench, Counts, Progress
from fp4conv.pipeline.matrices import Scratch
from fp4conv.pipeline.reading import read_base
from fp4conv.plan import Unit


def compare_with_adapter_beside(
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


def compare_with_forward(
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
