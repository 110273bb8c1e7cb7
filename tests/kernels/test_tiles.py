"""Decoders of FP8 tiles, and of NVFP4 under a reciprocal: compiled against the oracle, codes against ml_dtypes."""

from __future__ import annotations

from typing import TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4conv.kernels import compiled, reference

Floats: TypeAlias = "npt.NDArray[np.uint16] | npt.NDArray[np.float32]"
seeds = st.integers(0, 2**32 - 1)


def tiles(seed: int, n: int, k: int, first: int, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Arbitrary codes, and scales of every magnitude that F32 has, some of them 0, Inf or NaN."""
    rng = np.random.default_rng(seed)
    down = (first + n - 1) // block[0] - first // block[0] + 1
    bits = rng.integers(0, 2**32, (down, -(-k // block[1])), dtype=np.uint32)
    scales = bits.view(np.float32) if seed % 3 else np.ldexp(np.float32(1.5), (bits % 40).astype(np.int32) - 20)
    return rng.integers(0, 256, (n, k), dtype=np.uint8), np.ascontiguousarray(scales.astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    first=st.integers(0, 9),
    block=st.tuples(st.integers(1, 5), st.integers(1, 16)),
)
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_compiled_tiles_equal_the_oracle(
    dtype: type, seed: int, shape: tuple[int, int], first: int, block: tuple[int, int]
) -> None:
    codes, scales = tiles(seed, *shape, first, block)
    ours: Floats = np.empty(shape, dtype)
    oracle: Floats = np.empty(shape, dtype)
    found = [
        compiled.decode_fp8_tiles(codes, scales, first, block, ours),
        reference.decode_fp8_tiles(codes, scales, first, block, oracle),
    ]
    assert found[0] == found[1]
    same = ours == oracle
    if dtype is np.float32:
        same |= np.isnan(ours) & np.isnan(oracle)
    else:
        nan = [(out.view(np.uint16) & 0x7FFF) > 0x7F80 for out in (ours, oracle)]
        same |= nan[0] & nan[1]  # which NaN it is differs from machine to machine
    assert same.all()


def test_every_code_is_that_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    out = np.empty((1, 256), np.float32)
    assert compiled.decode_fp8_tiles(codes, np.ones((1, 1), np.float32), 0, (1, 256), out) == 0x7F  # the first NaN
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.isfinite(expected)
    assert np.array_equal(np.isfinite(out), finite)
    assert out[finite].tobytes() == expected[finite].tobytes()


@settings(deadline=None, max_examples=60)
@given(seed=seeds, whole=st.floats(2.0**-120, 2.0**120, width=32))
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_division_by_the_reciprocal_equals_the_oracle(dtype: type, turned: bool, seed: int, whole: float) -> None:
    rng = np.random.default_rng(seed)
    packed, scales = rng.integers(0, 256, (3, 16), dtype=np.uint8), rng.integers(0, 127, (3, 2), dtype=np.uint8)
    ours: Floats = np.empty((32, 3) if turned else (3, 32), dtype)
    oracle: Floats = np.empty_like(ours)
    found = [
        module.decode_nvfp4(packed, scales, False, whole, out, turned, inverse=True)
        for module, out in ((compiled, ours), (reference, oracle))
    ]
    assert found[0] == found[1]
    assert ours.tobytes() == oracle.tobytes()
