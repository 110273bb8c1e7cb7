"""`fp4conv verify`."""

from __future__ import annotations

import sys

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.options import json_option, memory_option, quiet_option, workers_option
from fp4conv.cli.output import Meter, print_json, print_view
from fp4conv.servers import SERVERS


@click.command(
    short_help="Check a checkpoint; say what servers make of it.",
    epilog=epilog("fp4conv verify gpt-oss-20b --for vllm", "fp4conv verify my-llama --source my-llama"),
)
@click.argument("src", metavar="SRC")
@click.option(
    "--for", "for_server", type=click.Choice(SERVERS), help="What this server would make of it, and no other."
)
@click.option(
    "--source", "original", metavar="ORIGINAL", help="What it was made from: was anything lost, and how much?"
)
@memory_option
@workers_option
@quiet_option
@json_option
def verify(src: str, *, quiet: bool, as_json: bool, **options: object) -> None:
    """Check the checkpoint in SRC: files, names, shapes, values, and whether configs and tensors agree.

    Every problem says what servers would make of it, and what to do. Exit 1 when one is an error. With --source,
    values are compared with those of ORIGINAL, in whatever format it is.
    """
    from fp4conv.commands.verify import verify as run

    with Meter(quiet) as meter:
        found = run(
            src,
            on_start=lambda nbytes: meter.start(nbytes, "verify", compiled=False),
            on_compare=lambda nbytes: meter.start(nbytes, "compare"),
            on_bytes=meter.advance,
            on_fetch=meter.downloaded,
            **options,  # type: ignore[arg-type]
        )
    if as_json:
        print_json(found.to_json())
    else:
        from fp4conv.report.verify_view import verify_view

        print_view(verify_view(found))
    if not found.ok:
        sys.exit(1)
