"""What `diff` found, as a value, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fp4conv.model import JSON
from fp4conv.report.facts import ErrorFacts, add_errors, finite
from fp4conv.report.inspected import decibels, error_words
from fp4conv.report.terminal import grid

_MOST_ROWS = 40  # of tensors that differ; --json has them all


@dataclass(frozen=True)
class FileDifference:
    """A file that is no tensor and is not the same on both sides."""

    file: str
    what: str


@dataclass(frozen=True)
class Difference:
    """Two checkpoints. `tensors`: what both have, with the error of the first against the second.

    `tolerance` in dB, or None where values must be the same. `files` are mentioned and decide nothing.
    """

    first: str
    second: str
    formats: tuple[str, str]
    tolerance: float | None
    tensors: tuple[tuple[str, ErrorFacts], ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shapes_apart: tuple[tuple[str, str, str], ...]
    unread: tuple[str, ...]
    files: tuple[FileDifference, ...]

    @property
    def differing(self) -> tuple[tuple[str, ErrorFacts], ...]:
        """The tensors that have other values, the worst first."""
        return tuple(sorted((each for each in self.tensors if each[1].differ), key=lambda each: each[1].nearness))

    @property
    def failing(self) -> tuple[tuple[str, ErrorFacts], ...]:
        """Those that differ by more than the tolerance."""
        return tuple(each for each in self.differing if not self._passes(each[1]))

    def _passes(self, error: ErrorFacts) -> bool:
        return self.tolerance is not None and error.sqnr_db >= self.tolerance and not error.left_out_differ

    @property
    def same(self) -> bool:
        """Whether nothing differs, or with a tolerance nothing by more than that."""
        return not (self.failing or self.only_first or self.only_second or self.shapes_apart or self.unread)

    def to_json(self) -> dict[str, JSON]:
        tensors: list[JSON] = [{"name": name, **error.to_json()} for name, error in self.tensors]
        return {
            "first": self.first,
            "second": self.second,
            "same": self.same,
            "tolerance_db": finite(self.tolerance),
            "compared": len(self.tensors),
            "differing": [name for name, _ in self.differing],
            "failing": [name for name, _ in self.failing],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "shapes_apart": [list(each) for each in self.shapes_apart],
            "unread": list(self.unread),
            "total": add_errors(error for _, error in self.tensors).to_json(),
            "tensors": tensors,
            "files": [{"file": each.file, "what": each.what} for each in self.files],
        }


def difference_view(found: Difference) -> RenderableType:
    """The answer first; then what differs, the worst first; then the files beside the weights."""
    head = grid("<", "<")
    head.add_row("first", f"{found.first}  ({found.formats[0]})")
    head.add_row("second", f"{found.second}  ({found.formats[1]})")
    head.add_row("compared", f"{len(found.tensors):,} tensors, {_values(found):,} values")
    head.add_row("result", _answer(found))
    if found.differing:
        head.add_row("error", error_words(add_errors(error for _, error in found.tensors)))
    parts: list[RenderableType] = [head]
    if found.differing:
        parts.append(_table(found))
    for names, words in (
        (found.only_first, "in the first alone"),
        (found.only_second, "in the second alone"),
        ([f"{name}: {one} and {two}" for name, one, two in found.shapes_apart], "of other shapes"),
        (found.unread, "of a type that is not compared"),
    ):
        parts += _list(names, words)
    parts += [Text(f"{each.file} {each.what} (no tensor: not counted)", style="dim") for each in found.files]
    return Group(*parts)


def _values(found: Difference) -> int:
    return sum(error.values + error.left_out for _, error in found.tensors)


def _answer(found: Difference) -> Text:
    if found.same and not found.differing:
        return Text("the same: every value of every tensor", style="green")
    if found.same:
        return Text(f"within {found.tolerance:g} dB: {len(found.differing):,} tensors differ by less", style="green")
    counts = (
        (len(found.failing), "tensors have other values"),
        (len(found.only_first) + len(found.only_second), "are on one side alone"),
        (len(found.shapes_apart), "have other shapes"),
        (len(found.unread), "could not be compared"),
    )
    said = ", ".join(f"{count:,} {words}" for count, words in counts if count)
    limit = "" if found.tolerance is None else f" (below {found.tolerance:g} dB)"
    return Text(f"different: {said}{limit}", style="bold red")


def _table(found: Difference) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for title in ("differ", "SQNR dB", "largest", "cosine"):
        table.add_column(title, justify="right", no_wrap=True)
    failing = {name for name, _ in found.failing}
    for name, error in found.differing[:_MOST_ROWS]:
        share = f"{100 * error.differ / max(1, error.values + error.left_out):.3g} %"
        style = "" if name in failing else "dim"
        cells = (share, decibels(error.sqnr_db), f"{error.max_abs_error:.3g}", f"{error.cosine:.5f}")
        table.add_row(Text(name, style=style), *(Text(cell, style=style) for cell in cells))
    if len(found.differing) > _MOST_ROWS:
        table.add_row(Text(f"and {len(found.differing) - _MOST_ROWS:,} more (--json has them all)", style="dim"))
    return table


def _list(names: Iterable[str], words: str) -> list[RenderableType]:
    known = list(names)
    more = [Text(f"  and {len(known) - 10:,} more")] if known[10:] else []
    return [Text(f"{len(known):,} {words}"), *(Text(f"  {name}") for name in known[:10]), *more] if known else []
