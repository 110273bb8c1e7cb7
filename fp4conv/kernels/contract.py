"""What every kernel demands of its arrays: types, shapes, contiguity, the range of a tensor scale.

Shared by the oracle and the compiled kernels, so that both refuse the same calls. A broken demand is a
bug of the caller, hence `assert`: the layers above have checked the user's data long before.
"""

# ruff: noqa: PLR0917 -- the arrays of a call come in one fixed order everywhere

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fp4conv.formats import BlockFormat, ScaleRule
from fp4conv.kernels.window import TENSOR_EXPONENTS

U8: TypeAlias = npt.NDArray[np.uint8]
F32: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]
Source: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.float32]  # BF16 bits or float32
Target: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.float32]

# Between these the F32 product with every E4M3 scale is neither zero nor infinite.
MIN_TENSOR_SCALE = 2.0**-140
MAX_TENSOR_SCALE = 2.0**119


def logical(shape: tuple[int, ...], kn: bool) -> tuple[int, int]:
    """(rows N, columns K) of a 2-D array that is stored [N, K], or [K, N] when `kn`."""
    assert len(shape) == 2, f"expected a 2-D array, found shape {shape}"
    return (shape[1], shape[0]) if kn else (shape[0], shape[1])


def _check(name: str, array: npt.NDArray[np.generic], shape: tuple[int, int], kn: bool, *dtypes: type) -> None:
    assert array.dtype in [np.dtype(d) for d in dtypes], f"{name} has dtype {array.dtype}"
    assert array.flags.c_contiguous, f"{name} is not C-contiguous"
    assert logical(array.shape, kn) == shape, f"{name} has shape {array.shape}, expected (N, K) = {shape}, kn={kn}"


def _check_sums(rows: int, signal: F64, noise: F64) -> None:
    for name, sums in (("signal", signal), ("noise", noise)):
        assert sums.dtype == np.float64, f"{name} has dtype {sums.dtype}"
        assert sums.shape == (rows,), f"{name} has shape {sums.shape}, expected {(rows,)}"
        assert sums.flags.c_contiguous, f"{name} is not C-contiguous"


def _block_length(k: int, blocks: int, *lengths: int) -> int:
    """The one of `lengths` that `blocks` blocks in K values have; the first where there are none."""
    length = k // blocks if blocks else lengths[0]
    assert length in lengths, f"{blocks} scales for K = {k}"
    assert length * blocks == k, f"{blocks} scales for K = {k}"
    return length


def check_encode(
    fmt: BlockFormat,
    x: Source,
    x_kn: bool,
    rule: ScaleRule,
    packed: U8,
    scales: U8,
    signal: F64,
    noise: F64,
    out_kn: bool,
) -> tuple[int, int]:
    """Assert that the arrays of an encode call fit together; returns (N, K)."""
    assert rule in fmt.rules, f"{fmt.name} has no rule {rule}"
    n, k = logical(x.shape, x_kn)
    assert k % fmt.block == 0, f"K = {k} is not a multiple of {fmt.block}"
    _check("x", x, (n, k), x_kn, np.uint16, np.float32)
    _check("packed", packed, (n, k // 2), out_kn, np.uint8)
    _check("scales", scales, (n, k // fmt.block), out_kn, np.uint8)
    _check_sums(n, signal, noise)
    return n, k


def check_decode(
    packed: U8, scales: U8, packed_kn: bool, out: Target, out_kn: bool, block_lengths: tuple[int, ...]
) -> tuple[int, int, int]:
    """Assert that the arrays of a decode call fit together; returns (N, K, block length)."""
    n, half_k = logical(packed.shape, packed_kn)
    k, blocks = half_k * 2, logical(scales.shape, packed_kn)[1]
    block = _block_length(k, blocks, *block_lengths)
    _check("packed", packed, (n, half_k), packed_kn, np.uint8)
    _check("scales", scales, (n, blocks), packed_kn, np.uint8)
    _check("out", out, (n, k), out_kn, np.uint16, np.float32)
    return n, k, block


def check_transcode(
    packed: U8, scales: U8, m: int, out_packed: U8, out_scales: U8, signal: F64, noise: F64, out_kn: bool
) -> tuple[int, int]:
    """Assert that the arrays of an MXFP4 -> NVFP4 call fit together; returns (N, K)."""
    assert TENSOR_EXPONENTS[0] <= m <= TENSOR_EXPONENTS[1], f"tensor scale 2^{m}"
    n, half_k = logical(packed.shape, False)
    assert half_k % 16 == 0, f"K = {2 * half_k} is not a multiple of 32"
    _check("packed", packed, (n, half_k), False, np.uint8)
    _check("scales", scales, (n, half_k // 16), False, np.uint8)
    _check("out_packed", out_packed, (n, half_k), out_kn, np.uint8)
    _check("out_scales", out_scales, (n, half_k // 8), out_kn, np.uint8)
    _check_sums(n, signal, noise)
    return n, 2 * half_k


def check_fp8(values: U8, scales: F32, first_row: int, block: tuple[int, int], out: Target) -> tuple[int, int]:
    """Assert that the arrays of an FP8 decode call fit together; returns (N, K)."""
    n, k = logical(values.shape, False)
    assert n > 0, "no rows"
    down = (first_row + n - 1) // block[0] - first_row // block[0] + 1
    _check("values", values, (n, k), False, np.uint8)
    _check("scales", scales, (down, -(-k // block[1])), False, np.float32)
    _check("out", out, (n, k), False, np.uint16, np.float32)
    return n, k


def check_tensor_scale(tensor_scale: float) -> np.float32:
    """The tensor scale as float32; asserts that it is one, and within the range of the kernels."""
    value = np.float32(tensor_scale)
    assert float(value) == tensor_scale, f"tensor scale {tensor_scale!r} is not a float32"
    assert MIN_TENSOR_SCALE <= value <= MAX_TENSOR_SCALE, f"tensor scale {tensor_scale!r} is out of range"
    return value


def check_restore(
    x: Source,
    x_kn: bool,
    plane: U8,
    plane_kn: bool,
    tables: F32,
    packed: U8,
    scales: U8,
    out_kn: bool,
    matched: U8,
) -> tuple[int, int, int]:
    """Assert that the arrays of a restoring call fit together; returns (N, K, block length)."""
    n, k = logical(x.shape, x_kn)
    blocks = logical(plane.shape, plane_kn)[1]
    length = _block_length(k, blocks, 16, 32)
    _check("x", x, (n, k), x_kn, np.uint16, np.float32)
    _check("plane", plane, (n, blocks), plane_kn, np.uint8)
    _check("tables", tables, (256, 8), False, np.float32)
    _check("packed", packed, (n, k // 2), out_kn, np.uint8)
    _check("scales", scales, (n, blocks), out_kn, np.uint8)
    _check("matched", matched, (n, blocks), False, np.uint8)
    return n, k, length


def check_measure(
    x: Source, x_kn: bool, packed: U8, scales: U8, codes_kn: bool, factor: F32, signal: F64, noise: F64
) -> tuple[int, int, int]:
    """Assert that the arrays of a measuring call fit together; returns (N, K, block length)."""
    n, k = logical(x.shape, x_kn)
    blocks = logical(scales.shape, codes_kn)[1]
    length = _block_length(k, blocks, 16, 32)
    assert factor.shape == (256,), f"factors have shape {factor.shape}"
    _check("x", x, (n, k), x_kn, np.uint16, np.float32)
    _check("packed", packed, (n, k // 2), codes_kn, np.uint8)
    _check("scales", scales, (n, blocks), codes_kn, np.uint8)
    _check_sums(n, signal, noise)
    return n, k, length


def check_compare(
    x: npt.NDArray[np.generic], reference: npt.NDArray[np.generic], kn: bool, sums: F64
) -> tuple[int, int]:
    """Assert that the arrays of a comparison fit together; returns (N, K)."""
    n, k = logical(x.shape, kn)
    for name, array in (("x", x), ("reference", reference)):
        _check(name, array, (n, k), kn, np.uint16, np.float32, np.float64)
    assert sums.dtype == np.float64, f"sums have dtype {sums.dtype}"
    assert sums.shape == (4, n), f"sums have shape {sums.shape}, expected {(4, n)}"
    return n, k


def flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A flat read-only view, so that a kernel compiles once for arrays that can be written and those that cannot."""
    assert array.flags.c_contiguous, "a kernel takes C-contiguous arrays only"
    view = array.reshape(-1).view()
    view.flags.writeable = False
    return view


def float_bits(x: Source) -> tuple[npt.NDArray[Any], int]:
    """(flat bits, shift): BF16 as uint16 to be shifted left by 16, float32 as int32."""
    if x.dtype == np.uint16:
        return flat(x), 16
    assert x.dtype == np.float32, f"a kernel takes BF16 bits (uint16) or float32, not {x.dtype}"
    return flat(x).view(np.int32), 0
