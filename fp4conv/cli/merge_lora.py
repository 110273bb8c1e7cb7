"""`fp4conv merge-lora`: convert, said in another way."""

from __future__ import annotations

import click

from fp4conv.cli.convert import convert, run
from fp4conv.cli.group import epilog
from fp4conv.formats import TARGETS


@click.command(
    "merge-lora",
    short_help="Merge a LoRA adapter into a checkpoint.",
    epilog=epilog("fp4conv merge-lora gpt-oss-20b my-gpt-oss-lora gpt-oss-20b-tuned"),
)
@click.argument("base", metavar="BASE")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("dst", metavar="[DST]", required=False)
@click.option("--to", type=click.Choice(TARGETS), help="Number format of the result. Default: that of BASE.")
@click.option(
    "--layout",
    metavar="NAME",
    help="hf, openai, openai-original, modelopt or compressed-tensors. Default: what servers expect, but "
    "compressed-tensors for an NVFP4 BASE in it, unless --for is given.",
)
def merge_lora(
    base: str, adapter: str, dst: str | None, *, to: str | None, layout: str | None, **options: object
) -> None:
    """Merge the LoRA adapter in ADAPTER into the checkpoint in BASE, and write DST.

    The same as convert BASE DST --lora ADAPTER, in BASE's own format unless --to is given. What the adapter does
    not touch is copied as it is.
    """
    from fp4conv.commands.merge_lora import as_base

    to, layout = as_base(base, to, layout, options["for_server"])
    run(base, dst, lora=(adapter,), to=to, layout=layout, **options)  # type: ignore[arg-type]


_OWN = ("src", "dst", "to", "layout", "lora")  # what merge-lora spells in its own way
merge_lora.params += [parameter for parameter in convert.params if parameter.name not in _OWN]
