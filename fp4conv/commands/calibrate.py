"""`calibrate`: what the inputs of a model reach over a dataset, as the file that `convert --input-scales` reads."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fp4conv.errors import OutputError, PlanError, UsageError
from fp4conv.layouts import parse
from fp4conv.model import JSON, Model, Stored
from fp4conv.qat.hub_data import pin_dataset
from fp4conv.qat.packages import check_packages
from fp4conv.qat.settings import Settings
from fp4conv.sources import folder_of, open_source
from fp4conv.version import __version__

_NEEDED = ("torch", "transformers", "datasets")


@dataclass(frozen=True)
class CalibrateResult:
    """`output`: the file. `inputs`, `kv`: how many amax of each kind are in it; over `samples` with `tokens`.

    `commits`: of model and dataset on the Hub, by 'org/name@revision' and 'datasets/org/name@revision'.
    """

    model: str
    dataset: str
    output: str
    inputs: int
    kv: int
    samples: int
    tokens: int
    seconds: float
    commits: Mapping[str, str]

    def to_json(self) -> dict[str, JSON]:
        return asdict(self)


def calibrate(
    model: str | Path,
    *,
    dataset: str | Path,
    output: str | Path,
    calib_samples: int = 128,
    max_length: int = 2048,
    train_split: str = "train",
    subset: str | None = None,
    kv_cache: bool = False,
    attn_implementation: str | None = None,
    overwrite: bool = False,
    tell: Callable[[int, int], None] | None = None,
) -> CalibrateResult:
    """Run the model in folder (or of Hub id) `model` over the first `calib_samples` examples, and write `output`.

        fp4conv.calibrate("my-llama", dataset="chats.jsonl", output="amax.safetensors")
        fp4conv.convert("my-llama", "my-llama-w4a4", to="nvfp4", input_scales="amax.safetensors")

    The file has an F32 [] '<module>.input_amax' for every layer that a conversion quantises by default, and with
    `kv_cache` '<k_proj>.k_amax' and '<v_proj>.v_amax'; its metadata say of what they are. Examples are rows of
    `dataset` as `qat` takes them, cut at `max_length` tokens. `tell(done, of)` is called after each. Raises the errors
    of fp4conv.errors.
    """
    target = Path(output)
    _check_output(target, overwrite)
    _check_apart(target, Path(model), Path(dataset))
    check_packages("calibration runs the model, and", _NEEDED)
    parsed = parse(open_source(model))
    _check_format(parsed, str(model))
    settings = Settings(
        model=str(model),
        dataset=str(dataset),
        train_split=train_split,
        subset=subset,
        calib_samples=calib_samples,
        max_length=max_length,
        attn_implementation=attn_implementation,
    )
    started = time.monotonic()
    commits = parsed.pins
    settings = pin_dataset(settings, commits)
    folder = folder_of(model, pins=commits)
    amax, samples, tokens = _observed(folder, settings, parsed, kv=kv_cache, tell=tell or (lambda done, of: None))
    facts: dict[str, JSON] = {"model": str(model), "dataset": str(dataset), "samples": samples, "tokens": tokens}
    _write(target, amax, {"by": f"fp4conv {__version__}", **facts, "commits": dict(commits)})
    inputs = sum(name.endswith(".input_amax") for name in amax)
    seconds = round(time.monotonic() - started, 3)
    return CalibrateResult(
        str(model), str(dataset), str(target), inputs, len(amax) - inputs, samples, tokens, seconds, commits
    )


def _observed(
    folder: Path, settings: Settings, parsed: Model, *, kv: bool, tell: Callable[[int, int], None]
) -> tuple[dict[str, float], int, int]:
    """(amax by name, examples, tokens)."""
    from fp4conv.qat.admission import check_vocabulary, checked_model
    from fp4conv.qat.calibrating import looked_at, observe, one_by_one
    from fp4conv.qat.data import first_examples
    from fp4conv.qat.models import load_model, load_tokenizer, quiet

    quiet()
    examples = first_examples(settings, load_tokenizer(folder), settings.calib_samples)
    if not examples:
        raise UsageError("no example has a token", where=str(settings.dataset))
    empty = checked_model(folder, settings)
    check_vocabulary(empty, examples, settings)
    _check_names(looked_at(empty), parsed)
    loaded = load_model(folder, settings)
    batches = one_by_one([example.ids for example in examples], loaded.device, tell)
    return observe(loaded, batches, kv=kv), len(examples), sum(len(example.ids) for example in examples)


def _check_output(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise OutputError(
            "is a folder, expected the name of a file", where=str(target), hint="such as amax.safetensors"
        )
    if target.exists() and not overwrite:
        raise OutputError("exists already", where=str(target), hint="give another name, or --overwrite")
    if not target.parent.is_dir():
        make = shlex.join(["mkdir", "-p", str(target.parent)])
        raise OutputError("its folder does not exist", where=str(target), hint=f"make it: {make}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror}", where=str(target), hint="give another FILE"
        ) from error


def _check_apart(target: Path, model: Path, dataset: Path) -> None:
    """OutputError where FILE would lie in what is only read: with --overwrite it would take the place of a shard."""
    place = target.parent.resolve() / target.name
    for path, what in ((model, "model"), (dataset, "dataset")):
        try:
            inside = path.exists() and place.is_relative_to(path.resolve())
        except OSError:
            continue  # a name that the system does not take: whoever opens it says so
        if inside:
            found = f"lies in the {what}" if path.is_dir() else f"is the {what}"
            raise OutputError(f"{found}, which is only read", where=str(target), hint="give another FILE")


def _check_format(model: Model, name: str) -> None:
    """transformers loads dense weights, and gpt-oss in MXFP4."""
    quantized = {weight.format_name for weight in model.weights if not isinstance(weight.base, Stored)}
    if quantized - ({"mxfp4"} if model.layout == "openai" else set()):
        raise PlanError(
            f"its weights are {' and '.join(sorted(quantized))}, which transformers does not run as they are",
            where=name,
            hint=f"calibrate the BF16 model; or upcast it first: fp4conv convert {shlex.quote(name)} DIR --to bf16",
        )


def _check_names(modules: Iterable[str], model: Model) -> None:
    """Every module is one of the checkpoint, by its name: else `convert` could not find it."""
    known = {weight.module for weight in model.weights}
    for module in modules:
        if module not in known:
            raise PlanError(
                f"transformers calls a layer {module}, and the checkpoint has none of that name",
                where=model.source.name,
                hint="this release of transformers names the modules of this model in another way than its checkpoint",
            )


def _write(target: Path, amax: dict[str, float], facts: Mapping[str, JSON]) -> None:
    from safetensors.numpy import save

    tensors = {name: np.asarray(value, np.float32) for name, value in sorted(amax.items())}
    said = {"fp4conv": json.dumps(facts)}  # under one key, for safetensors writes several in any order
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(save(tensors, said))
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot be written: {error.strerror}", where=str(target)) from error
