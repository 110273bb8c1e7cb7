"""The formats as values, against ml_dtypes and the bits a value that their makers give."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fp4conv.formats import E2M1, E2M1_MAGNITUDES, E4M3, E8M0, MXFP4, NVFP4, FloatFormat


@pytest.mark.parametrize(
    ("form", "theirs"),
    [(E2M1, ml_dtypes.float4_e2m1fn), (E4M3, ml_dtypes.float8_e4m3fn), (E8M0, ml_dtypes.float8_e8m0fnu)],
)
def test_range_and_nan_codes_are_those_of_ml_dtypes(form: FloatFormat, theirs: type) -> None:
    codes = np.arange(2**form.bits, dtype=np.uint8)
    values = codes.view(theirs).astype(np.float64)
    finite = values[np.isfinite(values)]
    assert finite.max() == form.max_value
    assert finite[finite > 0].min() == form.min_value
    assert tuple(codes[np.isnan(values)]) == form.nan_codes
    assert bool((finite < 0).any()) is form.signed


def test_e2m1_magnitudes_are_those_of_ml_dtypes() -> None:
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert tuple(values[:8]) == E2M1_MAGNITUDES
    assert tuple(-values[8:]) == E2M1_MAGNITUDES


def test_bits_a_value() -> None:
    """OCP MX v1.0: 4.25 for MXFP4. NVIDIA: 4.5 for NVFP4, the tensor scale aside."""
    assert (MXFP4.bits_per_value, NVFP4.bits_per_value) == (4.25, 4.5)
