"""The small formats in NumPy: tables of their values, and how one number is rounded to each.

Owns the tables from which the compiled kernels take theirs, and the roundings of the oracle. Knows nothing of
blocks. Sources: OCP Microscaling Formats v1.0, section 5.3.3; OCP OFP8 v1.0, table 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fp4conv.formats import E2M1_MAGNITUDES, MXFP4, Ties
from fp4conv.kernels.contract import F32

E2M1_VALUES = np.array([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)], dtype=np.float32)
_MIDPOINTS = (E2M1_VALUES[:7] + E2M1_VALUES[1:8]) / np.float32(2)


def _e4m3_values() -> F32:
    """The 256 values of E4M3 (OFP8 table 1): bias 7, exponent 0 is subnormal, 0x7F and 0xFF are NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    magnitude[127] = np.nan
    return np.concatenate([magnitude, -magnitude]).astype(np.float32)


E4M3_VALUES = _e4m3_values()
E4M3_ONE = 0x38


def block_factors(format_name: str, tensor_scale: float, *, inverse: bool) -> F32:
    """[256]: what codes are multiplied by under each scale byte, as the decoders have it; NaN under a NaN scale."""
    if format_name == MXFP4.name:
        return np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)
    with np.errstate(all="ignore"):
        factor = np.float32(tensor_scale)
        return (E4M3_VALUES / factor if inverse else E4M3_VALUES * factor).astype(np.float32)


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> F32:
    """BF16 bits widened to the same values in float32; any shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """float32 to BF16 bits, roundTiesToEven; a NaN stays a (quiet) NaN of the same sign."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def e2m1_codes(quotient: F32, ties: Ties) -> npt.NDArray[np.uint8]:
    """Magnitude codes 0..7 of |quotient|, saturating at 6; any shape."""
    magnitude = np.abs(quotient)
    codes = np.zeros(magnitude.shape, dtype=np.uint8)
    for code, midpoint in enumerate(_MIDPOINTS):
        up_on_tie = ties is Ties.EVEN and code % 2 == 1
        codes += (magnitude >= midpoint) if up_on_tie else (magnitude > midpoint)
    return codes


def e4m3_from_f32(values: F32) -> npt.NDArray[np.uint8]:
    """E4M3 codes of positive values within [2^-9, 448], roundTiesToEven."""
    step = np.ldexp(np.float32(1), np.maximum(np.frexp(values)[1] - 4, -9)).astype(np.float32)
    rounded = np.rint(values / step) * step  # a power of two divides exactly; rint rounds ties to even
    return np.searchsorted(E4M3_VALUES[:127], rounded).astype(np.uint8)
