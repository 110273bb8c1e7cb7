"""`fp4conv diff`."""

from __future__ import annotations

import sys

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.options import json_option, memory_option, quiet_option, workers_option
from fp4conv.cli.output import Meter, print_json, print_view


@click.command(
    short_help="Say whether two checkpoints have the same values.",
    epilog=epilog("fp4conv diff my-llama-fp4 my-llama --tolerance 18"),
)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--tolerance", type=float, metavar="DB", help="Pass where every tensor's SQNR is at least DB.")
@memory_option
@workers_option
@quiet_option
@json_option
def diff(
    first: str,
    second: str,
    *,
    tolerance: float | None,
    max_memory: str,
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say whether A and B have the same values, tensor by tensor, in whatever formats and layouts. Exit 1: they differ.

    Values are compared as numbers: -0.0 is 0.0, and NaN is NaN. Errors are those of A against B. A tensor that one of
    them lacks, or that has another shape, is a difference; config.json and other files are mentioned and decide
    nothing.
    """
    from fp4conv.commands.diff import diff as run

    with Meter(quiet) as meter:
        found = run(
            first,
            second,
            tolerance=tolerance,
            max_memory=max_memory,
            workers=workers,
            on_total=lambda nbytes: meter.start(nbytes, "compare"),
            on_bytes=meter.advance,
            on_fetch=meter.downloaded,
        )
    if as_json:
        print_json(found.to_json())
    else:
        from fp4conv.report.differing import difference_view

        print_view(difference_view(found))
    if not found.same:
        sys.exit(1)
