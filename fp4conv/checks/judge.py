"""From faults to problems: how much each matters, to which server, and what to do."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fp4conv.faults import ABOUT, Found, Kind, Severity
from fp4conv.readings import Checkpoint, Consequence, consequences, reading
from fp4conv.servers import NAMES, SERVERS, VERSIONS, Verdict


@dataclass(frozen=True)
class Problem:
    """One fault as the user reads it.

    `server`: the one that `consequence` speaks of; None where it speaks of all. `readings`: what the servers do with
    it, as far as it was read. `weight`: the weight or set that is affected, named alike in every format.
    """

    severity: Severity
    kind: str
    tensor: str | None
    file: str | None
    found: str
    expected: str
    consequence: str
    server: str | None
    remedy: str
    weight: str | None = None
    readings: tuple[Consequence, ...] = ()


_ORDER = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.NOTE: 2}


def judged(found: Iterable[Found], checkpoint: Checkpoint, server: str | None, *, source: str) -> tuple[Problem, ...]:
    """The problems of the checkpoint in `source`, the worst first; with `server`, as they are for it alone."""
    judgements = (_judge(fault, checkpoint, server) for fault in found)
    problems = [
        replace(problem, remedy=problem.remedy.replace("SRC", shlex.quote(source)).replace("FORMAT", checkpoint.format))
        for problem in judgements
        if problem is not None
    ]
    return tuple(sorted(problems, key=lambda problem: _ORDER[problem.severity]))


def _judge(fault: Found, checkpoint: Checkpoint, server: str | None) -> Problem | None:
    about = ABOUT[fault.kind]
    readings: tuple[Consequence, ...]
    if fault.server is not None or server is not None:
        if fault.server is not None and server not in (None, fault.server):
            return None
        name = server or fault.server
        assert name is not None
        own = reading(name, fault.kind, checkpoint, experts=fault.experts)
        readings = (own,) if own else ()
        severity = _for_server(about.severity, own)
        whose = name if own or fault.server else None
        if own is None:
            consequence = f"{NAMES[name]} {VERSIONS[name]}: {about.consequence}" if whose else about.consequence
        elif own.outcome == "loads":
            consequence = f"{_words(own)} (others: {about.consequence})"
        else:
            consequence = f"{about.consequence}. {_words(own)}"
        return _problem(fault, severity, consequence, whose, readings)
    readings = consequences(fault.kind, checkpoint, experts=fault.experts)
    worst = _worst(readings)
    consequence = f"{about.consequence}. {_words(worst)}" if worst else about.consequence
    return _problem(fault, about.severity, consequence, worst.server if worst else None, readings)


def _for_server(base: Severity, own: Consequence | None) -> Severity:
    """How much a fault matters to one server: what it refuses or misreads is an error, what it copes with is not."""
    if own is None or own.outcome == "unknown":
        return base
    if own.outcome == "loads":
        return Severity.WARNING if base is Severity.ERROR else Severity.NOTE
    return Severity.ERROR


def _worst(readings: Iterable[Consequence]) -> Consequence | None:
    """The reading that does the most harm: going wrong in silence, then refusing."""
    ranks = {"silent-damage": 0, "refuses": 1}
    harmful = [each for each in readings if each.outcome in ranks]
    return min(harmful, key=lambda each: (ranks[each.outcome], SERVERS.index(each.server)), default=None)


_VERBS = {"silent-damage": "goes wrong in silence", "refuses": "refuses it", "loads": "copes", "unknown": "is unknown"}


def _words(own: Consequence) -> str:
    return f"{NAMES[own.server]} {own.version} {_VERBS[own.outcome]}: {own.note}"


def _problem(
    fault: Found, severity: Severity, consequence: str, server: str | None, readings: tuple[Consequence, ...]
) -> Problem:
    return Problem(
        severity=severity,
        kind=fault.kind.value,
        tensor=fault.name,
        file=fault.file,
        found=fault.found,
        expected=fault.expected,
        consequence=consequence,
        server=server,
        remedy=ABOUT[fault.kind].remedy,
        weight=fault.weight,
        readings=readings,
    )


def unfit(verdict: Verdict) -> Problem:
    """The problem that a server would not load this kind of checkpoint, however sound."""
    about = ABOUT[Kind.WILL_NOT_LOAD]
    severity = Severity.WARNING if verdict.outcome == "unknown" else Severity.ERROR
    name = f"{NAMES[verdict.server]} {verdict.version}"
    verb = {
        "refuses": "refuses it",
        "silent-damage": "loads it without an error and computes something else",
        "unknown": "is not known to load it",
    }[verdict.outcome]
    return Problem(
        severity=severity,
        kind=Kind.WILL_NOT_LOAD.value,
        tensor=None,
        file=None,
        found=f"{name} {verb}",
        expected=f"a format and layout that {NAMES[verdict.server]} reads",
        consequence=verdict.note,
        server=verdict.server,
        remedy=about.remedy,
    )
