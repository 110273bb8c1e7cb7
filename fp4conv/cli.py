"""The command line: parse, call the function of the same name, print, exit.

Results go to stdout, progress and warnings to stderr. Exit 0: done. 1: the data or the run failed. 2: usage.
Commands are imported when they run, so that `--help` is quick.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from fp4conv.errors import Fp4convError
from fp4conv.families import SCOPES
from fp4conv.formats import TARGETS, MergeRounding, ScaleRule, Ties
from fp4conv.servers import SERVERS
from fp4conv.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fp4conv.plan import Plan

_RULES = [rule.value for rule in ScaleRule]
INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


class _Group(click.Group):
    """Turns our errors into a message and an exit code, whichever command raised them."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Fp4convError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as stopped:
            _fail("\n  ".join(["stopped", *map(str, stopped.args)]), INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output is gone; so is the need to say more
            sys.exit(1)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _epilog(*examples: str) -> str:
    lines = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExample{'s' * (len(examples) > 1)}:\n{lines}"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fp4conv")
def main() -> None:
    """Convert language-model checkpoints between BF16, MXFP4 and NVFP4: exact, streaming, resumable."""


@main.command(
    epilog=_epilog(
        "fp4conv convert gpt-oss-20b gpt-oss-20b-bf16 --to bf16",
        "fp4conv convert my-llama my-llama-nvfp4 --to nvfp4 --dry-run",
        "fp4conv convert my-llama my-llama-tuned --to bf16 --lora my-llama-lora",
    )
)
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST")
@click.option(
    "--to",
    required=True,
    type=click.Choice(TARGETS),
    help="Number format of the result.",
)
@click.option(
    "--layout",
    metavar="NAME",
    help="hf, openai, openai-original, modelopt or compressed-tensors. Default: what servers expect.",
)
@click.option(
    "--modules",
    type=click.Choice(list(SCOPES)),
    help="What is quantised. Default: what SRC has quantised; else experts for gpt-oss, all for others.",
)
@click.option("--include", multiple=True, metavar="GLOB", help="Quantise these modules too. Repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these modules dense. Repeatable.")
@click.option(
    "--scale-rule",
    type=click.Choice(_RULES),
    help="mxfp4: floor, rceil, even, mse. nvfp4: amax, four-over-six, mse. Default: mse.",
)
@click.option(
    "--ties",
    type=click.Choice([t.value for t in Ties]),
    help="Where a value half way between two codes goes. Default: even.",
)
@click.option(
    "--input-scales",
    default="stored",
    show_default=True,
    metavar="none|stored|constant|FILE",
    help="NVFP4 scales of activations (W4A4).",
)
@click.option("--lora", multiple=True, metavar="ADAPTER", help="Merge this LoRA adapter first. Repeatable, in order.")
@click.option(
    "--merge-rounding",
    type=click.Choice([rounding.value for rounding in MergeRounding]),
    help="once: in F32, rounded one time. peft: as merge_and_unload. training: as LoRA-QAT trains. "
    "Default: training for an adapter with a ModelOpt state, else once.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest file of the result.")
@click.option("--max-memory", default="1GB", show_default=True, metavar="SIZE", help="Bound on resident memory.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads. Default: the cores.")
@click.option(
    "--for", "for_server", type=click.Choice(SERVERS), help="Refuse when this server would not load the result."
)
@click.option(
    "--repair",
    is_flag=True,
    help="Requantise sets that servers fuse and whose stored tensor scales differ, or that --lora touches in part.",
)
@click.option(
    "--no-hints",
    "hints",
    flag_value=False,
    default=True,
    help="Keep nothing in fp4conv/ for a way back to the byte, and use nothing that is there.",
)
@click.option("--overwrite", is_flag=True, help="Replace DST; the old one stays until the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing.")
@click.option("--quiet", is_flag=True, help="No progress and no warnings.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def convert(src: str, dst: str, **options: object) -> None:
    """Convert the checkpoint in SRC into DST, shard by shard, within a fixed memory.

    A run that was stopped goes on when the same command is given again.
    """
    _convert(src, dst, **options)  # type: ignore[arg-type]


def _convert(src: str, dst: str, *, dry_run: bool, quiet: bool, as_json: bool, **options: object) -> None:
    from fp4conv.commands import convert as command

    if dry_run:
        _dry_run(src, dst, as_json, quiet, options)
        return
    with _Meter(quiet) as meter:
        result = command.convert(
            src,
            dst,
            command=_words(),
            on_plan=meter.plan,
            on_bytes=meter.advance,
            on_resume=meter.resume,
            **options,  # type: ignore[arg-type]
        )
    if as_json:
        _print_json(result.to_json())
        return
    from fp4conv.report.terminal import convert_view

    _print(convert_view(result))
    _warn(result.warnings, quiet)


def _words(*without: str) -> str:
    """This command as it was typed."""
    return shlex.join(["fp4conv", *(word for word in sys.argv[1:] if word not in without)])


def _dry_run(src: str, dst: str, as_json: bool, quiet: bool, options: dict[str, object]) -> None:
    from fp4conv.commands import convert as command
    from fp4conv.plan import peak_bytes
    from fp4conv.report.terminal import plan_view

    started = time.monotonic()
    threads, memory = command.resources(options.pop("workers"), options.pop("max_memory"))  # type: ignore[arg-type]
    overwrite = bool(options.pop("overwrite"))
    plan = command.plan_conversion(src, **options)  # type: ignore[arg-type]
    bound = peak_bytes(plan, memory, threads)
    command.check_destination(
        plan,
        dst,
        command=_words("--dry-run"),
        repair=bool(options["repair"]),
        hints=bool(options["hints"]),
        overwrite=overwrite,
    )
    if as_json:
        _print_json(command.dry_run_result(plan, dst, time.monotonic() - started, bound).to_json())
        return
    _print(plan_view(plan, free_bytes=command.free_bytes(dst), peak_bytes=bound))
    _warn(plan.warnings, quiet)


@main.command("merge-lora", epilog=_epilog("fp4conv merge-lora gpt-oss-20b my-gpt-oss-lora gpt-oss-20b-tuned"))
@click.argument("base", metavar="BASE")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("dst", metavar="DST")
@click.option("--to", type=click.Choice(TARGETS), help="Number format of the result. Default: that of BASE.")
def merge_lora(base: str, adapter: str, dst: str, *, to: str | None, **options: object) -> None:
    """Merge the LoRA adapter in ADAPTER into the checkpoint in BASE, and write DST.

    The same as convert BASE DST --lora ADAPTER, with BASE's own format unless --to is given. What the adapter does
    not touch is copied as it is.
    """
    from fp4conv.commands.merge_lora import own_format

    _convert(base, dst, lora=(adapter,), to=to or own_format(base), **options)  # type: ignore[arg-type]


_OWN = ("src", "dst", "to", "lora")  # what merge-lora spells in its own way
merge_lora.params += [parameter for parameter in convert.params if parameter.name not in _OWN]


@main.command(epilog=_epilog("fp4conv inspect gpt-oss-20b --headers-only"))
@click.argument("src", metavar="SRC")
@click.option(
    "--headers-only", is_flag=True, help="Read headers and configs, no tensor. (All that inspect does so far.)"
)
@click.option("--tensor", metavar="GLOB", help="Only tensors whose name matches, each on a line of its own.")
@click.option(
    "--sort", type=click.Choice(["name", "format", "bytes", "bits"]), default="name", help="Order of the table."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def inspect(src: str, headers_only: bool, tensor: str | None, sort: str, as_json: bool) -> None:
    """Show the format, family and size of the checkpoint in SRC, and a table of its tensors.

    Tensors that differ in layer and expert numbers alone share a line; --tensor and --json list each.
    """
    from fp4conv.commands.inspect import inspect as run

    found = run(src, tensor=tensor)
    if as_json:
        _print_json(found.to_json())
        return
    from fp4conv.report.facts import fold
    from fp4conv.report.terminal import inspect_view

    rows = found.tensors if tensor else fold(found.tensors)
    keys = {"format": lambda row: row.format, "bytes": lambda row: -row.bytes, "bits": lambda row: row.bits_per_weight}
    _print(inspect_view(found, sorted(rows, key=keys[sort]) if sort in keys else rows, by_layer=sort == "name"))


@main.command(epilog=_epilog("fp4conv demo"))
@click.argument("directory", metavar="[DIR]", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def demo(directory: str | None, as_json: bool) -> None:
    """Take the tour: make a small gpt-oss checkpoint and convert BF16 -> MXFP4 -> NVFP4 and MXFP4 -> BF16.

    In DIR, or in a temporary folder that is removed at the end.
    """
    from fp4conv.commands.demo import demo as run

    _announce_kernels(quiet=False)
    tour = run(directory, on_stop=lambda what: click.echo(f"{what} ...", err=True))
    if as_json:
        _print_json(tour.to_json())
        return
    from fp4conv.report.terminal import tour_view

    _print(tour_view(tour.source_bytes, [(stop.name, stop.exact, stop.result) for stop in tour.stops]))
    if directory:
        click.echo(f"\nThe checkpoints are in {directory}. Look at one:  fp4conv inspect {Path(directory) / 'nvfp4'}")


# ---- output


def _print(view: RenderableType) -> None:
    from fp4conv.report.terminal import console

    console().print(view)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _warn(warnings: tuple[str, ...], quiet: bool) -> None:
    for warning in () if quiet else warnings:
        click.echo(f"warning: {warning}", err=True)


def _announce_kernels(quiet: bool) -> None:
    """Say so before the first compilation on this machine, which takes some seconds."""
    import fp4conv.kernels.compiled  # noqa: F401 -- until its kernels are known, all look cold
    from fp4conv.kernels.jit import cache_note, is_cold

    if quiet:
        return
    if note := cache_note():
        click.echo(f"warning: {note}", err=True)
    elif is_cold():
        click.echo("compiling kernels, once on this machine (some seconds) ...", err=True)


class _Meter:
    """A progress bar on stderr, in bytes of the source; silent where stderr is no terminal, and with --quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._advance: Callable[[int], object] = lambda _: None
        self._start_at: Callable[[int], object] = lambda _: None
        self._close: Callable[[], None] = lambda: None

    def plan(self, plan: Plan) -> None:
        from tqdm import tqdm

        _announce_kernels(self._quiet)
        bar = tqdm(
            total=plan.bytes_read,
            unit="B",
            unit_scale=True,
            desc=f"to {plan.target}",
            disable=True if self._quiet else None,
        )

        def start_at(nbytes: int) -> None:
            bar.initial = bar.n = bar.last_print_n = nbytes  # so that it is no part of the rate
            bar.refresh()

        self._advance, self._start_at, self._close = bar.update, start_at, bar.close

    def advance(self, nbytes: int) -> None:
        self._advance(nbytes)

    def resume(self, nbytes: int) -> None:
        self._start_at(nbytes)

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
