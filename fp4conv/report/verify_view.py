"""What `verify` prints for people: the verdict, the problems grouped by cause, and what was looked at."""

from __future__ import annotations

from collections import Counter

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from fp4conv.checks.against import Against
from fp4conv.faults import Severity
from fp4conv.report.terminal import grid, servers_view, warnings_view
from fp4conv.report.verified import Group, Verified, grouped
from fp4conv.servers import NAMES
from fp4conv.sizes import format_size

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}
_MOST_PLACES = 5
_MOST = 20  # groups shown of each severity; --json has all


def verify_view(found: Verified) -> RenderableType:
    """The problems, worst first; a clean pass says what was looked at."""
    head = grid("<", "<")
    head.add_row("source", found.source)
    if found.tensors:
        head.add_row("taken as", f"{found.format}, {found.layout} layout, family {found.family}")
        head.add_row("looked at", _looked_at(found))
    if found.against is not None:
        head.add_row("against", _against(found.against))
    lines: list[RenderableType] = [head, Text()]
    groups = grouped(found.problems)
    for severity in Severity:
        mine = [group for group in groups if group.first.severity is severity]
        for group in mine[:_MOST]:
            lines += _problem(group)
        if len(mine) > _MOST:
            lines.append(Text(f"... and {len(mine) - _MOST} more {severity.value}s: --json lists all", style="dim"))
    lines += warnings_view(found.warnings)
    if found.for_server is None and found.ok:
        lines += servers_view(found.servers)
    lines.append(_verdict(found))
    return Lines(*lines)


def _looked_at(found: Verified) -> str:
    names = "every name and shape that config.json promises" if found.known_type else "names and shapes, layer by layer"
    values = f"{format_size(found.bytes_read)} of scales and dense values"
    hints = ", round-trip hints" if found.hints else ""
    quantised = f", {found.quantised:,} quantised weights" if found.quantised else ""
    return f"{found.tensors:,} tensors{quantised}; {names}; configs and index; {values}{hints}"


def _against(found: Against) -> str:
    if found.lossless:
        return f"{found.source}: lossless, every value of {found.tensors:,} tensors is the same"
    known = {name: db for name, db in found.per_tensor.items() if db is not None}
    words = f"{found.source}: {found.same:,} of {found.tensors:,} tensors have the same values"
    if found.sqnr_db is not None and known:
        worst = min(known, key=lambda name: known[name])
        words += f"; SQNR {found.sqnr_db:.2f} dB in all, lowest {known[worst]:.2f} dB in {worst}"
    return words


def _problem(group: Group) -> list[RenderableType]:
    problem, places = group.first, group.places
    times = f"  ({group.count:,} times)" if group.count > 1 else ""
    name = places[0] or problem.kind
    head = Text.assemble((problem.severity.value, _STYLES[problem.severity]), f"  {name}{times}")
    body = grid("<", "<")
    if len(places) > 1:
        more = f", and {len(places) - _MOST_PLACES} more" if len(places) > _MOST_PLACES else ""
        body.add_row(Text("also", style="dim"), ", ".join(places[1:_MOST_PLACES]) + more)
    if problem.file and problem.tensor:
        body.add_row(Text("in", style="dim"), problem.file if group.count == 1 else f"{problem.file}, ...")
    body.add_row(Text("found", style="dim"), problem.found)
    body.add_row(Text("expected", style="dim"), problem.expected)
    body.add_row(Text("so", style="dim"), problem.consequence)
    if problem.severity is not Severity.NOTE:
        body.add_row(Text("try", style="dim"), problem.remedy)
    return [head, Padding(body, (0, 0, 1, 2))]


def _verdict(found: Verified) -> Text:
    counts = Counter(problem.severity for problem in found.problems)
    words = [
        f"{counts[severity]:,} {severity.value}{'s' * (counts[severity] > 1)}"
        for severity in Severity
        if counts[severity]
    ]
    whom = f" for {NAMES[found.for_server]}" if found.for_server else ""
    if not found.ok:
        return Text(f"not sound{whom}: {', '.join(words)}", style="bold red")
    return Text(f"sound{whom}" + (f": {', '.join(words)}" if words else ": no problem found"), style="bold green")
