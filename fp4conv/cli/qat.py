"""`fp4conv qat`: its options are the settings, each once, as `fp4conv.qat.settings` lists them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import Field, fields
from typing import TypeVar, Union, get_args, get_origin

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.options import json_option, quiet_option
from fp4conv.cli.output import print_json, print_view, words
from fp4conv.commands.qat import PRESETS, Settings, field_types

F = TypeVar("F", bound=Callable[..., object])


def _options(command: F) -> F:
    """An option for each setting; what is not given stays out of the way of --config and --preset."""
    kinds = field_types()
    for one in reversed(fields(Settings)):
        if one.name != "model":
            command = _option(one, kinds[one.name])(command)
    return command


def _option(one: Field[object], kind: object) -> Callable[[F], F]:
    flag = f"--{one.name.replace('_', '-')}"
    inner = get_args(kind)[0] if get_origin(kind) in (Union, types.UnionType) else kind
    many = get_origin(inner) is tuple
    inner = get_args(inner)[0] if many else inner
    shown = ", ".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
    text = one.metadata["help"] + (". Repeatable" if many else "")
    text += "." if shown is None or shown in ("", False, True) else f" [{shown}]"
    if inner is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", one.name, default=None, help=text)
    if choices := one.metadata["choices"]:
        return click.option(flag, one.name, type=click.Choice(choices), multiple=many, default=None, help=text)
    made = click.INT if inner is int else click.FLOAT if inner is float else click.STRING
    return click.option(flag, one.name, type=made, multiple=many, default=None, help=text)


@click.command(
    short_help="Fine-tune and train for four bits, and export that.",
    epilog=epilog(
        "fp4conv qat gpt-oss-20b --dataset my.jsonl --format mxfp4 --output my-run",
        "fp4conv qat --preset gpt-oss-120b-lora --dataset my.jsonl --output my-run",
        "fp4conv qat --print-config --preset small",
    ),
)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--config", type=click.Path(dir_okay=False), metavar="FILE.yaml", help="Settings; options win over them.")
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), help="Settings to start from.")
@click.option("--print-config", "show", is_flag=True, help="Print the settings as YAML, with comments, and stop.")
@_options
@quiet_option
@json_option
def qat(model: str | None, **options: object) -> None:
    """Fine-tune MODEL, train it on for four bits (QAT), export what was trained, and compare.

    Steps: upcast, SFT, calibration, QAT, export, evaluation. Everything goes into the folder of --output; a run that
    was stopped goes on when the same command is given again. Needs: pip install 'fp4conv[qat]'.
    """
    run(model, **options)  # type: ignore[arg-type]


def run(
    model: str | None,
    *,
    config: str | None,
    preset_name: str | None,
    show: bool,
    quiet: bool,
    as_json: bool,
    **options: object,
) -> None:
    from fp4conv.commands import qat as command

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if show:
        chosen = {**given, **({} if model is None else {"model": model})}
        click.echo(command.print_config(command.settings_of(chosen, config=config, preset_name=preset_name)), nl=False)
        return
    tell = None if quiet else lambda line: click.echo(line, err=True)
    with redirect_stdout(sys.stderr):  # libraries print what they do
        report = command.qat(model, config=config, preset_name=preset_name, command=words(), tell=tell, **given)
    if as_json:
        print_json(report.to_json())
        return
    print_view(command.view(report))
    for made in command.results(report):
        click.echo(made)
