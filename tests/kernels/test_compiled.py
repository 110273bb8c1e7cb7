"""The compiled kernels against the oracle: equal in every bit, for every rule, type and orientation."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import BF16, F32, Encoded, assert_same, encode, matrices, normal, to_bf16

from fp4conv.formats import MXFP4, NVFP4, BlockFormat, ScaleRule, Ties
from fp4conv.kernels import compiled, reference, small_floats
from fp4conv.kernels.contract import MAX_TENSOR_SCALE, MIN_TENSOR_SCALE

RULES = [(fmt, rule) for fmt in (MXFP4, NVFP4) for rule in fmt.rules]
TYPES = [np.uint16, np.float32]
BOTH = [False, True]
ADVERSARIAL = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def stored(values: F32, dtype: type, kn: bool) -> F32 | BF16:
    """As float32, or as BF16 by cutting bits off, which makes no Inf."""
    x = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16) if dtype is np.uint16 else values
    return np.ascontiguousarray(x.T) if kn else x  # type: ignore[return-value]


def tensor_scale_of(values: F32) -> float:
    return float(np.float32(max(np.abs(values).max() / 2688, 2.0**-126)))


@pytest.mark.parametrize(("fmt", "rule"), RULES)
@pytest.mark.parametrize("dtype", TYPES)
def test_encode_every_orientation(fmt: BlockFormat, rule: ScaleRule, dtype: type) -> None:
    """N = 70 leaves a part of a tile of lanes; K = 160 leaves one too."""
    values = normal((70, 160), spread=3)
    scale = tensor_scale_of(values)
    for ties in Ties:
        expected = encode(reference, fmt, stored(values, dtype, False), rule, ties, tensor_scale=scale)
        for x_kn, out_kn in product(BOTH, BOTH):
            x = stored(values, dtype, x_kn)
            found = encode(compiled, fmt, x, rule, ties, tensor_scale=scale, x_kn=x_kn, out_kn=out_kn)
            assert_same(row_major(found) if out_kn else found, expected)
            by_oracle = encode(reference, fmt, x, rule, ties, tensor_scale=scale, x_kn=x_kn, out_kn=out_kn)
            assert_same(found, by_oracle)


def row_major(found: Encoded) -> Encoded:
    """A K-major result turned: codes go two a byte along K in both."""
    packed, scales = np.ascontiguousarray(found.packed.T), np.ascontiguousarray(found.scales.T)
    return Encoded(found.position, packed, scales, found.signal, found.noise)


@pytest.mark.parametrize("ties", list(Ties))
@pytest.mark.parametrize("dtype", TYPES)
@ADVERSARIAL
@given(matrices(32))
def test_encode_mxfp4_of_hard_values(dtype: type, ties: Ties, values: F32) -> None:
    x = stored(values, dtype, False)
    for rule in MXFP4.rules:
        assert_same(encode(compiled, MXFP4, x, rule, ties), encode(reference, MXFP4, x, rule, ties))


@pytest.mark.parametrize("ties", list(Ties))
@pytest.mark.parametrize("dtype", TYPES)
@ADVERSARIAL
@given(matrices(16), st.integers(-140, 119), st.sampled_from([None, 1.0, 4 / 3, 1.9]))
def test_encode_nvfp4_of_hard_values(dtype: type, ties: Ties, values: F32, exponent: int, factor: float | None) -> None:
    """Under the tensor scale of amax, and (with a factor) under any that the kernels take."""
    free = min(float(np.float32((factor or 1.0) * 2.0**exponent)), MAX_TENSOR_SCALE)
    scale = tensor_scale_of(values) if factor is None else free
    x = stored(values, dtype, False)
    for rule in NVFP4.rules:
        found = encode(compiled, NVFP4, x, rule, ties, tensor_scale=scale)
        assert_same(found, encode(reference, NVFP4, x, rule, ties, tensor_scale=scale))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4])
@pytest.mark.parametrize("scale", [MIN_TENSOR_SCALE, 2.0**-101, 2.0**-100, 1.0, MAX_TENSOR_SCALE])
def test_encode_at_the_ends_of_float32(fmt: BlockFormat, scale: float) -> None:
    tiny, huge = np.float32(2.0**-149), np.finfo(np.float32).max
    rows = [[tiny] * 32, [-tiny, 0] * 16, [huge] * 32, [huge, -tiny] * 16, [2.0**-126, 2.0**-127] * 16]
    x = np.array(rows, dtype=np.float32)
    for rule, ties in product(fmt.rules, Ties):
        found = encode(compiled, fmt, x, rule, ties, tensor_scale=scale)
        assert_same(found, encode(reference, fmt, x, rule, ties, tensor_scale=scale))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_nonfinite_is_found_in_row_order(fmt: BlockFormat, dtype: type, bad: float) -> None:
    values = normal((70, 160))
    for where in ([(0, 0)], [(69, 159)], [(3, 100), (4, 0), (60, 2)], [(65, 1), (64, 159)]):
        spoilt = values.copy()
        for place in where:
            spoilt[place] = bad
        row, column = min(where)
        for x_kn, kernels in product(BOTH, (compiled, reference)):
            x = stored(spoilt, dtype, x_kn)
            found = encode(kernels, fmt, x, fmt.rules[0], x_kn=x_kn)
            assert found.position == row * 160 + column
            assert kernels.amax(x)[1] == (column * 70 + row if x_kn and len(where) == 1 else kernels.amax(x)[1])
            assert kernels.count_nonfinite(x) == len(where)


@pytest.mark.parametrize("dtype", TYPES)
def test_scans(dtype: type) -> None:
    values = normal((7, 96), spread=20)
    x = stored(values, dtype, False)
    wide = small_floats.bf16_to_f32(x) if x.dtype == np.uint16 else values  # type: ignore[arg-type]
    assert compiled.amax(x) == reference.amax(x) == (float(np.abs(wide).max()), -1)
    assert compiled.amax(x.reshape(-1)) == reference.amax(x)
    assert compiled.count_nonfinite(x) == 0
    assert compiled.amax(x[:0]) == reference.amax(x[:0]) == (0.0, -1)
    x.reshape(-1)[50] = np.nan if dtype is np.float32 else 0x7FC0
    x.reshape(-1)[20] = -np.inf if dtype is np.float32 else 0xFF80
    assert compiled.amax(x) == reference.amax(x)
    assert compiled.amax(x)[1] == 20
    assert compiled.count_nonfinite(x) == reference.count_nonfinite(x) == 2


def decoded(kernels: object, fmt: BlockFormat, arrays: tuple[npt.NDArray[np.uint8], ...], kn: bool, out: object) -> int:
    packed, scales = (np.ascontiguousarray(a.T) if kn else a for a in arrays)
    out_kn = out.shape[0] != arrays[0].shape[0]  # type: ignore[attr-defined]
    if fmt.tensor_scale:
        return int(kernels.decode_nvfp4(packed, scales, kn, float(np.float32(0.3)), out, out_kn))  # type: ignore[attr-defined]
    return int(kernels.decode_mxfp4(packed, scales, kn, out, out_kn))  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("fmt", "block"), [(MXFP4, 32), (NVFP4, 16), (NVFP4, 32)])
@pytest.mark.parametrize("shape", [(70, 160), (3, 2080), (1, 32)])
def test_decode_every_orientation(fmt: BlockFormat, block: int, dtype: type, shape: tuple[int, int]) -> None:
    """Every scale byte that stays finite, every code."""
    n, k = shape
    rng = np.random.default_rng(5)
    packed = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    scales = rng.integers(0, 253 if fmt is MXFP4 else 127, (n, k // block), dtype=np.uint8)
    expected: F32 | BF16 = np.empty(shape, dtype=dtype)
    assert decoded(reference, fmt, (packed, scales), False, expected) == -1
    for packed_kn, out_kn in product(BOTH, BOTH):
        if out_kn and n == k:
            continue
        out: F32 | BF16 = np.empty((k, n) if out_kn else (n, k), dtype=dtype)
        assert decoded(compiled, fmt, (packed, scales), packed_kn, out) == -1
        turned = np.ascontiguousarray(out.T) if out_kn else out
        assert turned.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", TYPES)
def test_decode_reports_the_first_overflow(dtype: type) -> None:
    """Bytes 253 and 254 are fine for small codes; 255 is NaN under every code."""
    packed = np.full((3, 32), 0x11, dtype=np.uint8)
    scales = np.full((3, 2), 254, dtype=np.uint8)
    out: F32 | BF16 = np.empty((3, 64), dtype=dtype)
    for kernels in (reference, compiled):
        assert kernels.decode_mxfp4(packed, scales, False, out) == -1, "0.5 x 2^127"
        packed[1, 20] = 0x61  # 4 at k = 41 of row 1
        assert kernels.decode_mxfp4(packed, scales, False, out) == 64 + 41
        packed[1, 20] = 0x11
        scales[2, 1] = 255
        assert kernels.decode_mxfp4(packed, scales, False, out) == 2 * 64 + 32
        scales[2, 1] = 254
        # 1.9990234 x 2^127 is the largest step below float32's end, and rounds to Inf in BF16 alone.
        block_scales = np.full((3, 4), 0x38, dtype=np.uint8)
        tensor_scale = float(np.float32(float.fromhex("0x1.ffep127")))
        expected = 0 if dtype is np.uint16 else -1
        codes = np.full((3, 32), 0x22, dtype=np.uint8)
        assert kernels.decode_nvfp4(codes, block_scales, False, tensor_scale, out) == expected


def test_arrays_may_be_read_only_and_compile_once() -> None:
    x = to_bf16(normal((2, 64)))
    encode(compiled, MXFP4, x, ScaleRule.FLOOR)
    from fp4conv.kernels import encode as module

    before = len(module.encode_mx.signatures)  # type: ignore[attr-defined]
    frozen = np.frombuffer(x.tobytes(), dtype=np.uint16).reshape(2, 64)
    assert_same(encode(compiled, MXFP4, frozen, ScaleRule.FLOOR), encode(reference, MXFP4, x, ScaleRule.FLOOR))
    assert len(module.encode_mx.signatures) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("kernels", [reference, compiled])
def test_misfits_are_asserted(kernels: object) -> None:
    x = np.zeros((2, 64), dtype=np.float32)
    with pytest.raises(AssertionError, match="multiple of 32"):
        encode(kernels, MXFP4, x[:, :48].copy(), ScaleRule.FLOOR)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="no rule"):
        encode(kernels, NVFP4, x, ScaleRule.FLOOR)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="not a float32"):
        encode(kernels, NVFP4, x, ScaleRule.AMAX, tensor_scale=0.1)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="out of range"):
        encode(kernels, NVFP4, x, ScaleRule.AMAX, tensor_scale=0.0)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="contiguous"):
        encode(kernels, MXFP4, np.zeros((64, 64), dtype=np.float32)[:, ::2], ScaleRule.FLOOR)  # type: ignore[arg-type]
