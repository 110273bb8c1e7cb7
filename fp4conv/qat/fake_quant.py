"""Fake quantisation in torch: what a tensor becomes when it is encoded to four bits and decoded again.

The arithmetic is that of `kernels/reference`, operation for operation in float32 (rceil for MXFP4, the amax rule for
NVFP4, ties to even), so that the values that training uses are those that an export decodes to; the tests compare the
two bit by bit. It runs wherever torch does. The gradient goes straight through, unclipped, as ModelOpt's does by
default (`pass_through_bwd`, 0.47).

Owns the arithmetic and its gradient. Which tensors go through it is `quantizers`' and `targets`'.
"""

from __future__ import annotations

import torch

from fp4conv.formats import (
    BLOCK_FORMATS,
    E2M1,
    E4M3,
    E8M0_BIAS,
    MXFP4,
    NVFP4_AMAX_DIVISOR,
    NVFP4_MIN_TENSOR_SCALE,
)

# How many values are worked on at a time: some ten float32 copies of a piece exist while it is.
PIECE = 2**24

_CARRY = 0x3FFFFF  # added to the bits of amax, carries into the exponent when amax is above 1.5 x 2^k: 6 is 1.5 x 2^2
_MANTISSA_BITS = 23
_SUBNORMAL = 1 << (_MANTISSA_BITS - 1)  # the bits of 2^-127


def fake_quantise(x: torch.Tensor, format_name: str, amax: torch.Tensor | None = None, axis: int = -1) -> torch.Tensor:
    """`x` after encoding to `format_name` and decoding, in its own shape and dtype.

    Blocks run along `axis`, -1 or -2, whose length is a multiple of the format's block. NVFP4 takes `amax`, float32
    [], or [E] for x [E, N, K] with a tensor scale for each matrix. The values are float32 and rounded once to the dtype
    of x. A block with a NaN or an Inf becomes NaN. The gradient is that of the identity.
    """
    values: torch.Tensor = _StraightThrough.apply(x, format_name, amax, axis)
    return values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor, format_name: str, amax: torch.Tensor | None, axis: int) -> torch.Tensor:
        out = torch.empty_like(x)
        if not x.numel():
            return out
        # Pieces are slices of the first axis, which blocks do not run along; a vector is one row.
        rows, result = (x[None], out[None]) if x.ndim == 1 else (x, out)
        step = max(1, PIECE // max(1, rows[0].numel()))
        scale = None if amax is None else _tensor_scale(amax.to(x.device))
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            own = scale[piece] if scale is not None and scale.ndim else scale
            result[piece] = _quantise(rows[piece], format_name, own, axis)
        return out

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad, None, None, None


def _quantise(x: torch.Tensor, format_name: str, tensor_scale: torch.Tensor | None, axis: int) -> torch.Tensor:
    block = BLOCK_FORMATS[format_name].block
    blocks = x.to(torch.float32).unflatten(axis, (-1, block))
    # Splitting `axis` puts the block in its place: the same negative index names it.
    amax = blocks.abs().amax(axis, keepdim=True)
    if format_name == MXFP4.name:
        values = _mxfp4(blocks, amax)
    else:
        assert tensor_scale is not None, "NVFP4 takes an amax"
        own = tensor_scale.reshape(-1, *(1,) * (blocks.ndim - 1)) if tensor_scale.ndim else tensor_scale
        values = _nvfp4(blocks, amax, own)
    return torch.where(torch.isfinite(amax), values, torch.nan).reshape(x.shape).to(x.dtype)


def _mxfp4(blocks: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Values of blocks under the smallest power of two that does not saturate amax; a zero keeps its sign."""
    byte = (((amax.view(torch.int32) + _CARRY) >> _MANTISSA_BITS) - 2).clamp(min=0)
    scale = torch.where(byte > 0, byte << _MANTISSA_BITS, _SUBNORMAL).view(torch.float32)
    inverse = ((2 * E8M0_BIAS - byte) << _MANTISSA_BITS).view(torch.float32)
    return torch.copysign(_nearest_e2m1((blocks * inverse).abs()) * scale, blocks)


def _nvfp4(blocks: torch.Tensor, amax: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """Values of blocks under E4M3(amax / (6 x tensor scale)); a negative that rounds to zero becomes -0."""
    ratio = amax / (E2M1.max_value * tensor_scale)
    ratio = torch.where(ratio == 0, 1.0, ratio).clamp(E4M3.min_value, E4M3.max_value)
    scale = ratio.to(torch.float8_e4m3fn).to(torch.float32) * tensor_scale
    quotient = blocks / scale
    magnitude = _nearest_e2m1(quotient.abs())
    return torch.where(quotient < 0, -magnitude, magnitude) * scale


def _nearest_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """The E2M1 value nearest to each magnitude, ties to the even code, at most 6: even codes are even multiples of
    the step, which is .5 below 2, 1 below 4 and 2 below 6."""
    q = magnitude.clamp(max=E2M1.max_value)
    step = torch.where(q < 2, 0.5, torch.where(q < 4, 1.0, 2.0))
    return torch.round(q / step) * step


def _tensor_scale(amax: torch.Tensor) -> torch.Tensor:
    """float32 tensor scales of `amax`, as `codecs.nvfp4.tensor_scale`: 1 for 0, never a subnormal.

    The divisor is a tensor, for on CUDA torch multiplies by the reciprocal of a number, which rounds twice.
    """
    amax = amax.to(torch.float32)
    scale = (amax / torch.full_like(amax, NVFP4_AMAX_DIVISOR)).clamp(min=NVFP4_MIN_TENSOR_SCALE)
    return torch.where(amax == 0, 1.0, scale)
