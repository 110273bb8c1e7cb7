"""`fp4conv demo`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.options import json_option
from fp4conv.cli.output import announce_kernels, print_json, print_view


@click.command(short_help="Take the tour on a small model that it makes.", epilog=epilog("fp4conv demo"))
@click.argument("directory", metavar="[DIR]", required=False)
@json_option
def demo(directory: str | None, as_json: bool) -> None:
    """Take the tour: make a small gpt-oss checkpoint and convert BF16 -> MXFP4 -> NVFP4 and MXFP4 -> BF16.

    In DIR, or in a temporary folder that is removed at the end.
    """
    from fp4conv.commands.demo import demo as run

    announce_kernels(quiet=False)
    tour = run(directory, on_stop=lambda what: click.echo(f"{what} ...", err=True))
    if as_json:
        print_json(tour.to_json())
        return
    from fp4conv.report.terminal import tour_view

    print_view(tour_view(tour.source_bytes, [(stop.name, stop.exact, stop.result) for stop in tour.stops]))
    if directory:
        look = shlex.join(["fp4conv", "inspect", str(Path(directory) / "nvfp4")])
        click.echo(f"\nThe checkpoints are in {directory}. Look at one:  {look}")
