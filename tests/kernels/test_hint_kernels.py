"""Kernels of round-trip hints: bit-equal to the oracle, and codes and scales that come back whatever they were."""

from __future__ import annotations

from itertools import product
from typing import TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fp4conv.formats import MXFP4, NVFP4, BlockFormat, ScaleRule, Ties
from fp4conv.kernels import compiled, hints, hints_reference

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
BOTH = [False, True]
DTYPES = ["BF16", "F16", "F32"]
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def random_codes(fmt: BlockFormat, n: int, k: int, seed: int) -> tuple[U8, U8]:
    """packed [N, K/2] and scales [N, K/g] of all kinds: small codes only, zeros of both signs, every scale byte."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, k // fmt.block, fmt.block))
    codes &= rng.choice([15, 15, 13, 11, 9, 8, 0], (n, k // fmt.block, 1))
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(n, -1)
    scales = rng.integers(0, 255 if fmt is MXFP4 else 127, (n, k // fmt.block)).astype(np.uint8)
    if fmt is MXFP4:  # codes above 1.5 overflow under the largest two
        scales = np.where(scales > 252, np.uint8(120), scales)
    return packed, scales


Scalar = TypeVar("Scalar", bound=np.generic)


def dense(fmt: BlockFormat, packed: U8, scales: U8, tensor_scale: float, dtype: str) -> npt.NDArray[np.generic]:
    """The decoded values [N, K] in `dtype`, BF16 as uint16 bits, F16 rounded by NumPy."""
    n = packed.shape[0]
    out = np.empty((n, packed.shape[1] * 2), np.uint16 if dtype == "BF16" else np.float32)
    if fmt is MXFP4:
        compiled.decode_mxfp4(packed, scales, False, out)
    else:
        compiled.decode_nvfp4(packed, scales, False, tensor_scale, out)
    if dtype != "F16":
        return out
    with np.errstate(over="ignore"):
        return out.astype(np.float16)


def widened(x: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return x.astype(np.float32) if x.dtype == np.float16 else x


def turned(x: npt.NDArray[Scalar], kn: bool) -> npt.NDArray[Scalar]:
    return np.ascontiguousarray(x.T) if kn else np.ascontiguousarray(x)


def tables_of(fmt: BlockFormat, tensor_scale: float, dtype: str) -> F32:
    return hints.code_tables(hints.factors(fmt, tensor_scale), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4])
def test_tables_are_what_codes_decode_to(fmt: BlockFormat, dtype: str) -> None:
    """Every code under every scale byte, through the decoder."""
    bytes_ = np.arange(256, dtype=np.uint8)
    packed = np.tile(np.array([0x10, 0x32, 0x54, 0x76], np.uint8), (256, fmt.block // 8))
    for tensor_scale in (1.0, 0.1, 2.0**-130, 1e-38):
        found = tables_of(fmt, float(np.float32(tensor_scale)), dtype)
        decoded = dense(fmt, packed, bytes_[:, None], float(np.float32(tensor_scale)), dtype)
        values = decoded.view(ml_dtypes.bfloat16) if dtype == "BF16" else decoded
        valid = bytes_ < (255 if fmt is MXFP4 else 127)
        assert np.array_equal(found[valid], values[valid, :8].astype(np.float32))
        assert np.isnan(found[~valid]).all()


def test_noncanonical_blocks_are_those_of_the_oracle() -> None:
    packed, scales = random_codes(MXFP4, 200, 320, seed=1)
    ours, theirs = np.empty_like(scales), np.empty_like(scales)
    count = hints.noncanonical_mxfp4(packed, scales, ours)
    assert count == hints_reference.noncanonical_mxfp4(packed, scales, theirs)
    assert 0 < count < scales.size
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("rule", MXFP4.rules)
@pytest.mark.parametrize("ties", Ties)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_other_blocks_come_back_under_every_rule(rule: ScaleRule, ties: Ties, dtype: str) -> None:
    """Exactly representable values have one answer: the smallest scale that loses nothing, and their own signs."""
    packed, scales = random_codes(MXFP4, 200, 320, seed=2)
    plane = np.empty_like(scales)
    hints.noncanonical_mxfp4(packed, scales, plane)
    again, scales_again = np.empty_like(packed), np.empty_like(scales)
    signal, noise = np.empty(200), np.empty(200)
    x = dense(MXFP4, packed, scales, 1.0, dtype)
    assert compiled.encode_mxfp4(x, False, rule, ties, again, scales_again, signal, noise) == -1  # type: ignore[arg-type]
    canonical = plane == hints.NO_HINT
    assert np.array_equal(scales_again[canonical], scales[canonical])
    blocks = packed.reshape(200, -1, 16), again.reshape(200, -1, 16)
    assert np.array_equal(blocks[0][canonical], blocks[1][canonical])
    assert not noise.any()


@pytest.mark.parametrize(("x_kn", "plane_kn", "out_kn"), list(product(BOTH, BOTH, BOTH)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4])
def test_restore_and_measure_in_every_orientation(
    fmt: BlockFormat, dtype: str, x_kn: bool, plane_kn: bool, out_kn: bool
) -> None:
    """N = 70 leaves a part of a tile; some blocks have no hint, some have values that the hint does not give."""
    n, k = 70, 160
    packed, scales = random_codes(fmt, n, k, seed=3)
    tensor_scale = float(np.float32(3e-4))
    rng = np.random.default_rng(4)
    if dtype == "F16":
        scales = np.minimum(scales, 140) if fmt is MXFP4 else scales
    x = widened(dense(fmt, packed, scales, tensor_scale, dtype)).copy()
    other = rng.random(x.shape) < 0.01
    x[other] = x.T.reshape(x.shape)[other]
    plane = np.where(rng.random(scales.shape) < 0.2, np.uint8(hints.NO_HINT), scales)
    factor = hints.factors(fmt, tensor_scale)
    results = []
    for kernels in (hints, hints_reference):
        codes = turned(np.full_like(packed, 0x5A), out_kn)
        found_scales, matched = turned(np.full_like(scales, 7), out_kn), np.full_like(scales, 9)
        missed = kernels.restore(
            turned(x, x_kn), x_kn, turned(plane, plane_kn), plane_kn, hints.code_tables(factor, dtype),
            codes, found_scales, out_kn, matched,
        )  # fmt: skip
        signal, noise = np.full(n, np.nan), np.full(n, np.nan)
        kernels.measure(turned(x, x_kn), x_kn, codes, found_scales, out_kn, factor, signal, noise)
        results.append((missed, codes, found_scales, matched, signal, noise))
    for ours, theirs in zip(*results, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    missed, codes, found_scales, matched, _, _ = results[0]
    assert 0 < missed < scales.size
    fits = matched.astype(bool)
    assert np.array_equal(turned(found_scales, out_kn)[fits], scales[fits])
    assert (turned(found_scales, out_kn)[~fits] == 7).all()
    assert (turned(codes, out_kn).reshape(n, -1, fmt.block // 2)[~fits] == 0x5A).all()


def test_measure_is_what_the_encoder_measured() -> None:
    x = np.random.default_rng(5).standard_normal((33, 96)).astype(np.float32)
    packed, scales = np.empty((33, 48), np.uint8), np.empty((33, 6), np.uint8)
    sums = [np.empty(33) for _ in range(4)]
    scale = float(np.float32(np.abs(x).max() / 2688))
    compiled.encode_nvfp4(x, False, scale, ScaleRule.MSE, Ties.EVEN, packed, scales, sums[0], sums[1])
    hints.measure(x, False, packed, scales, False, hints.factors(NVFP4, scale), *sums[2:])
    assert np.array_equal(sums[0], sums[2])
    assert np.array_equal(sums[1], sums[3])


@QUICK
@given(st.data(), st.sampled_from([MXFP4, NVFP4]), st.sampled_from(DTYPES))
def test_any_codes_and_scales_come_back(data: st.DataObject, fmt: BlockFormat, dtype: str) -> None:
    """From the values, the scales, and the codes of blocks that `restore` alone would get wrong."""
    half, blocks = fmt.block // 2, 4
    drawn = np.frombuffer(data.draw(st.binary(min_size=half * blocks, max_size=half * blocks)), np.uint8)
    packed = drawn.reshape(1, -1) & np.uint8(data.draw(st.sampled_from([0xFF, 0xBB, 0x99, 0x88, 0x00])))
    top = 254 if fmt is MXFP4 else 126
    scales = np.array([data.draw(st.lists(st.integers(0, top), min_size=blocks, max_size=blocks))], np.uint8)
    tensor_scale = 1.0
    if fmt is NVFP4:
        bits = data.draw(st.integers(1, 0x7F7FFFFF) | st.integers(1, 0x00800000))
        tensor_scale = float(np.uint32(bits).view(np.float32))
    x = widened(dense(fmt, packed, scales, tensor_scale, dtype))
    assume(bool(np.isfinite(x.view(ml_dtypes.bfloat16) if dtype == "BF16" else x).all()))
    tables = tables_of(fmt, tensor_scale, dtype)
    again, scales_again, matched = np.full_like(packed, 0x77), np.full_like(scales, 1), np.empty_like(scales)
    assert hints.restore(x, False, scales, False, tables, again, scales_again, False, matched) == 0  # type: ignore[arg-type]
    assert np.array_equal(scales_again, scales)
    wrong = np.flatnonzero((again != packed).reshape(blocks, half).any(axis=1))
    uncertain = hints.ambiguous_bytes(tables)[scales[0]]
    assert uncertain[wrong].all()
    codes = hints.take_codes(packed, False, wrong, half)
    assert hints.codes_reproduce(x, False, wrong, scales[0, wrong], codes, tables).all()  # type: ignore[arg-type]
    hints.put_codes(again, False, wrong, codes)
    assert np.array_equal(again, packed)


def test_codes_by_block_number_in_either_orientation() -> None:
    packed, scales = random_codes(NVFP4, 5, 64, seed=6)
    x = dense(NVFP4, packed, scales, 1.0, "F32")
    blocks = np.array([0, 3, 7, 19])
    tables = tables_of(NVFP4, 1.0, "F32")
    for kn in BOTH:
        codes = hints.take_codes(turned(packed, kn), kn, blocks, 8)
        assert np.array_equal(codes, packed.reshape(20, 8)[blocks])
        given_scales = scales.reshape(-1)[blocks]
        zero_sign = codes ^ 0x88
        assert hints.codes_reproduce(turned(x, kn), kn, blocks, given_scales, codes, tables).all()  # type: ignore[arg-type]
        assert not hints.codes_reproduce(turned(x, kn), kn, blocks, given_scales, zero_sign, tables).any()  # type: ignore[arg-type]
        out = turned(np.zeros_like(packed), kn)
        hints.put_codes(out, kn, blocks, codes)
        assert np.array_equal(turned(out, kn).reshape(20, 8)[blocks], codes)
