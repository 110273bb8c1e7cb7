"""`convert`: one checkpoint into another format, shard by shard."""

from __future__ import annotations

import math
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TypedDict, TypeVar

from fp4conv.errors import UsageError
from fp4conv.formats import ScaleRule, Ties
from fp4conv.input_scales import InputScaleMode, InputScales
from fp4conv.layouts import parse
from fp4conv.plan import Action, Plan, peak_bytes
from fp4conv.planner import Options, make_plan
from fp4conv.report.converted import ConvertResult
from fp4conv.selection import Selection
from fp4conv.servers import SERVERS
from fp4conv.sizes import parse_size
from fp4conv.sources import open_source
from fp4conv.staging import Staging, stage

DEFAULT_MEMORY = "1GB"
DEFAULT_SHARD = "5GB"


class _PlanOptions(TypedDict):
    """The arguments that change bytes."""

    to: str
    layout: str | None
    modules: str | None
    include: Sequence[str]
    exclude: Sequence[str]
    scale_rule: ScaleRule | str | None
    ties: Ties | str
    input_scales: str
    max_shard_size: int | str
    for_server: str | None


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    layout: str | None = None,
    modules: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scale_rule: ScaleRule | str | None = None,
    ties: Ties | str = Ties.EVEN,
    input_scales: str = "stored",
    max_shard_size: int | str = DEFAULT_SHARD,
    max_memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    for_server: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> ConvertResult:
    """Convert the checkpoint in folder `source` to `to` ('bf16', 'f16', 'f32', 'mxfp4', 'nvfp4') in `destination`.

    The arguments are the options of `fp4conv convert`. `on_plan` gets the plan before the first byte is written,
    `on_bytes` the bytes of the source as they are done. Memory stays within `max_memory`. A run that was stopped
    goes on when called again with the same arguments. Raises the errors of fp4conv.errors.
    """
    started = time.monotonic()
    threads, memory = resources(workers, max_memory)
    options = _PlanOptions(
        to=to,
        layout=layout,
        modules=modules,
        include=include,
        exclude=exclude,
        scale_rule=scale_rule,
        ties=ties,
        input_scales=input_scales,
        max_shard_size=max_shard_size,
        for_server=for_server,
    )
    plan = plan_conversion(source, **options)
    peak_bytes(plan, memory, threads)  # refuses here what cannot fit
    if on_plan:
        on_plan(plan)
    from fp4conv.pipeline import run  # compiled kernels: only a run pays for them

    with stage(
        Path(destination),
        fingerprint=plan.fingerprint,
        command=command or _command_line(source, destination, options),
        nbytes=plan.total_bytes,
        source_root=plan.model.source.root,
        overwrite=overwrite,
    ) as out:
        outcome = run(plan, out, max_memory=memory, workers=threads, progress=on_bytes)
        write_files(plan, out)
        out.commit()
    nonfinite = {key: r.nonfinite for key, r in outcome.results.items() if r.nonfinite}
    notes = [f"{count} NaN or Inf values in {key}, copied as they are" for key, count in nonfinite.items()]
    measured = {s.key: outcome.results[s.key] for s in plan.steps if s.action in (Action.QUANTIZE, Action.TRANSCODE)}
    return _result(
        plan,
        str(destination),
        seconds=time.monotonic() - started,
        lossy_blocks=sum(result.lossy_blocks for result in measured.values()),
        sums={key: (result.signal, result.noise) for key, result in measured.items()},
        notes=notes,
    )


def plan_conversion(
    source: str | Path,
    *,
    to: str,
    layout: str | None = None,
    modules: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scale_rule: ScaleRule | str | None = None,
    ties: Ties | str = Ties.EVEN,
    input_scales: str = "stored",
    max_shard_size: int | str = DEFAULT_SHARD,
    for_server: str | None = None,
) -> Plan:
    """The plan of a conversion, from headers and configs alone."""
    if for_server is not None and for_server not in SERVERS:
        raise UsageError(f"there is no server {for_server!r}", hint=f"choose one of {', '.join(SERVERS)}")
    options = Options(
        to=to,
        layout=layout,
        selection=Selection(modules, tuple(include), tuple(exclude)),
        rule=None if scale_rule is None else _choice(ScaleRule, scale_rule, "--scale-rule"),
        ties=_choice(Ties, ties, "--ties"),
        input_scales=_input_scales(input_scales),
        max_shard_bytes=parse_size(str(max_shard_size)),
        server=for_server,
    )
    return make_plan(parse(open_source(source)), options)


def dry_run_result(plan: Plan, destination: str | Path, seconds: float = 0.0) -> ConvertResult:
    """What `convert` would report of `plan`, with nothing measured."""
    return _result(plan, str(destination), seconds=seconds, lossy_blocks=0, sums={}, notes=[], dry_run=True)


def write_files(plan: Plan, out: Staging) -> None:
    """Configs, index and what comes along from the source; after the tensors, so that no reader sees half a model."""
    for file in plan.files:
        content = file.content if file.content is not None else plan.model.source.read_bytes(file.name)
        out.write_file(file.name, content)


def _command_line(source: str | Path, destination: str | Path, options: _PlanOptions) -> str:
    """What a user types to get the same bytes: for the journal, and for the message of a run that stopped."""
    words = ["fp4conv", "convert", str(source), str(destination)]
    for key, given in options.items():
        option = "--for" if key == "for_server" else "--" + key.replace("_", "-")
        for value in given if isinstance(given, (list, tuple)) else () if given is None else (given,):
            words += [option, str(value.value if isinstance(value, Enum) else value)]
    return shlex.join(words)


_Choice = TypeVar("_Choice", bound=Enum)


def _choice(kind: type[_Choice], value: object, option: str) -> _Choice:
    """The member of `kind` that `value` names; UsageError lists them."""
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(str(member.value) for member in kind)
        raise UsageError(f"{option} {value!r} is none of {names}") from None


def resources(workers: int | None, max_memory: int | str) -> tuple[int, int]:
    """(threads, bytes of memory) that the options mean."""
    threads = workers if workers is not None else available_cores()
    if threads < 1:
        raise UsageError(f"--workers {threads}: at least one is needed")
    return threads, parse_size(str(max_memory))


def available_cores() -> int:
    """Cores that this process may run on; all of them where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _input_scales(text: str) -> InputScales:
    if text in (InputScaleMode.STORED.value, InputScaleMode.NONE.value, InputScaleMode.CONSTANT.value):
        return InputScales(InputScaleMode(text))
    path = Path(text)
    if not path.is_file():
        raise UsageError(
            f"--input-scales {text!r} is neither none, stored, constant nor a file",
            hint="a file holds F32 scalars named <module>.input_amax",
        )
    return InputScales.from_file(path)


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where there is no noise (nothing was lost) or no signal."""
    return 10.0 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def _result(
    plan: Plan,
    destination: str,
    *,
    seconds: float,
    lossy_blocks: int,
    sums: Mapping[str, tuple[float, float]],
    notes: Sequence[str],
    dry_run: bool = False,
) -> ConvertResult:
    signal, noise = math.fsum(s for s, _ in sums.values()), math.fsum(n for _, n in sums.values())
    return ConvertResult(
        source=plan.model.source.name,
        destination=destination,
        format=plan.target,
        layout=plan.layout,
        converted=len(plan.steps) - plan.count(Action.COPY),
        copied=plan.count(Action.COPY),
        bytes_read=plan.bytes_read,
        bytes_written=plan.total_bytes,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        lossy_blocks=lossy_blocks,
        sqnr_db=sqnr_db(signal, noise),
        per_tensor={key: sqnr_db(*pair) for key, pair in sums.items()},
        servers=plan.servers,
        warnings=(*plan.warnings, *notes),
        dry_run=dry_run,
    )


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
