"""The steps of a run, each from folders into folders: upcast, sft, calibrate, qat, export. Each can be done again.

Owns what a step does, and no word of the order, the journal or the report (`run`). A conversion overwrites: what a
killed one left was made of files that may have been written again since, and could not be gone on with.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from fp4conv.commands.convert import convert
from fp4conv.companions import companion_files
from fp4conv.errors import PlanError, UsageError
from fp4conv.layouts.fakequant import input_targets, kv_target
from fp4conv.model import Stored
from fp4conv.qat import launch
from fp4conv.qat.backend import Batch
from fp4conv.qat.calibrating import one_by_one
from fp4conv.qat.checks import check_forward, check_saved, check_shared
from fp4conv.qat.converting import going_on, threads
from fp4conv.qat.data import load_data
from fp4conv.qat.in_force import check_in_force
from fp4conv.qat.models import free, load_model, load_tokenizer, parsed
from fp4conv.qat.quantising import backend_of, recipe_of
from fp4conv.qat.state import read_state
from fp4conv.qat.train import CHECKPOINTS, SAVED, Job, Trained
from fp4conv.sources import open_source

if TYPE_CHECKING:
    import torch

    from fp4conv.model import Model
    from fp4conv.qat.settings import Settings


@dataclass(frozen=True)
class Places:
    """Where the steps of the run in `root` put what they make."""

    root: Path

    @property
    def upcast(self) -> Path:
        return self.root / "upcast"

    @property
    def sft(self) -> Path:
        return self.root / "sft"

    @property
    def quantizers(self) -> Path:
        return self.root / "quantizers"

    @property
    def qat(self) -> Path:
        return self.root / "qat"

    @property
    def ptq(self) -> Path:
        return self.root / "ptq"

    @property
    def export(self) -> Path:
        return self.root / "export"


def dense_format(settings: Settings) -> str:
    return "bf16" if settings.dtype == "bfloat16" else "f32"


def needs_upcast(model: Model, settings: Settings) -> bool:
    """Whether transformers would not load the source as it is in the dtype of training, tensor for tensor."""
    return (
        model.layout != "hf"
        or model.format_name != dense_format(settings)
        or any(not isinstance(weight.value, Stored) for weight in model.weights)
    )


def upcast(source: str | Path, places: Places, settings: Settings) -> tuple[str, ...]:
    """Decode the model in `source`; returns what the conversion warns of."""
    return convert(
        source,
        places.upcast,
        to=dense_format(settings),
        hints=False,
        max_memory=settings.max_memory,
        workers=threads(parsed(source), settings, merges=False),
        overwrite=True,
    ).warnings


def sft(source: Path, places: Places, settings: Settings, *, quiet: bool = False) -> Trained:
    trained = launch.run(Job("sft", str(source), str(places.sft), quiet=quiet), settings)
    _keep(source, places.sft, settings)
    return trained


@dataclass(frozen=True)
class Calibrated:
    """`names`: the quantised parameters. `values`: how many were compared with the codec; equal but for `notes`."""

    names: tuple[str, ...]
    values: int
    notes: tuple[str, ...]


def calibrate(source: Path, places: Places, settings: Settings) -> Calibrated:
    """Fake quantisers for the model in `source`, with their amax, checked on its weights, into places.quantizers."""
    backend, recipe = backend_of(settings), recipe_of(settings)
    model = load_model(source, settings)
    model.eval()
    backend.prepare(model, recipe)
    if backend.calibrates(recipe):
        skipped = "calibrate" in settings.skip
        backend.calibrate(model, iter(()) if skipped else _calibration(source, settings, model.device))
    names = tuple(backend.names(model))
    if not names:
        raise PlanError(
            "nothing to quantise was found",
            where=str(settings.model),
            hint="name the modules with --modules or --include; list them with: fp4conv inspect SRC --headers-only",
        )
    check_shared(backend.quantized(model))
    report = check_forward(backend.quantized(model))
    backend.save(model, _anew(places.quantizers))
    check_in_force(model, backend, next(_calibration(source, settings, model.device)))
    del model
    free()
    return Calibrated(names, report.values, tuple(report.notes))


def _calibration(source: Path, settings: Settings, device: torch.device) -> Iterator[Batch]:
    """The first `calib_samples` training examples, on `device`."""
    examples = load_data(settings, load_tokenizer(source)).train[: settings.calib_samples]
    return one_by_one([example.ids for example in examples if example.ids], device)


def qat(source: Path, places: Places, settings: Settings, *, quiet: bool = False) -> Trained:
    trained = launch.run(Job("qat", str(source), str(places.qat), str(places.quantizers), quiet), settings)
    _keep(source, places.qat, settings)
    return trained


def _keep(source: Path, out: Path, settings: Settings) -> None:
    """Make out/model: what the trainer saved, or with LoRA the source with the adapter merged; compared by name."""
    model = out / "model"
    if not settings.lora:
        _put_files_of(source, out / SAVED)
    convert(
        source if settings.lora else out / SAVED,
        model,
        to=dense_format(settings),
        hints=False,
        max_memory=settings.max_memory,
        workers=threads(parsed(source), settings, merges=settings.lora),
        command=going_on(settings),
        overwrite=True,
        lora=[out / SAVED] if settings.lora else [],
        merge_rounding="training" if settings.lora else None,
    )
    check_saved(model, source)


def _put_files_of(source: Path, saved: Path) -> None:
    """Put config, tokenizer and other small files of `source` beside the tensors in `saved`, in place of its own.

    transformers writes them anew, as its release knows them and as training had them. Readers of earlier releases pass
    over the new names in silence: a `rope_theta` that moved into `rope_parameters` is 10,000 to them.
    """
    for file in saved.iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        elif ".safetensors" not in file.name:
            file.unlink()
    opened = open_source(source)
    for name in ("config.json", *(file.name for file in companion_files(opened, {})[0])):
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, saved / name)


def tidy(out: Path, settings: Settings) -> None:
    """Remove what nobody needs once a training step is done: checkpoints, and the model as the trainer saved it."""
    for name in (CHECKPOINTS, *(() if settings.lora else (SAVED,))):
        shutil.rmtree(out / name, ignore_errors=True)


def export(source: Path, places: Places, settings: Settings, names: tuple[str, ...]) -> tuple[str, ...]:
    """The real four-bit checkpoint of what was trained; of a source without quantisers (PTQ), by the same selection.

    Returns what the conversion warns of.
    """
    trained = source == places.qat / "model"
    if trained:
        shutil.copytree(places.quantizers, source, dirs_exist_ok=True)
    chosen = None if trained else selection(parsed(source), names)
    inputs = "stored" if trained else _input_scales(source, places)
    return quantise(source, places.export, str(settings.format), settings, chosen=chosen, input_scales=inputs)


def _input_scales(source: Path, places: Places) -> str:
    """The file of what calibration saw of inputs and of the KV cache, for `convert`; 'stored', where it saw nothing."""
    quantizers, buffers = read_state(places.quantizers)
    amax = {name: np.asarray(buffers[f"{name}._amax"]).reshape(()) for name in quantizers if f"{name}._amax" in buffers}
    modules = {weight.name: weight.module for weight in parsed(source).weights}
    found = {
        f"{modules[weight]}.input_amax": value
        for name, value in amax.items()
        for weight in input_targets(name, set(modules))
    }
    found |= {f"{kept}_amax": value for name, value in amax.items() if (kept := kv_target(name))}
    if not found:
        return "stored"
    file = places.quantizers / "inputs.safetensors"
    save_file(found, file)
    return str(file)


def quantise(
    source: Path, out: Path, to: str, settings: Settings, *, chosen: Selected | None, input_scales: str = "stored"
) -> tuple[str, ...]:
    """Convert the dense model in `source` to the block format `to`: what `chosen` says, or what training did.

    Returns what the conversion warns of.
    """
    return convert(
        source,
        out,
        to=to,
        layout=settings.layout if to == settings.format else None,
        modules="all" if chosen else None,
        include=chosen.taken if chosen else (),
        exclude=chosen.left if chosen else (),
        input_scales=input_scales,
        hints=False,
        max_memory=settings.max_memory,
        workers=threads(parsed(source), settings, merges=False),
        overwrite=True,
    ).warnings


@dataclass(frozen=True)
class Selected:
    """Modules that are quantised, and all other modules that have a matrix."""

    taken: tuple[str, ...]
    left: tuple[str, ...]


def selection(model: Model, names: tuple[str, ...]) -> Selected:
    """The modules of a checkpoint that the quantisers on parameters `names` lie on."""
    globs = [_module_glob(name) for name in names]
    matrices = [weight.module for weight in model.weights if weight.is_matrix]
    taken = [module for module in matrices if any(fnmatchcase(module, glob) for glob in globs)]
    if not taken:
        raise UsageError("none of the quantised parameters is in the checkpoint", where=model.source.name)
    return Selected(tuple(taken), tuple(sorted(set(matrices) - set(taken))))


def _module_glob(parameter: str) -> str:
    """'….experts.gate_up_proj' may be a module an expert in the checkpoint; a linear layer's name is its own."""
    path, _, leaf = parameter.rpartition(".")
    return path if leaf == "weight" else f"{path}.*"


def _anew(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
