"""`fp4conv convert`."""

from __future__ import annotations

import time

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.options import json_option, memory_option, workers_option
from fp4conv.cli.output import Meter, print_json, print_view, warn, words
from fp4conv.families import SCOPES
from fp4conv.formats import TARGETS, MergeRounding, ScaleRule, Ties
from fp4conv.servers import SERVERS

_RULES = [rule.value for rule in ScaleRule]


@click.command(
    short_help="Convert a checkpoint to another number format.",
    epilog=epilog(
        "fp4conv convert openai/gpt-oss-20b gpt-oss-20b-bf16 --to bf16",
        "fp4conv convert openai/gpt-oss-20b --to nvfp4 --stream --push-to-hub my-org/oss-nvfp4",
        "fp4conv convert my-llama my-llama-nvfp4 --to nvfp4 --dry-run",
        "fp4conv convert my-llama my-llama-tuned --to bf16 --lora my-llama-lora",
    ),
)
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="[DST]", required=False)
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
@memory_option
@workers_option
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
@click.option(
    "--stream",
    is_flag=True,
    help="Keep no copy of a SRC on the Hub: each file goes when nothing needs it any longer. With --push-to-hub the "
    "files of the result go too, when they are there: then no DST is needed, and nothing stays.",
)
@click.option(
    "--max-disk",
    metavar="SIZE",
    help="With --stream: the most that SRC and DST take on the disk together. --dry-run says the least that works.",
)
@click.option("--push-to-hub", metavar="REPO", help="Publish the result in this repository on the Hub, whole or not.")
@click.option("--private", is_flag=True, help="With --push-to-hub: make the repository private.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace DST, and the model in REPO; the old one stays until the new one is whole.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing.")
@click.option("--quiet", is_flag=True, help="No progress and no warnings.")
@json_option
def convert(src: str, dst: str | None, **options: object) -> None:
    """Convert the checkpoint in SRC into DST, shard by shard, within a fixed memory.

    SRC is a folder, or a repository on the Hub: org/name, org/name@revision, hf://org/name/folder. Its files are
    downloaded while others are converted.

    A run that was stopped goes on when the same command is given again.
    """
    run(src, dst, **options)  # type: ignore[arg-type]


def run(src: str, dst: str | None, *, dry_run: bool, quiet: bool, as_json: bool, **options: object) -> None:
    from fp4conv.commands import convert as command

    if dry_run:
        _dry_run(src, dst, as_json, quiet, options)
        return
    with Meter(quiet) as meter:
        result = command.convert(
            src,
            dst,
            command=words(),
            on_plan=meter.plan,
            on_bytes=meter.advance,
            on_resume=meter.resume,
            on_fetch=meter.fetched,
            on_upload=meter.uploaded,
            on_note=meter.note,
            **options,  # type: ignore[arg-type]
        )
    if as_json:
        print_json(result.to_json())
        return
    from fp4conv.report.terminal import convert_view

    print_view(convert_view(result))
    warn(result.warnings, quiet)


def _dry_run(src: str, dst: str | None, as_json: bool, quiet: bool, options: dict[str, object]) -> None:
    from fp4conv.commands import convert as command
    from fp4conv.commands.fetching import Fetching
    from fp4conv.commands.publishing import Push, check_not_source, check_repository, place_of
    from fp4conv.plan import peak_bytes
    from fp4conv.report.terminal import plan_view

    started = time.monotonic()
    threads, memory = command.resources(options.pop("workers"), options.pop("max_memory"))  # type: ignore[arg-type]
    overwrite, stream = bool(options.pop("overwrite")), bool(options.pop("stream"))
    max_disk: str | None = options.pop("max_disk")  # type: ignore[assignment]
    repo: str | None = options.pop("push_to_hub")  # type: ignore[assignment]
    push = Push.of(repo, private=bool(options.pop("private")), overwrite=overwrite, stream=stream)
    place = place_of(dst, push)
    plan = command.plan_conversion(src, **options)  # type: ignore[arg-type]
    bound = peak_bytes(plan, memory, threads)
    fetching = Fetching.of(plan, stream=stream, max_disk=max_disk, published=push is not None)
    command.check_destination(
        plan,
        place,
        command=words("--dry-run"),
        repair=bool(options["repair"]),
        hints=bool(options["hints"]),
        overwrite=overwrite,
    )
    if push is not None:
        check_not_source(push, plan)
        check_repository(push)
    result = command.dry_run_result(plan, place, time.monotonic() - started, bound, fetching)
    if as_json:
        print_json(result.to_json())
        return
    assert result.forecast is not None, "a dry run has one"
    print_view(plan_view(plan, forecast=result.forecast, publish=push.url if push else ""))
    warn(plan.warnings, quiet)
