"""What a check found, as a value with a JSON form, and the same problems folded for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fp4conv.checks.against import Against
from fp4conv.checks.judge import Problem
from fp4conv.faults import Severity
from fp4conv.model import JSON
from fp4conv.report.folding import folded
from fp4conv.servers import Verdict


@dataclass(frozen=True)
class Verified:
    """`tensors`: stored ones; `quantised`: weights in a block format. `hints`: round-trip hints lie beside.

    `bytes_read`: block scales and dense values. `servers`: what each does with a sound checkpoint of this kind.
    `against`: the comparison with what it was made from, where that was given.
    `for_server`: problems are as they are for it.
    `known_type`: every tensor and shape is known from config.json; else layers were compared with one another.
    """

    source: str
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    format: str = "unknown"
    layout: str = "unknown"
    family: str = "unknown"
    tensors: int = 0
    quantised: int = 0
    bytes_read: int = 0
    hints: bool = False
    servers: tuple[Verdict, ...] = ()
    known_type: bool = False
    for_server: str | None = None
    against: Against | None = None

    @property
    def ok(self) -> bool:
        """Whether no problem is an error."""
        return not any(problem.severity is Severity.ERROR for problem in self.problems)

    def to_json(self) -> dict[str, JSON]:
        return {
            "ok": self.ok,
            "source": self.source,
            "format": self.format,
            "layout": self.layout,
            "family": self.family,
            "tensors": self.tensors,
            "quantised": self.quantised,
            "bytes_read": self.bytes_read,
            "problems": [_problem_json(problem) for problem in self.problems],
            "servers": [asdict(verdict) for verdict in self.servers],
            "warnings": list(self.warnings),
            "against": None if self.against is None else asdict(self.against),
        }


def _problem_json(problem: Problem) -> dict[str, JSON]:
    held: dict[str, JSON] = {
        "severity": problem.severity.value,
        "kind": problem.kind,
        "tensor": problem.tensor,
        "file": problem.file,
        "found": problem.found,
        "expected": problem.expected,
        "consequence": problem.consequence,
        "server": problem.server,
        "remedy": problem.remedy,
        "servers": [asdict(each) for each in problem.readings],
    }
    return held


@dataclass(frozen=True)
class Group:
    """Problems that share a line: the first, how many there are, and where, folded over layers and experts."""

    first: Problem
    count: int
    places: tuple[str, ...]


_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.|$)")
_FIGURES = re.compile(r"[0-9][0-9.,e+-]*")


def grouped(problems: Sequence[Problem]) -> tuple[Group, ...]:
    """One line for a fault that repeats over layers, experts and modules.

    Over layers and experts figures in what was found do not matter; over modules it must be the same words.
    """
    alike: dict[tuple[object, ...], list[Problem]] = {}
    for problem in problems:
        masked = (_FIGURES.sub("*", problem.found), _FIGURES.sub("*", problem.expected))
        alike.setdefault((*_cause(problem), _NUMBER.sub("*", _name(problem)), *masked), []).append(problem)
    groups: dict[tuple[object, ...], list[list[Problem]]] = {}
    for members in alike.values():
        first = members[0]
        groups.setdefault((*_cause(first), first.found, first.expected), []).append(members)
    return tuple(
        Group(parts[0][0], sum(map(len, parts)), tuple(_place(members) for members in parts))
        for parts in groups.values()
    )


def _cause(problem: Problem) -> tuple[object, ...]:
    return problem.severity, problem.kind, problem.server, problem.consequence


def _name(problem: Problem) -> str:
    return problem.tensor or problem.file or ""


def _place(members: Sequence[Problem]) -> str:
    """'model.layers.{0..35}.mlp.down_proj.weight_scale' of problems that differ in numbers alone."""
    names = [_name(problem) for problem in members]
    return names[0] if len(set(names)) == 1 else folded(names, _NUMBER)
