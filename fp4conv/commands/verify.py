"""`verify`: is a checkpoint sound, and what would a server make of it?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fp4conv.checks.check import Checked, check_structure, check_values, value_bytes
from fp4conv.checks.hints import damaged_hints
from fp4conv.checks.judge import judged, unfit
from fp4conv.checks.survey import Survey, survey
from fp4conv.commands.convert import DEFAULT_MEMORY, resources
from fp4conv.errors import UsageError
from fp4conv.faults import Found
from fp4conv.hints.reading import has_hints
from fp4conv.model import Model
from fp4conv.readings import Checkpoint
from fp4conv.report.verified import Verified
from fp4conv.servers import SERVERS, verdicts
from fp4conv.sources import folder_of

_BASE_BYTES = 150_000_000  # the interpreter with NumPy, and the headers of a large model
_CHUNK_BYTES = 16_000_000


def verify(
    source: str | Path,
    *,
    for_server: str | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    on_start: Callable[[int], object] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Verified:
    """Every problem of the checkpoint in folder `source`; with `for_server`, as they are for that server.

    `on_start` gets the bytes that are about to be read, `on_bytes` those that were. Memory stays within `max_memory`.
    A fault of the checkpoint is a problem in the result, not an error; SourceError is raised where there is no folder.
    """
    if for_server is not None and for_server not in SERVERS:
        raise UsageError(f"there is no server {for_server!r}", hint=f"choose one of {', '.join(SERVERS)}")
    threads, memory = resources(workers, max_memory)
    found = survey(folder_of(source), str(source))
    if not found.tensors:
        return _result(found, None, list(found.faults), for_server, 0)
    checked = check_structure(found, lost=found.lost, partial=found.partial)
    nbytes = value_bytes(checked)
    if on_start:
        on_start(nbytes)
    chunk = min(_CHUNK_BYTES, max(1_000_000, (memory - _BASE_BYTES) // threads))
    faults = [*found.faults, *checked.faults]
    faults += check_values(checked, chunk_bytes=chunk, workers=threads, progress=on_bytes)
    faults += _hint_faults(checked.model)
    return _result(found, checked, faults, for_server, nbytes)


def _hint_faults(model: Model | None) -> list[Found]:
    """What is wrong with the round-trip hints beside a dense result, if there are any."""
    if model is None or not has_hints(model.source):
        return []
    return damaged_hints(model)


def _result(found: Survey, checked: Checked | None, faults: list[Found], server: str | None, nbytes: int) -> Verified:
    if checked is None:
        problems = judged(faults, Checkpoint(), server, source=found.name)
        return Verified(found.name, problems, found.warnings, for_server=server)
    problems = judged(faults, checked.checkpoint, server, source=found.name)
    said = verdicts(checked.artifact)
    if server is not None:
        own = next(verdict for verdict in said if verdict.server == server)
        problems = (*(() if own.loads else (unfit(own),)), *problems)
    hints = has_hints(found)
    return Verified(
        source=found.name,
        format=checked.format_name,
        layout=checked.layout,
        family=checked.family.name,
        tensors=len(found.tensors),
        quantised=sum(weight.quantized for weight in checked.weights),
        bytes_read=nbytes,
        hints=hints,
        problems=problems,
        servers=said,
        warnings=found.warnings,
        known_type=checked.known_type,
        for_server=server,
    )
