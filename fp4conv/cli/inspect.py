"""`fp4conv inspect`."""

from __future__ import annotations

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.output import print_json, print_view


@click.command(epilog=epilog("fp4conv inspect gpt-oss-20b --headers-only"))
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
        print_json(found.to_json())
        return
    from fp4conv.report.facts import fold
    from fp4conv.report.terminal import inspect_view

    rows = found.tensors if tensor else fold(found.tensors)
    keys = {"format": lambda row: row.format, "bytes": lambda row: -row.bytes, "bits": lambda row: row.bits_per_weight}
    print_view(inspect_view(found, sorted(rows, key=keys[sort]) if sort in keys else rows, by_layer=sort == "name"))
