"""Scalars of the source that decide scales: read, widened to F32, and checked."""

from __future__ import annotations

import numpy as np

from fp4conv.codecs.dense import widen
from fp4conv.errors import SourceError, ValuesError
from fp4conv.model import FLOAT_DTYPES
from fp4conv.pipeline.bench import Bench
from fp4conv.plan import ScaleOf
from fp4conv.safetensors_io import Reader, TensorRef, numpy_dtype


def read_scalar(reader: Reader, ref: TensorRef) -> float:
    """The F32 value of a tensor of one BF16, F16 or F32 element."""
    if ref.spec.dtype not in FLOAT_DTYPES or ref.spec.elements != 1:
        raise SourceError(
            f"{ref.spec.dtype} {list(ref.spec.shape)}; expected one floating-point value",
            where=f"{ref.name} ({ref.file})",
        )
    stored = np.empty(1, numpy_dtype(ref.spec.dtype))
    reader.read_into(ref.file, ref.offset, stored)
    value = np.empty(1, np.float32)
    widen(stored, ref.spec.dtype, value)
    return float(value[0])


def frozen_amax(bench: Bench, ref: TensorRef) -> float:
    """A quantiser's stored amax, which must be finite and greater than zero."""
    value = read_scalar(bench.reader, ref)
    if not (np.isfinite(value) and value > 0):
        raise ValuesError(
            f"a stored amax of {value}; expected finite and greater than zero",
            where=f"{ref.name} ({ref.file})",
            hint="was the model calibrated? To take the scales from the weights instead: --scale-rule mse",
        )
    return value


def scale_of(bench: Bench, origin: ScaleOf) -> float:
    """The F32 scale max(amax) / divisor, divided in F32 as ModelOpt's export does."""
    largest = max(frozen_amax(bench, ref) for ref in origin.amax)
    return float(np.float32(largest) / np.float32(origin.divisor))
