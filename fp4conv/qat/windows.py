"""Where ModelOpt's CUDA fake quantisers are known to differ from the formats' exact arithmetic, and why.

Read off ModelOpt 0.47 (`tensor_quant_mx.cu`, `fp4_kernel_hopper.py`), and measured by scripts/compare_cuda on an H100:

- MXFP4: the kernel is compiled with --use_fast_math, which takes subnormals for zero. A block whose scale is 2^-127
  becomes zero; other values and results below 2^-126 do.
- MXFP4, float32 masters: ModelOpt's converter looks at a float log2, which is one too small for an amax within some
  units in the last place above 6 x 2^k. The H100's kernel did so nowhere.
- NVFP4: torch divides amax by 2688 on CUDA by multiplying with the reciprocal, which can put the tensor scale one unit
  in the last place off, and the kernel's divisions are approximate. So what lies on a tie, of a block scale or of a
  value, goes to either side.
- NVFP4: block scales are not kept above E4M3's smallest value, and a block whose scale (block scale x tensor scale) is
  below 1e-5 is quantised with a scale of 1.

A window explains a block only where it predicts every value of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from fp4conv.formats import BLOCK_FORMATS, E2M1, E4M3, E8M0_BIAS, MXFP4, NVFP4_AMAX_DIVISOR, Ties
from fp4conv.kernels.small_floats import E2M1_VALUES, e2m1_codes

Values = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

LOG2_WINDOW_ULPS = 32  # above 6 x 2^k
SMALLEST_SCALE = np.float32(1e-5)
# How far an approximate quotient may lie from the right one: two units in the last place, and one of the scale.
_SLACK = np.float32(2.0**-21)
_ONE = np.float32(1)
_SMALLEST_NORMAL = np.float32(2.0**-126)


def differing_blocks(
    format_name: str, values: tuple[Values, Values, Values], amax: float | None, dtype: torch.dtype
) -> tuple[npt.NDArray[np.intp], Flags]:
    """(the blocks that differ between values = (master, used, expected), each [N, K]; which of them are explained).

    Blocks are numbered along rows. `dtype` is the master's, to which the forward pass rounds its values.
    """
    block = BLOCK_FORMATS[format_name].block
    master, used, expected = (array.reshape(-1, block) for array in values)
    differing = np.flatnonzero(((used != expected) & ~(np.isnan(used) & np.isnan(expected))).any(axis=1))
    master, used = master[differing], used[differing]
    explained = np.zeros(len(differing), np.bool_)
    with np.errstate(over="ignore", under="ignore"):
        predictions = _mxfp4(master, dtype) if format_name == MXFP4.name else _nvfp4(master, np.float32(amax or 0))
        for low, high in predictions:
            explained |= ((used == rounded(low, dtype)) | (used == rounded(high, dtype))).all(axis=1)
    return differing, explained


def rounded(values: Values, dtype: torch.dtype) -> Values:
    """float32 `values` rounded to `dtype`, and widened again."""
    if dtype == torch.float32:
        return values
    narrow: Values = torch.from_numpy(values).to(dtype).to(torch.float32).numpy()
    return narrow


def _mxfp4(master: Values, dtype: torch.dtype) -> Iterator[tuple[Values, Values]]:
    """What the kernel may make of blocks [B, 32], as (one value, the other) of each place."""
    flushed = _without_subnormals(master)
    amax = np.abs(flushed).max(axis=1, keepdims=True)
    values = _under(flushed, _rceil(amax))
    values = np.where(_rceil(amax) <= 2.0**-E8M0_BIAS, np.float32(0), _without_subnormals(values))
    yield values, values
    if dtype == torch.float32:
        above = (amax.view(np.uint32) & np.uint32(0x7FFFFF)).astype(np.int64) - 0x400000  # the mantissa of 1.5
        inside = (above > 0) & (above <= LOG2_WINDOW_ULPS)
        values = np.where(inside, _under(master, _rceil(amax) / np.float32(2)), np.float32(np.nan))
        yield values, values


def _nvfp4(master: Values, amax: np.float32) -> Iterator[tuple[Values, Values]]:
    """What the kernel may make of blocks [B, 16]: every value by a quotient a little too small, or too large."""
    largest = np.abs(master).max(axis=1, keepdims=True)
    for tensor_scale in (
        amax * (np.float32(1) / np.float32(NVFP4_AMAX_DIVISOR)),
        amax / np.float32(NVFP4_AMAX_DIVISOR),
    ):
        safe = tensor_scale if tensor_scale > 0 else np.float32(1e-12)
        ratio = (largest / (np.float32(E2M1.max_value) * safe)).astype(np.float32)
        for off in (_ONE - _SLACK, _ONE + _SLACK):
            near = np.minimum(ratio * off, np.float32(E4M3.max_value))
            scale = near.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * safe
            scale = np.where(scale >= SMALLEST_SCALE, scale, np.float32(1))
            yield _under(master, scale, _ONE - _SLACK), _under(master, scale, _ONE + _SLACK)


def _under(blocks: Values, scale: Values, off: np.float32 = _ONE) -> Values:
    """Values of `blocks` under `scale` [B, 1], with quotients times `off`."""
    codes = e2m1_codes((blocks / scale).astype(np.float32) * off, Ties.EVEN)
    return np.copysign(E2M1_VALUES[codes] * scale, blocks).astype(np.float32)


def _rceil(amax: Values) -> Values:
    """The smallest power of two, at least 2^-127, under which amax [B, 1] does not exceed 6."""
    mantissa, exponent = np.frexp(amax)
    power = np.where(mantissa <= 0.75, exponent - 3, exponent - 2)
    return np.ldexp(np.float32(1), np.maximum(np.where(amax == 0, -E8M0_BIAS, power), -E8M0_BIAS)).astype(np.float32)


def _without_subnormals(values: Values) -> Values:
    return np.where(np.abs(values) < _SMALLEST_NORMAL, np.float32(0), values).astype(np.float32)
