"""`fp4conv inspect`."""

from __future__ import annotations

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.output import Meter, print_json, print_view
from fp4conv.formats import BLOCK_FORMATS


@click.command(
    epilog=epilog(
        "fp4conv inspect gpt-oss-20b --headers-only",
        "fp4conv inspect my-llama-fp4 --reference my-llama --sort sqnr",
        "fp4conv inspect my-llama-fp4 --reference my-llama --html my-llama.html",
        "fp4conv inspect my-llama --as nvfp4",
    )
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
    type=click.Choice(["name", "format", "bytes", "bits", "sqnr"]),
    default="name",
    help="Order of the table; sqnr: the worst first.",
)
@click.option("--headers-only", is_flag=True, help="Read headers and configs, no values.")
@click.option("--html", metavar="FILE", help="Write all of it as one page that opens without a network, too.")
@click.option("--max-memory", default="1GB", metavar="SIZE", show_default=True, help="Bound of resident memory.")
@click.option("--workers", type=int, help="Threads. Default: the cores of this machine.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def inspect(
    src: str,
    *,
    reference: str | None,
    estimate: tuple[str, ...],
    tensor: str | None,
    sort: str,
    headers_only: bool,
    html: str | None,
    max_memory: str,
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show what the checkpoint in SRC holds: formats, sizes, scales, codes, and what quantisation cost or would cost.

    Values are streamed within --max-memory. Tensors that differ in layer and expert numbers alone share a line, with
    their figures taken together; --tensor and --json list each.
    """
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
        )
    if html is not None and not quiet:
        click.echo(f"written: {html}", err=True)
    if as_json:
        print_json(found.to_json())
        return
    from fp4conv.report.facts import fold
    from fp4conv.report.terminal import inspect_view

    rows = found.tensors if tensor else fold(found.tensors)
    keys = {
        "format": lambda row: row.format,
        "bytes": lambda row: -row.bytes,
        "bits": lambda row: row.bits_per_weight,
        "sqnr": lambda row: row.error.sqnr_db if row.error else float("inf"),
    }
    print_view(inspect_view(found, sorted(rows, key=keys[sort]) if sort in keys else rows, by_layer=sort == "name"))
