"""`inspect` for people: a table of tensors with as many columns as the terminal has room for, layers, and a total."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fp4conv.formats import MXFP4
from fp4conv.report.facts import (
    ErrorFacts,
    Estimate,
    Inspected,
    TensorFacts,
    ValueFacts,
    add_errors,
    by_layer,
    error_of,
)
from fp4conv.report.terminal import grid, warnings_view
from fp4conv.sizes import format_size

_BARS = "▁▂▃▄▅▆▇█"
_GAP = 2
_EDGES = 2  # a blank on either side of the table
_IN_LAYER = re.compile(r"(?P<layer>.*?\blayers?\.(\{[^}]*\}|\d+))\.(?P<leaf>.+)")


def _worst(row: TensorFacts) -> float:
    """SQNR against the reference, else the best that a conversion would leave."""
    if row.error is not None:
        return row.error.nearness
    return max((each.error.sqnr_db for each in row.estimates), default=math.inf)


# What --sort takes: a column's name -> the key of a row, smallest first.
SORTS: dict[str, Callable[[TensorFacts], float | str]] = {
    "name": lambda row: "",  # as they come
    "format": lambda row: row.format,
    "bytes": lambda row: -row.bytes,
    "bits": lambda row: row.bits_per_weight,
    "sqnr": _worst,
    "mse": lambda row: -row.error.mse if row.error else 0.0,
    "max-error": lambda row: -row.error.max_abs_error if row.error else 0.0,
    "cosine": lambda row: row.error.cosine if row.error else math.inf,
    "largest": lambda row: -max(map(abs, _range(row.values)), default=0.0),
    "zeros": lambda row: -_share(row.values.zeros, row) if row.values else 0.0,
    "nan": lambda row: -row.values.nan if row.values else 0,
}


@dataclass(frozen=True)
class _Column:
    """`weight`: the least weighty columns go first where there is no room."""

    title: str
    weight: int
    cell: Callable[[TensorFacts], str]
    left: bool = False


def inspect_view(
    found: Inspected, rows: Sequence[TensorFacts], *, width: int = 120, grouped: bool = True
) -> RenderableType:
    """The headline, and a table with a line for each of `rows`; `grouped` puts them under their layers' names."""
    head = grid("<", "<")
    head.add_row("source", found.source)
    head.add_row("format", f"{found.format}, {found.layout} layout, family {found.family}")
    head.add_row("parameters", f"{found.parameters:,}")
    head.add_row("size", f"{format_size(found.bytes)}, {found.bits_per_weight:.2f} bits a weight")
    if found.reference is not None:
        head.add_row("reference", found.reference)
    if found.error is not None:
        head.add_row("error", error_words(found.error))
        apart = [facts.error for facts in found.tensors if facts.error is not None and facts.error.differ]
        if apart and len(apart) < len(found.tensors):  # embeddings and norms that stay would flatter the rest
            which = "the tensor that differs" if len(apart) == 1 else f"the {len(apart):,} tensors that differ"
            head.add_row("", f"of {which}: SQNR {decibels(add_errors(apart).sqnr_db)} dB")
    notes = [Text(note, style="dim") for note in found.without_estimate]
    parts = [head, _table(found, rows, width, grouped), *_layers_view(found), *_estimates_view(found)]
    return Group(*parts, *notes, *warnings_view(found.warnings))


def error_words(error: ErrorFacts) -> str:
    if not error.differ:
        return "none: every value is the same"
    return (
        f"SQNR {decibels(error.sqnr_db)} dB, MSE {error.mse:.3g}, largest {error.max_abs_error:.3g}, "
        f"cosine {error.cosine:.6f}, {_percent(error.differ, error.values + error.left_out)} of the values differ"
    )


def decibels(value: float) -> str:
    return "same" if value == math.inf else "?" if math.isnan(value) else f"{value:.2f}"


# ---- the table


def _table(found: Inspected, rows: Sequence[TensorFacts], width: int, grouped: bool) -> Table:
    names = [_layer_and_leaf(row.name) if grouped else ("", row.name) for row in rows]
    longest = max((len(leaf) + 2 * bool(layer) for layer, leaf in names), default=0)
    total = _total(found)
    most = max(36, width // 2 - 4)  # of names that are longer, the rest goes to the next line
    columns = _fitting(_columns(found), [*rows, total], width - _EDGES - min(max(longest, 6), most))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_footer=False)
    table.add_column("tensor", overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=True)
    above = ""
    for row, (layer, leaf) in zip(rows, names, strict=True):
        if layer and layer != above:
            table.add_row(Text(layer, style="bold"))
        above = layer
        table.add_row(f"  {leaf}" if layer else leaf, *(column.cell(row) for column in columns))
    table.add_section()
    table.add_row(Text(total.name, style="bold"), *(Text(column.cell(total), style="bold") for column in columns))
    return table


def _total(found: Inspected) -> TensorFacts:
    """The last line: what all the tensors shown come to."""
    return TensorFacts(
        name="total",
        format="",
        shape=(),
        bytes=sum(facts.bytes for facts in found.tensors),
        bits_per_weight=math.nan,
        role="",
        file="",
        count=len(found.tensors),
        error=found.error,
        estimates=found.estimates,
    )


def _columns(found: Inspected) -> list[_Column]:
    """In the order in which they are shown."""
    columns = [
        _Column("format", 8, lambda row: row.format, left=True),
        _Column("shape", 4, lambda row: "x".join(map(str, row.shape)) if row.format else ""),
        _Column("tensors", 5, lambda row: f"{row.count:,}"),
        _Column("size", 7, lambda row: format_size(row.bytes)),
        _Column("bits", 3, lambda row: "" if math.isnan(row.bits_per_weight) else f"{row.bits_per_weight:.2f}"),
    ]
    tensors = found.tensors
    if any(facts.values is not None for facts in tensors):
        columns.append(_Column("range", 1, lambda row: _range_cell(row.values)))
        columns.append(_Column("zeros", 0, _zeros_cell))
    if any(facts.values is not None and facts.values.codes for facts in tensors):
        columns.append(_Column("scales 2^", 6, scale_bars, left=True))
        columns.append(_Column("codes", 5, lambda row: code_bars(row.values), left=True))
        columns.append(_Column("at 6", -1, lambda row: _blocks_cell(row.values, "saturated")))
        columns.append(_Column("unused", -2, lambda row: _blocks_cell(row.values, "unused_range")))
    if any(facts.values is not None and facts.values.nan for facts in tensors):
        columns.append(_Column("NaN", 9, lambda row: f"{row.values.nan:,}" if row.values else ""))
    if found.error is not None:
        columns.append(_Column("SQNR", 10, lambda row: decibels(row.error.sqnr_db) if row.error else ""))
        columns.append(_Column("MSE", 0, lambda row: f"{row.error.mse:.2g}" if row.error else ""))
        columns.append(_Column("largest", 2, lambda row: f"{row.error.max_abs_error:.3g}" if row.error else ""))
        columns.append(_Column("cosine", 0, lambda row: f"{row.error.cosine:.5f}" if row.error else ""))
    for estimate in found.estimates:
        title = f"{estimate.format}\n{estimate.rule}"
        columns.append(_Column(title, 9 if estimate.rule == "mse" else 6, _estimate_cell(estimate)))
    return columns


def _estimate_cell(estimate: Estimate) -> Callable[[TensorFacts], str]:
    def cell(row: TensorFacts) -> str:
        for each in row.estimates:
            if (each.format, each.rule) == (estimate.format, estimate.rule):
                return decibels(each.error.sqnr_db)
        return ""

    return cell


def _fitting(columns: Sequence[_Column], rows: Sequence[TensorFacts], room: int) -> list[_Column]:
    """The columns that fit in `room` characters: the least weighty, and of equals the last, are left out."""

    def wide(column: _Column) -> int:
        title = max(map(len, column.title.split("\n")))
        return _GAP + max(title, max((len(column.cell(row)) for row in rows), default=0))

    kept = list(columns)
    while len(kept) > 1 and sum(map(wide, kept)) > room:
        kept.remove(min(reversed(kept), key=lambda column: column.weight))
    return kept


# ---- cells


def bars(counts: Iterable[int]) -> str:
    """A character a count, as high as its share of the largest; blank for none."""
    known = list(counts)
    most = max(known, default=0)
    return "".join(_BARS[(8 * count - 1) // most] if count else " " for count in known) if most else ""


def code_bars(values: ValueFacts | None) -> str:
    """How often each magnitude 0, .5, 1, 1.5, 2, 3, 4, 6 is."""
    if values is None or not values.codes:
        return ""
    return bars(values.codes[i] + values.codes[i + 8] for i in range(8))


def scale_bars(row: TensorFacts, width: int = 8) -> str:
    """Blocks by the power of two of their scale (NVFP4: without the tensor scale), with the first and the last."""
    exponents = _exponents(row)
    if not exponents:
        return ""
    first, last = min(exponents), max(exponents)
    step = -(-(last - first + 1) // width)
    bins = [0] * -(-(last - first + 1) // step)
    for exponent, count in exponents.items():
        bins[(exponent - first) // step] += count
    return f"{first} {bars(bins)} {last}" if first != last else f"{first} {bars(bins)}"


def _exponents(row: TensorFacts) -> dict[int, int]:
    """Exponent -> blocks. E8M0 is one; of a scale in E4M3 it is the power of two below, and zeros have none."""
    found: dict[int, int] = {}
    for value, count in row.values.scales if row.values else ():
        if row.format == MXFP4.name:
            exponent = int(value)
        elif value:
            exponent = math.frexp(abs(value))[1] - 1
        else:
            continue
        found[exponent] = found.get(exponent, 0) + count
    return found


def _range(values: ValueFacts | None) -> list[float]:
    return (
        []
        if values is None or values.smallest is None or values.largest is None
        else [
            values.smallest,
            values.largest,
        ]
    )


def _range_cell(values: ValueFacts | None) -> str:
    return " .. ".join(f"{value:.3g}" for value in _range(values))


def _zeros_cell(row: TensorFacts) -> str:
    return "" if row.values is None else f"{100 * _share(row.values.zeros, row):.1f} %"


def _share(count: int, row: TensorFacts) -> float:
    elements = math.prod(row.shape) * row.count
    return count / elements if elements else 0.0


def _blocks_cell(values: ValueFacts | None, name: str) -> str:
    """The share of blocks that the count `name` is of."""
    if values is None or not values.blocks:
        return ""
    return _percent(int(getattr(values, name)), values.blocks)


def _percent(count: int, of: int) -> str:
    return f"{100 * count / of:.3g} %" if of else "0 %"


def _layer_and_leaf(name: str) -> tuple[str, str]:
    """'model.layers.{0..35}.mlp.up_proj.weight' in two, so that the table fits 80 columns."""
    found = _IN_LAYER.fullmatch(name)
    return (found["layer"], found["leaf"]) if found else ("", name)


# ---- below the table


def _layers_view(found: Inspected) -> list[RenderableType]:
    """The error of each layer."""
    lines = [
        Text.assemble((f"{layer:>4} ", "dim"), f"{decibels(error.sqnr_db):>7}")
        for layer, members in by_layer(found.tensors)
        if layer is not None and (error := error_of(members)) is not None
    ]
    if len(lines) < 2:
        return []
    return [Text("SQNR in dB by layer"), Columns(lines, padding=(0, 3)), Text()]


def _estimates_view(found: Inspected) -> list[RenderableType]:
    """What each conversion would leave of the tensors that it quantises."""
    if not found.estimates:
        return []
    table = grid("<", "<", ">", "<")
    best = {name: max(e.error.sqnr_db for e in found.estimates if e.format == name) for name in _formats(found)}
    for each in found.estimates:
        style = "bold" if each.error.sqnr_db == best[each.format] else ""
        words = f"MSE {each.error.mse:.3g}, largest {each.error.max_abs_error:.3g}"
        decibel = Text(f"{decibels(each.error.sqnr_db)} dB", style=style)
        table.add_row(each.format, Text(each.rule, style=style), decibel, Text(words, style="dim"))
    return [Text("what a conversion would leave, by format and scale rule (SQNR)"), table]


def _formats(found: Inspected) -> list[str]:
    return list(dict.fromkeys(each.format for each in found.estimates))
