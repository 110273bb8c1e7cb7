"""`verify`: is a checkpoint sound, and what would a server make of it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fp4conv.checks.against import Against
from fp4conv.checks.check import Checked, check_structure, check_values, value_bytes
from fp4conv.checks.configs import config_faults
from fp4conv.checks.hints import damaged_hints
from fp4conv.checks.judge import judged, unfit
from fp4conv.checks.survey import Survey, survey
from fp4conv.commands.convert import DEFAULT_MEMORY, resources
from fp4conv.errors import UsageError
from fp4conv.faults import Found, Kind
from fp4conv.hints.reading import has_hints
from fp4conv.layouts import parse
from fp4conv.model import JSON, Model
from fp4conv.readings import Checkpoint
from fp4conv.report.verified import Verified
from fp4conv.servers import SERVERS, verdicts
from fp4conv.sources import OnFetch, bring_weights, folder_of, open_source

_BASE_BYTES = 150_000_000  # the interpreter with NumPy, and the headers of a large model
_CHUNK_BYTES = 16_000_000
_TYPED: Mapping[str, JSON] = {"model_type": "unread"}  # in place of a config that is another fault


def verify(
    source: str | Path,
    *,
    original: str | Path | None = None,
    for_server: str | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    on_start: Callable[[int], None] | None = None,
    on_compare: Callable[[int], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_fetch: OnFetch | None = None,
) -> Verified:
    """Every problem of the checkpoint in `source`, a folder or a repository on the Hub.

        found = fp4conv.verify("my-llama-nvfp4", for_server="vllm")
        print(found.ok, [problem.tensor for problem in found.problems])

    `for_server`: 'vllm', 'sglang', 'trtllm', 'transformers' or 'llamacpp'; problems are then as they are for it alone.
    `original`: what it was made from, whose values it is compared with. Values are streamed within `max_memory` (bytes,
    or text such as '1GB') by `workers` threads, by default one a core. `on_start` and `on_compare` get the bytes that
    are about to be read to check and to compare, `on_bytes` those that were, `on_fetch` those that came from the Hub
    and those in all.

    A fault of the checkpoint is a problem in the result, not an error. Raises SourceError where there is no folder, or
    where `original` cannot be read, and UsageError for arguments that do not fit.
    """
    if for_server is not None and for_server not in SERVERS:
        raise UsageError(f"there is no server {for_server!r}", hint=f"choose one of {', '.join(SERVERS)}")
    threads, memory = resources(workers, max_memory)
    reference = parse(open_source(original)) if original is not None else None
    found = survey(folder_of(source, on_fetch), str(source))
    if not found.tensors:
        problems = judged(found.faults, Checkpoint(), for_server, source=found.name)
        return Verified(found.name, problems, found.warnings, for_server=for_server)
    checked = check_structure(found, lost=found.lost, partial=found.partial)
    nbytes = value_bytes(checked)
    if on_start:
        on_start(nbytes)
    chunk = min(_CHUNK_BYTES, max(1_000_000, (memory - _BASE_BYTES) // threads))
    faults = [*found.faults, *checked.faults]
    faults += config_faults(found.configs.get("config.json", _TYPED), checked.layout)
    faults += check_values(checked, chunk_bytes=chunk, workers=threads, progress=on_bytes)
    faults += _hint_faults(checked.model)
    against = None
    if reference is not None and checked.model is None:
        expected = "a checkpoint that a conversion could read"
        faults.append(Found(Kind.SOURCE_MISMATCH, "it could not be compared: see its other problems", expected))
    elif reference is not None and checked.model is not None:
        # Compiled kernels: only a comparison pays for them.
        from fp4conv.checks.comparing import compare_with_source

        bring_weights(reference.source, on_fetch)
        against, apart = compare_with_source(
            checked.model, reference, max_memory=memory, workers=threads, on_total=on_compare, on_bytes=on_bytes
        )
        faults += apart
    return _result(found, checked, faults, for_server, against)


def _hint_faults(model: Model | None) -> list[Found]:
    """What is wrong with the round-trip hints beside a dense result, if there are any."""
    if model is None or not has_hints(model.source):
        return []
    return damaged_hints(model)


def _result(
    found: Survey, checked: Checked, faults: list[Found], server: str | None, against: Against | None
) -> Verified:
    problems = judged(faults, checked.checkpoint, server, source=found.name)
    said = verdicts(checked.artifact)
    if server is not None:
        own = next(verdict for verdict in said if verdict.server == server)
        problems = (*(() if own.loads else (unfit(own),)), *problems)
    return Verified(
        source=found.name,
        format=checked.format_name,
        layout=checked.layout,
        family=checked.family.name,
        tensors=len(found.tensors),
        quantised=sum(weight.quantized for weight in checked.weights),
        bytes_read=value_bytes(checked),
        hints=has_hints(found),
        problems=problems,
        servers=said,
        warnings=found.warnings,
        known_type=checked.known_type,
        for_server=server,
        against=against,
    )
