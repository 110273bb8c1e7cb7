"""What was run and what came of it: rows for the terminal, for JSON and for docs/servers.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WHAT, RESULT = 62, 74  # characters a cell in the terminal


@dataclass(frozen=True)
class Row:
    """One check. `ok`: it came out as it must."""

    server: str
    version: str
    what: str
    result: str
    ok: bool


@dataclass(frozen=True)
class FaultRow:
    """What vLLM did with a planted fault, and the first thing that `fp4conv verify --for vllm` says of it."""

    fault: str
    base: str
    vllm: str
    verify: str
    ok: bool


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def as_lines(rows: Sequence[Row]) -> str:
    """One line a check, for the terminal."""
    return "\n".join(
        f"{'ok  ' if row.ok else 'FAIL'} {row.server:9} {shortened(row.what, WHAT):{WHAT}} {row.result}" for row in rows
    )


def as_table(rows: Sequence[Row]) -> str:
    cells = [("server", "version", "what was run", "result"), ("---",) * 4]
    cells += [(row.server, row.version, row.what, row.result if row.ok else f"**FAILS** {row.result}") for row in rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in cells) + "\n"


def as_fault_table(rows: Sequence[FaultRow]) -> str:
    cells = [("fault", "planted in", "what vLLM did", "what verify says"), ("---",) * 4]
    cells += [(row.fault, row.base, shortened(row.vllm, 150), shortened(row.verify, 220)) for row in rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in cells) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
