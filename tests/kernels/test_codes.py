"""Every code of every small format, against the tables of the specifications, ml_dtypes and gfloat."""

from __future__ import annotations

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import numpy.typing as npt
from kernel_cases import U8

from fp4conv.formats import Ties
from fp4conv.kernels import compiled, reference, small_floats

EVERY_BYTE = np.arange(256, dtype=np.uint8)


def same_bits(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> bool:
    nan = np.isnan(left) & np.isnan(right)
    return bool(np.all(nan | (left.view(np.uint32) == right.view(np.uint32))))


def by_gfloat(fmt: gfloat.FormatInfo, codes: U8) -> npt.NDArray[np.float32]:
    return np.array([gfloat.decode_float(fmt, int(c)).fval for c in codes], dtype=np.float32)


def near_midpoints(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The values, all midpoints of neighbours, and the float32 on either side of each."""
    points = np.concatenate([values, (values[:-1] + values[1:]) / 2]).astype(np.float32)
    return np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(1e9))])


def test_e2m1_is_the_table_of_the_mx_specification() -> None:
    """OCP MX v1.0, table 3 of section 5.3.3: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert small_floats.E2M1_VALUES.tolist() == [*table, *(-v for v in table)]
    assert np.signbit(small_floats.E2M1_VALUES[8])


def test_e2m1_equals_ml_dtypes_and_gfloat() -> None:
    codes = EVERY_BYTE[:16]
    assert same_bits(small_floats.E2M1_VALUES, codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert same_bits(small_floats.E2M1_VALUES, by_gfloat(gfloat.formats.format_info_ocp_e2m1, codes))


def test_e4m3_equals_ml_dtypes_and_gfloat() -> None:
    assert same_bits(small_floats.E4M3_VALUES, EVERY_BYTE.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert same_bits(small_floats.E4M3_VALUES, by_gfloat(gfloat.formats.format_info_ocp_e4m3, EVERY_BYTE))
    assert small_floats.E4M3_VALUES[small_floats.E4M3_ONE] == 1.0


def test_e8m0_scales_equal_ml_dtypes_and_gfloat() -> None:
    """Code 1.0 under every scale byte: what the decoders make of E8M0."""
    packed = np.full((256, 16), 0x22, dtype=np.uint8)
    expected = EVERY_BYTE.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert same_bits(expected, by_gfloat(gfloat.formats.format_info_ocp_e8m0, EVERY_BYTE))
    for kernels in (reference, compiled):
        out = np.empty((256, 32), dtype=np.float32)
        assert kernels.decode_mxfp4(packed, EVERY_BYTE[:, None].copy(), False, out) == 255 * 32
        assert same_bits(out, np.broadcast_to(expected[:, None], out.shape).copy())


def test_e4m3_scales_of_nvfp4_equal_ml_dtypes() -> None:
    """Code 1.0 under every block scale, negative ones included, and both block lengths."""
    expected = EVERY_BYTE.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.75)
    for kernels in (reference, compiled):
        for length in (16, 32):
            packed = np.full((256, length // 2), 0x22, dtype=np.uint8)
            out = np.empty((256, length), dtype=np.float32)
            assert kernels.decode_nvfp4(packed, EVERY_BYTE[:, None].copy(), False, 0.75, out) == 127 * length
            assert same_bits(out, np.broadcast_to(expected[:, None], out.shape).copy())


def test_rounding_to_e2m1_equals_ml_dtypes() -> None:
    values = near_midpoints(small_floats.E2M1_VALUES[:8])
    values = np.concatenate([values[values <= 6], -values[values <= 6]])  # ml_dtypes' cast saturates above too
    codes = small_floats.e2m1_codes(values, Ties.EVEN) | (np.signbit(values).astype(np.uint8) << 3)
    assert np.array_equal(codes, values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def test_rounding_to_e2m1_with_ties_down() -> None:
    """Off the midpoints as to even; on them the smaller magnitude."""
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=np.float32)
    assert small_floats.e2m1_codes(midpoints, Ties.DOWN).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert small_floats.e2m1_codes(midpoints, Ties.EVEN).tolist() == [0, 2, 2, 4, 4, 6, 6]
    values = near_midpoints(small_floats.E2M1_VALUES[:8])
    values = values[~np.isin(values, midpoints)]
    assert np.array_equal(small_floats.e2m1_codes(values, Ties.DOWN), small_floats.e2m1_codes(values, Ties.EVEN))


def test_rounding_to_e4m3_equals_ml_dtypes() -> None:
    values = near_midpoints(small_floats.E4M3_VALUES[1:127])
    values = values[(values >= 2**-9) & (values <= 448)]
    assert np.array_equal(small_floats.e4m3_from_f32(values), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_bf16_casts_equal_ml_dtypes() -> None:
    rng = np.random.default_rng(1)
    anything, ties = rng.integers(0, 2**32, 200_000), rng.integers(0, 2**17, 9000) << 15
    values = np.concatenate([anything, ties]).astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):  # NaN in, NaN out
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    number = ~np.isnan(values)
    for kernels in (reference, compiled):
        out = np.empty(values.shape, dtype=np.uint16)
        first = kernels.cast_f32_to_bf16(values, out)
        assert np.array_equal(out[number], expected[number])
        assert np.isnan(out[~number].view(ml_dtypes.bfloat16).astype(np.float32)).all()
        assert first == np.flatnonzero(np.isfinite(values) & ((out & 0x7FFF) == 0x7F80))[0]


def test_bf16_widens_exactly() -> None:
    every = np.arange(65536, dtype=np.uint16)
    for kernels in (reference, compiled):
        out = np.empty(every.shape, dtype=np.float32)
        assert kernels.cast_bf16_to_f32(every, out) == -1
        assert same_bits(out, every.view(ml_dtypes.bfloat16).astype(np.float32))
