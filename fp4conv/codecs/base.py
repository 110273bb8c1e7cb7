"""The Protocol of a codec, and the small values that cross it: rows in, codes and scales out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fp4conv.formats import BlockFormat, ScaleRule, Ties


@dataclass(frozen=True)
class Rows:
    """Dense values: uint16 (BF16 bits) or float32, [N, K], or [K, N] when `kn`."""

    array: npt.NDArray[np.uint16] | npt.NDArray[np.float32]
    kn: bool = False


@dataclass(frozen=True)
class Codes:
    """Packed codes uint8 [N, K/2] and block scale bytes uint8 [N, K/g]; both with the axes swapped when `kn`."""

    packed: npt.NDArray[np.uint8]
    block_scale: npt.NDArray[np.uint8]
    kn: bool = False


@dataclass(frozen=True)
class Coding:
    """How to choose scales and round. `tensor_scale` counts for NVFP4 alone."""

    rule: ScaleRule
    ties: Ties
    tensor_scale: float = 1.0


@dataclass(frozen=True)
class Tally:
    """float64 [N] each: a row's sums of x^2 and of (x - decoded)^2."""

    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]


class Codec(Protocol):
    """The bits of one weight in a block format.

    Both directions return -1, or the flat index n*K+k of the first value that cannot be: NaN or Inf to be
    encoded; a NaN scale or an overflow of the output type when decoding.
    """

    format: BlockFormat

    def encode(self, rows: Rows, coding: Coding, out: Codes, tally: Tally) -> int: ...
    def decode(self, codes: Codes, tensor_scale: float, out: Rows, *, inverse: bool = False) -> int:
        """`inverse`: `tensor_scale` is stored as a reciprocal, and divides."""
        ...
