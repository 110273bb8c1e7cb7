"""`convert`: one checkpoint into another format, shard by shard."""

from __future__ import annotations

import math
import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TypedDict, TypeVar

from fp4conv.checks.own import check_result, tied_head_warnings
from fp4conv.commands.fetching import Fetching
from fp4conv.commands.publishing import Push, check_not_source, place_of, publish, publishing
from fp4conv.errors import UsageError
from fp4conv.formats import MergeRounding, ScaleRule, Ties
from fp4conv.hints.values import BESIDE
from fp4conv.input_scales import InputScaleMode, InputScales
from fp4conv.layouts import parse
from fp4conv.lora import merge
from fp4conv.model import Model
from fp4conv.pipeline.results import StepResult
from fp4conv.pipeline.settle import settle
from fp4conv.plan import Action, Plan, peak_bytes
from fp4conv.planner import Options, make_plan
from fp4conv.report.converted import ConvertResult, Forecast, ForwardDifference
from fp4conv.report.hints import HintsResult, hints_result, part_bytes, planned_hints
from fp4conv.selection import Selection
from fp4conv.servers import SERVERS
from fp4conv.sizes import parse_size
from fp4conv.sources import open_adapter, open_source
from fp4conv.staging import Staging, check, pins_of, stage
from fp4conv.staging.places import Places, check_apart, nearest_existing
from fp4conv.training_rules import taken_as

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
    ties: Ties | str | None
    input_scales: str
    max_shard_size: int | str
    for_server: str | None
    repair: bool
    lora: Sequence[str | Path]
    merge_rounding: MergeRounding | str | None
    hints: bool


def convert(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    to: str,
    layout: str | None = None,
    modules: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scale_rule: ScaleRule | str | None = None,
    ties: Ties | str | None = None,
    input_scales: str = "stored",
    max_shard_size: int | str = DEFAULT_SHARD,
    max_memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    for_server: str | None = None,
    repair: bool = False,
    lora: Sequence[str | Path] = (),
    merge_rounding: MergeRounding | str | None = None,
    hints: bool = True,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    stream: bool = False,
    max_disk: int | str | None = None,
    command: str | None = None,
    on_plan: Callable[[Plan, Fetching], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    on_fetch: Callable[[int], None] | None = None,
    on_upload: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> ConvertResult:
    """Convert the checkpoint in `source` to another number format, in folder `destination`.

        result = fp4conv.convert("my-llama", "my-llama-nvfp4", to="nvfp4")
        print(result.sqnr_db)

    `source`: a folder, or a repository on the Hub ('org/name', 'org/name@revision', 'hf://org/name/folder').
    `to`: 'bf16', 'f16', 'f32', 'mxfp4' or 'nvfp4'. The other arguments are the options of `fp4conv convert`, by the
    same names and with the same defaults; None is the default that docs/cli.md names. Sizes are bytes, or text such as
    '5GB'; `max_memory` bounds the resident memory. `workers`: threads, by default one a core.

    `destination` does not exist until it is whole. A run that was stopped goes on when called again with the same
    arguments. With `push_to_hub` and `stream` nothing stays here, and `destination`, or else a folder called after the
    repository, is only the place to work in.

    Callbacks: `on_plan` gets the plan before the first byte is written; `on_bytes` the bytes of the source as they are
    done; `on_resume` (or else `on_bytes`) first those that an earlier run has done; `on_fetch` the bytes that come from
    the Hub; `on_upload` the bytes of the result that are there, and those in all; `on_note` what happens there.

    Raises SourceError for what cannot be read as a checkpoint, PlanError for what this model cannot become, ValuesError
    for NaN, Inf and overflow, OutputError for a destination that cannot be written, ResumeError where another run has
    left its work there, UsageError for arguments that do not fit together: each an Fp4convError (fp4conv.errors).
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
        repair=repair,
        lora=lora,
        merge_rounding=merge_rounding,
        hints=hints,
    )
    push = Push.of(
        push_to_hub, private=private, overwrite=overwrite, stream=stream, on_bytes=on_upload, on_note=on_note
    )
    place = place_of(destination, push)
    typed = command or _command_line(source, destination, options, _disk_words(push, stream, max_disk))
    pins = pins_of(place, typed if overwrite else None)
    plan = settle(plan_conversion(source, **options, pins=pins), repair=repair, hints=hints)
    peak_bytes(plan, memory, threads)  # refuses here what cannot fit
    fetching = Fetching.of(plan, stream=stream, max_disk=max_disk, published=push is not None)
    if push is not None:
        check_not_source(push, plan)
    if on_plan:
        on_plan(plan, fetching)
    # Compiled kernels: only a run pays for them.
    from fp4conv.pipeline.hint_files import check_hints, hint_bytes, write_hints
    from fp4conv.pipeline.run import run, whole_already
    from fp4conv.pipeline.supply import bring_adapters, bring_hints, remove_source

    for adapter in plan.model.adapters:
        check_apart(Places.of(place), adapter.root)
    with stage(
        place,
        fingerprint=plan.fingerprint,
        command=typed,
        pins=plan.model.pins,
        nbytes=fetching.disk_bytes(place),
        source_root=plan.model.source.root,
        overwrite=overwrite,
    ) as out:
        with publishing(push, plan, out, typed) as publication:
            outcome = whole_already(plan, out)
            if outcome is None:
                bring_adapters(plan)
                if fetching.limit is None:
                    bring_hints(plan)
                check_hints(plan)
                outcome = run(
                    plan,
                    out,
                    max_memory=memory,
                    workers=threads,
                    progress=on_bytes,
                    resumed=on_resume,
                    taker=publication,
                    supply=fetching.supply(out, on_fetch),
                    max_disk=fetching.room,
                )
                remove_source(out)
                write_files(plan, out)
                write_hints(plan, out, outcome.results)
            tied = tied_head_warnings(check_result(plan, out.root), for_server, str(place))
            hints_found = hints_result(plan, hint_bytes(plan, out), outcome)
            result = _result(plan, str(place), 0.0, outcome.results, hints_found, bytes_read=outcome.bytes_read)
            result = replace(result, warnings=(*result.warnings, *tied))
            if push is not None and publication is not None:
                result = publish(push, publication, out, plan, result=result, command=typed)
        if push is not None and push.drop:
            out.drop()
        else:
            out.commit()
    return replace(result, seconds=time.monotonic() - started)


def plan_conversion(
    source: str | Path,
    *,
    to: str,
    layout: str | None = None,
    modules: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scale_rule: ScaleRule | str | None = None,
    ties: Ties | str | None = None,
    input_scales: str = "stored",
    max_shard_size: int | str = DEFAULT_SHARD,
    for_server: str | None = None,
    repair: bool = False,
    lora: Sequence[str | Path] = (),
    merge_rounding: MergeRounding | str | None = None,
    hints: bool = True,
    pins: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a conversion, from headers and configs alone: `repair` acts when scales are read (`settle`).

    `pins`: the commits that an earlier run of it began with, by repository@revision.
    """
    if for_server is not None and for_server not in SERVERS:
        raise UsageError(f"there is no server {for_server!r}", hint=f"choose one of {', '.join(SERVERS)}")
    options = Options(
        to=to,
        layout=layout,
        selection=Selection(modules, tuple(include), tuple(exclude)),
        rule=None if scale_rule is None else _choice(ScaleRule, scale_rule, "--scale-rule"),
        ties=None if ties is None else _choice(Ties, ties, "--ties"),
        input_scales=_input_scales(input_scales),
        max_shard_bytes=parse_size(str(max_shard_size)),
        server=for_server,
        repair=repair,
        hints=hints,
    )
    return make_plan(_parse(source, lora, merge_rounding, pins or {}), options)


def _parse(
    source: str | Path,
    lora: Sequence[str | Path],
    merge_rounding: MergeRounding | str | None,
    pins: Mapping[str, str],
) -> Model:
    """The source as a model, with the adapters merged."""
    model = parse(open_source(source, pins))
    rounding = None if merge_rounding is None else _choice(MergeRounding, merge_rounding, "--merge-rounding")
    if lora:
        return merge(model, [open_adapter(adapter, pins) for adapter in lora], rounding)
    if rounding is not None:
        raise UsageError("--merge-rounding says how adapters are merged, but there is no --lora")
    return model


def check_destination(
    plan: Plan, destination: str | Path, *, command: str, repair: bool, hints: bool, overwrite: bool
) -> None:
    """Raise what `convert` would of `destination`, but for a disk too small; writes nothing."""
    for adapter in plan.model.adapters:
        check_apart(Places.of(Path(destination)), adapter.root)
    check(
        Path(destination),
        fingerprint=lambda: settle(plan, repair=repair, hints=hints).fingerprint,
        command=command,
        source_root=plan.model.source.root,
        overwrite=overwrite,
    )


def dry_run_result(
    plan: Plan, destination: str | Path, seconds: float, memory_bound_bytes: int, fetching: Fetching
) -> ConvertResult:
    """What `convert` would report of `plan`, with nothing measured."""
    forecast = Forecast(
        {name: shard.nbytes for name, shard in plan.shards.items() if not name.startswith(BESIDE)},
        fetching.disk_bytes(Path(destination)),
        free_bytes(destination),
        memory_bound_bytes,
        fetching.forecast(),
    )
    hints = planned_hints(plan)
    return _result(plan, str(destination), seconds, {}, hints, bytes_read=plan.bytes_read, forecast=forecast)


def free_bytes(destination: str | Path) -> int:
    """Free space on the disk where `destination` would be made."""
    return shutil.disk_usage(nearest_existing(Path(destination).absolute())).free


def write_files(plan: Plan, out: Staging) -> None:
    """Configs, index and what comes along from the source; after the tensors, so that no reader sees half a model."""
    for file in plan.files:
        content = file.content if file.content is not None else plan.model.source.read_bytes(file.name)
        out.write_file(file.name, content)


def _command_line(
    source: str | Path,
    destination: str | Path | None,
    options: _PlanOptions,
    more: Sequence[str],
) -> str:
    """What a user types to get the same bytes: for the journal, and for the message of a run that stopped."""
    words = ["fp4conv", "convert", str(source), *([] if destination is None else [str(destination)])]
    for key, given in options.items():
        option = "--for" if key == "for_server" else "--" + key.replace("_", "-")
        if isinstance(given, bool):
            negative = option == "--hints"
            words += ([] if given else ["--no-hints"]) if negative else [option] * given
            continue
        for value in given if isinstance(given, (list, tuple)) else () if given is None else (given,):
            words += [option, str(value.value if isinstance(value, Enum) else value)]
    return shlex.join([*words, *more])


def _disk_words(push: Push | None, stream: bool, max_disk: int | str | None) -> tuple[str, ...]:
    """The options about what is kept, as they are typed."""
    own = push.words if push is not None else ("--stream",) * stream
    return (*own, *(() if max_disk is None else ("--max-disk", str(max_disk))))


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
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        found = False
    if not found:
        raise UsageError(
            f"--input-scales {text!r} is neither none, stored, constant nor a file",
            hint="a file holds F32 scalars named <module>.input_amax",
        )
    return InputScales.from_file(path)


def _forward_difference(measured: Mapping[str, StepResult]) -> ForwardDifference | None:
    """How far the export is from training's forward pass; None where no set was calibrated apart."""
    apart = [result for result in measured.values() if "forward_values" in result.counts]
    if not apart:
        return None
    return ForwardDifference(
        tensors=len(apart),
        values=sum(result.counts["forward_differs"] for result in apart),
        of=sum(result.counts["forward_values"] for result in apart),
        sqnr_db=_total_sqnr([result.sums for result in apart], "forward_signal", "forward_noise"),
    )


def _measured_warnings(measured: Mapping[str, StepResult], forward: ForwardDifference | None) -> list[str]:
    bad = {key: result.counts["nonfinite"] for key, result in measured.items() if result.counts.get("nonfinite")}
    notes = [f"{count} NaN or Inf values in {key}, copied as they are" for key, count in bad.items()]
    if forward is not None:
        sqnr = "" if forward.sqnr_db is None else f", SQNR {forward.sqnr_db:.2f} dB"
        notes.append(
            f"{forward.tensors} weights were calibrated apart from others that servers fuse with them, so they take "
            f"their set's largest amax: {forward.values:,} of their {forward.of:,} values differ from the forward "
            f"pass of training{sqnr}. Share the amax of q/k/v and gate/up before training to avoid this"
        )
    beside = _beside_sqnr(measured)
    if beside is not None:
        notes.append(
            "training ran the adapter of quantised linear layers beside them, Q(W) x + B A x, which no merged weight "
            f"reproduces: against it the merged ones have an SQNR of {beside:.2f} dB"
        )
    return notes


def _merged(plan: Plan, measured: Mapping[str, StepResult]) -> dict[str, float | None]:
    """Every tensor that adapters changed -> norm of the change / norm of what it was; None where it was replaced."""
    changes: dict[str, float | None] = {}
    for step in plan.steps:
        if step.merged is not None:
            sums = measured[step.key].sums if step.key in measured else {}
            before, change = sums.get("base", 0.0), sums.get("change", 0.0)
            changes[step.key] = math.sqrt(change / before) if before > 0 else None
    return changes


def _beside_sqnr(measured: Mapping[str, StepResult]) -> float | None:
    """How far merged weights are from training that ran the adapter beside the quantised base."""
    apart = [result.sums for result in measured.values() if "beside_signal" in result.sums]
    return _total_sqnr(apart, "beside_signal", "beside_noise")


def _total_sqnr(sums: Iterable[Mapping[str, float]], signal: str, noise: str) -> float | None:
    pairs = [(each[signal], each[noise]) for each in sums]
    return sqnr_db(math.fsum(s for s, _ in pairs), math.fsum(n for _, n in pairs))


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where there is no noise (nothing was lost) or no signal."""
    return 10.0 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def _result(
    plan: Plan,
    destination: str,
    seconds: float,
    results: Mapping[str, StepResult],
    hints: HintsResult,
    *,
    bytes_read: int,
    forecast: Forecast | None = None,
) -> ConvertResult:
    measured = {step.key: results[step.key] for step in plan.steps if step.key in results}
    coded = {key: result.sums for key, result in measured.items() if "signal" in result.sums}
    forward = _forward_difference(measured)
    return ConvertResult(
        source=plan.model.source.name,
        source_format=taken_as(plan.model),
        destination=destination,
        format=plan.target,
        layout=plan.layout,
        converted=len(plan.model_steps) - plan.count(Action.COPY),
        copied=plan.count(Action.COPY),
        merged=_merged(plan, measured),
        bytes_read=bytes_read,
        bytes_written=plan.total_bytes - part_bytes(plan) + hints.kept_bytes,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        lossy_blocks=sum(result.counts.get("lossy_blocks", 0) for result in measured.values()),
        sqnr_db=_total_sqnr(coded.values(), "signal", "noise"),
        per_tensor={key: sqnr_db(sums["signal"], sums["noise"]) for key, sums in coded.items()},
        forward_difference=forward,
        beside_sqnr_db=_beside_sqnr(measured),
        hints=hints,
        servers=plan.servers,
        warnings=(*plan.warnings, *_measured_warnings(measured, forward), *hints.warnings),
        commits=plan.model.pins,
        forecast=forecast,
    )


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
