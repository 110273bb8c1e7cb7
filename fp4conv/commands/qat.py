"""`qat`: fine-tune a model, train it on for four bits, export what was trained, and say what it is worth.

Nothing of torch is imported before the words of the command were looked at.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.qat.settings import PRESETS, Settings, field_types, preset, settings_from

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fp4conv.qat.report import Report

__all__ = ["PRESETS", "Settings", "field_types", "print_config", "qat", "results", "settings_of", "view"]


def qat(
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    preset_name: str | None = None,
    command: str | None = None,
    tell: Callable[[str], None] | None = None,
    **options: object,
) -> Report:
    """Upcast, fine-tune, calibrate, train with fake quantisers, export and evaluate, into the folder `output`.

        report = fp4conv.qat("gpt-oss-20b", dataset="my.jsonl", format="mxfp4", output="my-run")

    `options` are the settings (fp4conv.qat.settings), those of the YAML file `config` and of the preset beneath. A run
    that was stopped goes on when called again with the same settings. `tell` gets a line at each step, and training
    shows its progress on standard error; without it nothing is shown. Raises the errors of fp4conv.errors; those of
    settings, dataset, memory and missing packages before a model is loaded.
    """
    from fp4conv.qat.run import run

    words = {**options, **({} if model is None else {"model": str(model)})}
    settings = settings_of(words, config=config, preset_name=preset_name)
    return run(settings, command or _command_line(words, config, preset_name), tell)


def settings_of(
    options: Mapping[str, object], *, config: str | Path | None = None, preset_name: str | None = None
) -> Settings:
    """The settings: defaults, under the preset, under the YAML file, under `options`."""
    layers: list[Mapping[str, object]] = [preset(preset_name)] if preset_name else []
    if config is not None:
        from fp4conv.qat.settings_yaml import read_yaml

        layers.append(read_yaml(Path(config)))
    return settings_from(*layers, options)


def print_config(settings: Settings) -> str:
    """`settings` as a YAML file with comments."""
    from fp4conv.qat.settings_yaml import to_yaml

    return to_yaml(settings)


def view(report: Report) -> RenderableType:
    from fp4conv.qat.report import view as made

    return made(report)


def results(report: Report) -> list[str]:
    """Where the checkpoint to serve and the page to look at lie, a line each, of those that were made."""
    from fp4conv.qat.steps import Places
    from fp4conv.qat.written import REPORT_HTML

    places = Places(Path(str(report.settings.output)))
    made = {"checkpoint": places.export, "page": places.root / REPORT_HTML}
    return [f"{what}: {path}" for what, path in made.items() if path.exists()]


def _command_line(options: Mapping[str, object], config: str | Path | None, preset_name: str | None) -> str:
    """The words of the command that does the same as this call."""
    words = ["fp4conv", "qat", *([str(options["model"])] if "model" in options else [])]
    beneath = {"preset": preset_name, "config": config}
    given = {**{name: value for name, value in beneath.items() if value is not None}, **options}
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name != "model" and value is not None:
            several = value if isinstance(value, (list, tuple)) else [value]
            words += [word for each in several for word in (f"--{flag}", str(each))]
    return shlex.join(words)
