"""`inspect --rows`: the numbers of a few rows of a tensor, as they decode and as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fp4conv.errors import UsageError
from fp4conv.kernels.small_floats import E4M3_VALUES
from fp4conv.layouts import parse
from fp4conv.model import Decoded, Model, Stored, Weight
from fp4conv.report.rows import ShownRow, ShownTensor
from fp4conv.sources import open_source

if TYPE_CHECKING:
    from fp4conv.pipeline.measuring.sides import Side

MOST_VALUES = 1_000_000  # more than that is no looking at numbers: `open(...).read` gives arrays


def show(source: str | Path, tensor: str, rows: tuple[int | None, int | None] = (0, 1)) -> tuple[ShownTensor, ...]:
    """Rows a:b along K of the tensors of `source` whose name matches the glob `tensor`.

    A linear layer's rows are its outputs, also where it lies K-major; a parameter of experts gives the rows of each
    expert, one after the other. Negative and open ends count as in a slice. Nothing is refused: NaN is shown.
    """
    model = parse(open_source(source))
    picked = [weight for weight in model.weights if fnmatchcase(weight.name, tensor)]
    if not picked:
        raise UsageError(
            f"--tensor {tensor!r} matches no tensor of {model.source.name}",
            hint="list the names with: fp4conv inspect SRC --headers-only --csv",
        )
    asked = [(weight, range(*slice(*rows).indices(_rows(weight)))) for weight in picked]
    if not any(numbers for _, numbers in asked):
        first, last = ("" if end is None else end for end in rows)
        longest = max(picked, key=_rows)
        raise UsageError(
            f"--rows {first}:{last} are no rows of {longest.name}, which has {_rows(longest):,}",
            hint="write A:B, A below B",
        )
    values = sum(len(numbers) * (weight.elements // max(1, _rows(weight))) for weight, numbers in asked)
    if values > MOST_VALUES:
        raise UsageError(
            f"{values:,} values are too many to look at", hint="narrow --tensor or --rows, such as --rows 0:2"
        )
    return tuple(_shown(model, weight, numbers) for weight, numbers in asked)


def _by_rows(weight: Weight) -> bool:
    return not isinstance(weight.base, Stored) or (weight.is_matrix and weight.kn)


def _rows(weight: Weight) -> int:
    """Rows of all matrices along K; of a dense tensor its first axis, of a scalar one."""
    if _by_rows(weight):
        return weight.matrices * weight.n
    return weight.shape[0] if weight.shape else 1


def _shown(model: Model, weight: Weight, numbers: range) -> ShownTensor:
    from fp4conv.pipeline.matrices import Scratch
    from fp4conv.pipeline.measuring.sides import Side
    from fp4conv.pipeline.scalars import read_scalar

    base, scale = weight.base, 1.0
    with model.source.reader() as reader:
        if isinstance(base, Decoded) and base.tensor_scale is not None:
            scale = read_scalar(reader, base.tensor_scale)
        side = Side(weight, reader, Scratch(), scale)
        rows = _matrix_rows(side, numbers) if _by_rows(weight) else _plain_rows(side, numbers)
        shown = tuple(rows)
    stored = isinstance(base, Decoded) and base.tensor_scale is not None
    return ShownTensor(weight.name, weight.format_name, weight.shape, shown, scale if stored else None)


def _matrix_rows(side: Side, numbers: range) -> Iterator[ShownRow]:
    from fp4conv.plan import Action, Step, Unit

    weight = side.weight
    for number in numbers:
        index, row = divmod(number, weight.n)
        loaded = side.load(Unit(Step(weight.name, Action.COPY, (), "", weight), index, row, row + 1))
        dense = isinstance(weight.base, Stored)
        values = np.array(loaded.values(0, 1, weight.kn and dense)).reshape(-1)
        place = (index, row) if len(weight.shape) > 2 else (row,)
        shown = tuple(_floats(values))
        if loaded.codes is None:
            yield ShownRow(place, shown)
            continue
        packed, scales = loaded.codes.packed.reshape(-1), loaded.codes.block_scale.reshape(-1)
        codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
        table = E4M3_VALUES.astype(np.float64) if weight.format_name != "mxfp4" else _exponents()
        block = codes.size // max(1, scales.size)
        yield ShownRow(place, shown, tuple(codes.tolist()), tuple(table[scales].tolist()), block)


def _exponents() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.append(np.arange(255) - 127.0, np.nan)


def _plain_rows(side: Side, numbers: range) -> Iterator[ShownRow]:
    from fp4conv.pipeline.measuring.sides import read_flat, wide_floats

    weight = side.weight
    assert isinstance(weight.base, Stored)
    length = weight.elements // max(1, _rows(weight))
    for number in numbers:
        stored = read_flat(side.reader, weight, number * length, (number + 1) * length, side.scratch)
        yield ShownRow(
            (number,) if weight.shape else (), tuple(wide_floats(stored, weight.base.ref.spec.dtype).tolist())
        )


def _floats(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> list[float]:
    """BF16 bits or float32 as Python numbers."""
    from fp4conv.pipeline.measuring.sides import wide_floats

    wide: list[float] = wide_floats(values, "BF16" if values.dtype == np.uint16 else "F32").tolist()
    return wide
