"""`fp4conv inspect`."""

from __future__ import annotations

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.options import json_option, memory_option, quiet_option, workers_option
from fp4conv.cli.output import Meter, print_json, print_view, warn
from fp4conv.formats import BLOCK_FORMATS

_SORTS = ("name", "format", "bytes", "bits", "sqnr", "mse", "max-error", "cosine", "largest", "zeros", "nan")


@click.command(
    short_help="Show formats, sizes, values and quantisation error.",
    epilog=epilog(
        "fp4conv inspect gpt-oss-20b --headers-only",
        "fp4conv inspect my-llama-fp4 --reference my-llama --sort sqnr",
        "fp4conv inspect my-llama-fp4 --reference my-llama --html my-llama.html",
        "fp4conv inspect my-llama --as nvfp4",
    ),
)
@click.argument("src", metavar="SRC")
@click.option("--reference", metavar="REF", help="A checkpoint of the same tensors: how far SRC is from it.")
@click.option(
    "--as",
    "estimate",
    multiple=True,
    type=click.Choice(list(BLOCK_FORMATS)),
    help="What a conversion would lose, by each scale rule. Repeatable. Default: both, for a dense SRC alone.",
)
@click.option("--tensor", metavar="GLOB", help="Only tensors whose name matches, each on a line of its own.")
@click.option(
    "--sort",
    type=click.Choice(_SORTS),
    default="name",
    show_default=True,
    help="Order of the table; of errors the worst first.",
)
@click.option("--rows", metavar="A:B", help="With --tensor: the numbers of these rows themselves, such as 0:2.")
@click.option("--codes", is_flag=True, help="With --rows: block scales and codes too.")
@click.option("--headers-only", is_flag=True, help="Read headers and configs, no values.")
@click.option("--html", metavar="FILE", help="Write all of it as one page that opens without a network, too.")
@memory_option
@workers_option
@quiet_option
@click.option("--csv", "as_csv", is_flag=True, help="A line a tensor on stdout.")
@json_option
def inspect(
    src: str,
    *,
    reference: str | None,
    estimate: tuple[str, ...],
    tensor: str | None,
    sort: str,
    rows: str | None,
    codes: bool,
    headers_only: bool,
    html: str | None,
    max_memory: str,
    workers: int | None,
    quiet: bool,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Show what the checkpoint in SRC holds: formats, sizes, scales, codes, and what quantisation cost or would cost.

    Values are streamed within --max-memory. Tensors that differ in layer and expert numbers alone share a line, with
    their figures taken together; --tensor and --json list each.
    """
    if as_csv and as_json:
        raise click.UsageError("--csv and --json both go to stdout: give one of them")
    if rows is not None or codes:
        if tensor is None:
            raise click.UsageError("--rows and --codes need --tensor GLOB: whose numbers?")
        if html is not None or as_csv or reference is not None:
            raise click.UsageError("--rows and --codes show numbers alone: without --html, --csv and --reference")
        _print_numbers(src, tensor, rows or "0:1", codes=codes, as_json=as_json)
        return
    from fp4conv.commands.inspect import inspect as run

    with Meter(quiet) as meter:
        found = run(
            src,
            reference=reference,
            estimate=estimate or None,
            tensor=tensor,
            headers_only=headers_only,
            html=html,
            max_memory=max_memory,
            workers=workers,
            on_total=lambda nbytes: meter.start(nbytes, "values"),
            on_bytes=meter.advance,
            on_fetch=meter.downloaded,
        )
    if html is not None and not quiet:
        click.echo(f"written: {html}", err=True)
    from fp4conv.report.facts import fold
    from fp4conv.report.inspected import SORTS, inspect_view
    from fp4conv.report.terminal import console

    if as_json:
        print_json(found.to_json())
    elif as_csv:
        from fp4conv.report.rows import csv_text

        click.echo(csv_text(sorted(found.tensors, key=SORTS[sort])), nl=False)
        warn(found.warnings, quiet)
    else:
        shown = sorted(found.tensors if tensor else fold(found.tensors), key=SORTS[sort])
        print_view(inspect_view(found, shown, width=console().width, grouped=sort == "name"))


def _print_numbers(src: str, tensor: str, rows: str, *, codes: bool, as_json: bool) -> None:
    from fp4conv.commands.show import show
    from fp4conv.report.rows import numbers_view

    shown = show(src, tensor, _slice(rows))
    if as_json:
        print_json({"source": src, "tensors": [each.to_json() for each in shown]})
    else:
        print_view(numbers_view(shown, codes=codes))


def _slice(text: str) -> tuple[int | None, int | None]:
    """'0:4', ':4', '-2:' or '3', as a slice of rows."""
    parts = text.split(":")
    try:
        ends = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        ends = []
    if len(ends) == 1 and ends[0] is not None:
        return ends[0], ends[0] + 1 or None
    if len(ends) != 2:
        raise click.BadParameter(f"{text!r} is no range of rows; write it like 0:4", param_hint="--rows")
    return ends[0], ends[1]
