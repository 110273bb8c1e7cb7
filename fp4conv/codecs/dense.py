"""Dense values between BF16, F16 and F32: widening is exact, narrowing rounds half to even and must not overflow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.kernels import compiled

Floats = npt.NDArray[np.uint16] | npt.NDArray[np.float16] | npt.NDArray[np.float32]


def widen(values: Floats, dtype: str, out: npt.NDArray[np.float32]) -> None:
    """Write the F32 values of a BF16 (as uint16), F16 or F32 array of any shape into `out` of the same shape."""
    if dtype == "BF16":
        compiled.cast_bf16_to_f32(values.reshape(-1).view(np.uint16), out.reshape(-1))
    else:
        out[...] = values


def narrow(values: npt.NDArray[np.float32], dtype: str, out: Floats) -> int:
    """Round F32 `values` to `dtype` into `out`. Returns -1, or the flat index of the first that overflowed to Inf."""
    if dtype == "BF16":
        return compiled.cast_f32_to_bf16(values.reshape(-1), out.reshape(-1).view(np.uint16))
    if dtype == "F32":
        out[...] = values
        return -1
    with np.errstate(over="ignore"):
        out[...] = values
    overflowed = np.flatnonzero(np.isinf(out) & np.isfinite(values))
    return int(overflowed[0]) if overflowed.size else -1


def count_nonfinite(values: npt.NDArray[np.generic], dtype: str) -> int:
    """How many values of a BF16 (as uint16), F16 or F32 array are NaN or Inf."""
    if dtype == "F16":
        return int(values.size - np.count_nonzero(np.isfinite(values)))
    flat = values.reshape(-1)
    return compiled.count_nonfinite(flat.view(np.uint16) if dtype == "BF16" else flat.view(np.float32))
