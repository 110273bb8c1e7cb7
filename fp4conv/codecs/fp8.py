"""FP8 with a scale a tile (DeepSeek's block-scaled checkpoints): E4M3 codes, read only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fp4conv.codecs.dense import widen
from fp4conv.kernels import compiled


@dataclass(frozen=True)
class Tiles:
    """Scales of type `dtype` ('F32', 'BF16'), [tiles down, tiles across], each for `block` = (rows, columns).

    The first row of tiles holds row `first_row` of the matrix.
    """

    scales: npt.NDArray[np.generic]
    dtype: str
    first_row: int
    block: tuple[int, int]


def decode(values: npt.NDArray[np.uint8], tiles: Tiles, out: npt.NDArray[np.uint16] | npt.NDArray[np.float32]) -> int:
    """Decode E4M3 bytes [N, K], rows `tiles.first_row`... of a matrix, to `out` [N, K].

    Returns -1, or the flat index n*K+k of the first value that is not finite in the type of `out`.
    """
    wide = np.empty(tiles.scales.shape, np.float32)
    widen(tiles.scales, tiles.dtype, wide)  # type: ignore[arg-type]  # dtype says which of the two it is
    return compiled.decode_fp8_tiles(values, wide, tiles.first_row, tiles.block, out)


def tile_rows(first_row: int, rows: int, block_rows: int) -> tuple[int, int]:
    """(first, count) of the rows of tiles that hold `rows` rows from `first_row` on."""
    first = first_row // block_rows
    return first, (first_row + rows - 1) // block_rows - first + 1
