"""The forms of `inspect` that are read line by line: CSV, and the numbers of a few rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from fp4conv.formats import MXFP4
from fp4conv.model import JSON
from fp4conv.report.facts import TensorFacts, finite

_CELLS = 8
_PLAIN = ("name", "format", "shape", "bytes", "bits_per_weight", "role", "layer", "kind", "file")
_VALUES = (
    "smallest",
    "largest",
    "zeros",
    "nan",
    "blocks",
    "zero_blocks",
    "saturated",
    "unused_range",
    "nan_scales",
    "negative_scales",
    "dead_blocks",
    "tensor_scale",
)
_ERROR = ("sqnr_db", "mse", "max_abs_error", "max_rel_error", "cosine", "differ", "left_out", "left_out_differ")


def csv_text(tensors: Sequence[TensorFacts]) -> str:
    """One line a tensor, with a heading; empty where a figure is not known, and of `sqnr_db` where nothing differs."""
    estimates = list(dict.fromkeys((each.format, each.rule) for facts in tensors for each in facts.estimates))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_PLAIN, *_VALUES, *_ERROR, *(f"sqnr_db {name} {rule}" for name, rule in estimates)])
    for facts in tensors:
        known = facts.to_json()
        tried = {(each.format, each.rule): each.error.sqnr_db for each in facts.estimates}
        shown = [_cell(known.get(key)) for key in (*_PLAIN, *_VALUES, *_ERROR)]
        writer.writerow([*shown, *(_cell(finite(tried.get(key))) for key in estimates)])
    return out.getvalue()


def _cell(value: JSON) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class ShownRow:
    """A row along K of one matrix: its values, and of a four-bit weight its codes and the scales of its blocks.

    `place`: the index of the row, in a parameter of experts behind the expert's. `scales`: exponents of MXFP4, E4M3
    values of NVFP4.
    """

    place: tuple[int, ...]
    values: tuple[float, ...]
    codes: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    block: int = 0

    def to_json(self) -> dict[str, JSON]:
        row: dict[str, JSON] = {"row": list(self.place), "values": [finite(value) for value in self.values]}
        if self.codes:
            row |= {"codes": list(self.codes), "block_scales": [finite(scale) for scale in self.scales]}
        return row


@dataclass(frozen=True)
class ShownTensor:
    """Rows of a tensor, with the tensor scale of NVFP4 as it is stored."""

    name: str
    format: str
    shape: tuple[int, ...]
    rows: tuple[ShownRow, ...]
    tensor_scale: float | None = None

    def to_json(self) -> dict[str, JSON]:
        return {
            "name": self.name,
            "format": self.format,
            "shape": list(self.shape),
            "tensor_scale": None if self.tensor_scale is None else finite(self.tensor_scale),
            "rows": [row.to_json() for row in self.rows],
        }


def numbers_view(tensors: Sequence[ShownTensor], *, codes: bool) -> RenderableType:
    """The numbers themselves; with `codes` each block's scale and codes over its values."""
    parts: list[RenderableType] = []
    for tensor in tensors:
        scale = "" if tensor.tensor_scale is None else f", tensor scale {tensor.tensor_scale!r}"
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        parts.append(Text(f"{tensor.name}  ({tensor.format}, {shape}{scale})", style="bold"))
        for row in tensor.rows:
            parts.append(Text(f"row {list(row.place)}"))
            parts += _row_lines(tensor, row, codes=codes)
    return Group(*parts)


def _row_lines(tensor: ShownTensor, row: ShownRow, *, codes: bool) -> list[RenderableType]:
    if not (codes and row.codes):
        return _lines([_number(value) for value in row.values])
    lines: list[RenderableType] = []
    for number, scale in enumerate(row.scales):
        cut = slice(number * row.block, (number + 1) * row.block)
        words = f"2^{scale:g}" if tensor.format == MXFP4.name and math.isfinite(scale) else f"{scale:g}"
        lines.append(Text(f"[{cut.start}:{cut.stop}] scale {words}", style="cyan"))
        shown = _lines([f"{code:x}" for code in row.codes[cut]], "dim"), _lines([_number(v) for v in row.values[cut]])
        lines += [line for pair in zip(*shown, strict=True) for line in pair]
    return lines


def _lines(cells: Sequence[str], style: str = "") -> list[RenderableType]:
    """Eight cells of ten characters a line: a terminal of 80."""
    starts = range(0, len(cells), _CELLS)
    return [Text("".join(f"{cell:>10}" for cell in cells[i : i + _CELLS]), style=style) for i in starts]


def _number(value: float) -> str:
    return f"{value:.3g}"
