"""Every setting of `fp4conv qat`, once: its YAML (`settings_yaml`), its checks and the options derive from it.

Imports nothing heavy, so that the command line can ask it for the options. The defaults are the published recipe of
NVIDIA's gpt-oss example (docs/qat.md).
"""

from __future__ import annotations

import datetime
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Union, get_args, get_origin, get_type_hints

from fp4conv.errors import UsageError
from fp4conv.families import SCOPES
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.sizes import parse_size

if TYPE_CHECKING:
    from fp4conv.model import JSON

BACKENDS = ("modelopt", "fp4conv")
SHARDINGS = ("fsdp2", "zero3")
DTYPES = ("bfloat16", "float32")
PATHS = ("model", "dataset", "output")
SKIPPABLE = ("sft", "calibrate", "qat", "export", "evaluate")

T = TypeVar("T")


def _setting(
    default: T,
    section: str,
    words: str,
    *,
    choices: Iterable[str] = (),
    least: float | None = None,
    most: float | None = None,
) -> T:
    facts = {"section": section, "help": words, "choices": tuple(choices), "least": least, "most": most}
    made: T = field(default=default, metadata=facts)
    return made


@dataclass(frozen=True)
class Settings:
    """What a run does. None (null in YAML): the default that the comment names."""

    model: str | None = _setting(None, "What", "The model: a folder or a Hub id; BF16, or MXFP4/NVFP4, which is upcast")
    dataset: str | None = _setting(
        None,
        "What",
        "JSONL, parquet, a folder of them, or a Hub id, org/name[@revision]; with messages, prompt/completion or text",
    )
    format: str | None = _setting(None, "What", "The four-bit format to train for", choices=sorted(BLOCK_FORMATS))
    output: str | None = _setting(None, "What", "Where everything goes; the same command goes on where it stopped")
    skip: tuple[str, ...] = _setting((), "What", "Steps to leave out", choices=SKIPPABLE)

    subset: str | None = _setting(None, "Data", "Subset of a Hub dataset")
    train_split: str = _setting("train", "Data", "Split, or file stem, to train on")
    test_split: str = _setting("test", "Data", "Split, or file stem, held out; where there is none, see test_size")
    test_size: float = _setting(0.1, "Data", "Share held out of the training split where there is no test split")
    max_length: int = _setting(4096, "Data", "Longest example in tokens; what is longer is cut", least=2)
    chat_date: str | None = _setting(
        None, "Data", "What chat templates take for today, as 2026-01-31. Default: the day on which the run began"
    )
    packing: bool = _setting(False, "Data", "Pack short examples into sequences of max_length")

    sft_learning_rate: float | None = _setting(None, "SFT", "Default: 2e-5, with lora 2e-4")
    sft_epochs: float = _setting(1.0, "SFT", "Times through the data")
    sft_max_steps: int = _setting(-1, "SFT", "Stop after this many optimizer steps; -1: epochs decide")

    quant_cfg: str | None = _setting(
        None, "Quantisation", "A ModelOpt constant or recipe name. Default: weights only, those that modules selects"
    )
    modules: str | None = _setting(
        None, "Quantisation", "What is quantised. Default: experts for gpt-oss, all for others", choices=SCOPES
    )
    include: tuple[str, ...] = _setting((), "Quantisation", "Globs of modules to quantise too")
    exclude: tuple[str, ...] = _setting((), "Quantisation", "Globs of modules to leave dense")
    backend: str = _setting(
        "modelopt",
        "Quantisation",
        "Who quantises in training: modelopt needs CUDA, fp4conv runs anywhere",
        choices=BACKENDS,
    )
    calib_samples: int = _setting(128, "Quantisation", "Training examples that calibration sees", least=1)

    qat_learning_rate: float | None = _setting(None, "QAT", "Default: 1e-5, with lora 2e-4")
    qat_epochs: float = _setting(1.0, "QAT", "Times through the data")
    qat_max_steps: int = _setting(-1, "QAT", "Stop after this many optimizer steps; -1: epochs decide")

    batch_size: int = _setting(2, "Training", "Examples a device and step", least=1)
    gradient_accumulation: int = _setting(2, "Training", "Steps whose gradients are added up", least=1)
    scheduler: str = _setting("cosine_with_min_lr", "Training", "Learning-rate schedule, by transformers' name")
    min_lr_rate: float = _setting(
        0.1, "Training", "Floor of the cosine, as a share of the learning rate", least=0, most=1
    )
    warmup: float = _setting(
        0.03, "Training", "Warm-up: a share of the steps below 1, a number of steps from 1 on", least=0
    )
    weight_decay: float = _setting(0.0, "Training", "Weight decay of AdamW", least=0)
    max_grad_norm: float = _setting(1.0, "Training", "Gradients are clipped to this norm; 0: not at all", least=0)
    dtype: str = _setting("bfloat16", "Training", "Of the masters; float32 computes in BF16 on a GPU", choices=DTYPES)
    gradient_checkpointing: bool = _setting(True, "Training", "Recompute activations: less memory, more time")
    attn_implementation: str | None = _setting(
        None, "Training", "eager, sdpa, flash_attention_3, ... Default: eager for gpt-oss, else transformers' choice"
    )
    save_steps: int = _setting(100, "Training", "A checkpoint to go on from every so many steps", least=1)
    logging_steps: int = _setting(10, "Training", "A point of the loss curve every so many steps", least=1)
    seed: int = _setting(42, "Training", "Of data order, initialisation and dropout", least=0, most=2**32 - 1)

    lora: bool = _setting(False, "LoRA", "Train adapters, and merge them, in place of the whole model")
    lora_rank: int = _setting(8, "LoRA", "Rank", least=1)
    lora_alpha: float = _setting(16.0, "LoRA", "Alpha: the product is scaled by alpha / rank")
    lora_dropout: float = _setting(
        0.0, "LoRA", "Dropout; 0 where expert parameters or quantised layers are trained", least=0, most=1
    )
    lora_modules: tuple[str, ...] = _setting(
        ("all-linear",), "LoRA", "Linear layers by leaf name (q_proj), all-linear, or none"
    )
    lora_experts: bool = _setting(True, "LoRA", "Adapters on expert parameters too")
    lora_layers: tuple[int, ...] = _setting((), "LoRA", "Numbers of the layers that get adapters; none: all", least=0)

    gpus: int = _setting(1, "Machine", "GPUs of this node; with more than one, accelerate is launched", least=1)
    sharding: str = _setting("fsdp2", "Machine", "How several GPUs share the model", choices=SHARDINGS)

    layout: str | None = _setting(None, "Export", "Layout of the result, as convert's --layout")
    max_memory: str = _setting("4GB", "Export", "Memory of the conversions")

    eval_samples: int = _setting(512, "Evaluation", "Held-out examples that are evaluated, at most", least=1)
    eval_batch_size: int = _setting(8, "Evaluation", "Examples at a time", least=1)
    max_new_tokens: int = _setting(256, "Evaluation", "Longest answer that is generated", least=1)

    @property
    def sft_rate(self) -> float:
        return self.sft_learning_rate or (2e-4 if self.lora else 2e-5)

    @property
    def qat_rate(self) -> float:
        return self.qat_learning_rate or (2e-4 if self.lora else 1e-5)

    def values(self) -> dict[str, JSON]:
        """Every setting by name, as JSON has it."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class Preset:
    about: str
    values: Mapping[str, object]


PRESETS: Mapping[str, Preset] = {
    "gpt-oss-20b": Preset(
        "all parameters of gpt-oss-20b: SFT at 2e-5, then QAT at 1e-5, on 8 GPUs of 80 GB",
        {
            "model": "openai/gpt-oss-20b",
            "format": "mxfp4",
            "attn_implementation": "eager",
            "gpus": 8,
        },
    ),
    "gpt-oss-120b-lora": Preset(
        "adapters on gpt-oss-120b, experts too, at 2e-4, on 8 GPUs of 80 GB",
        {
            "model": "openai/gpt-oss-120b",
            "format": "mxfp4",
            "attn_implementation": "eager",
            "lora": True,
            "batch_size": 1,
            "gradient_accumulation": 2,  # 16 examples a step, as published, where one process has all GPUs
            "gpus": 8,
        },
    ),
    "small": Preset(
        "a model of up to about 2 billion parameters on one GPU of 80 GB",
        {
            "format": "nvfp4",
            "batch_size": 8,
            "gradient_accumulation": 1,
            "max_length": 2048,
            "gradient_checkpointing": False,
        },
    ),
}


def field_types() -> dict[str, object]:
    """Name of each setting -> its type, unions and all."""
    return get_type_hints(Settings)


def settings_from(*layers: Mapping[str, object], where: str = "settings") -> Settings:
    """Settings from mappings, the later ones on top. UsageError for an unknown key or a wrong value, by name."""
    made = Settings()
    for layer in layers:
        made = replace(made, **{key: checked(key, value, where) for key, value in layer.items()})  # type: ignore[arg-type]
    _check_together(made)
    return made


def preset(name: str) -> Mapping[str, object]:
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}", hint=f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name].values


def plain(value: object) -> JSON:
    """The value of a setting as JSON and YAML have it."""
    return list(value) if isinstance(value, tuple) else value  # type: ignore[return-value]


def checked(key: str, value: object, where: str) -> object:
    """`value` as the setting `key` has it; UsageError for an unknown key, another type or what is out of range."""
    known = {one.name: one for one in fields(Settings)}
    if key not in known:
        near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
        raise UsageError(
            f"there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            where=where,
            hint="fp4conv qat --print-config lists them all",
        )
    made = _typed(key, value, field_types()[key], where)
    _check_range(known[key], made, where)
    # No shell looks into a YAML file; trl would expand its own folder of checkpoints, and so take it out of `output`.
    home = key in PATHS and isinstance(made, str) and made.startswith("~/")
    return _expanded(key, str(made), where) if home else made


def _expanded(key: str, path: str, where: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise UsageError(f"{key} is {path}, and there is no home", where=where, hint="give the whole path") from error


def _typed(key: str, value: object, kind: object, where: str) -> object:
    """`value` as the type of the setting wants it; whole numbers do for fractions, one word for a list of one."""
    wanted = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in wanted:
        return None
    if str in wanted and isinstance(value, datetime.date):  # as YAML reads a date
        return value.isoformat()
    for one in wanted:
        if get_origin(one) is tuple:
            items = list(value) if isinstance(value, (list, tuple)) else [value]
            return tuple(_typed(key, item, get_args(one)[0], where) for item in items)
        if one is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if isinstance(one, type) and isinstance(value, one) and not (one is int and isinstance(value, bool)):
            return value
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    expected = " or ".join(names.get(one, "null") for one in wanted if isinstance(one, type))
    raise UsageError(f"{key} is {value!r}, expected {expected}", where=where)


def _check_range(one: Field[object], value: object, where: str) -> None:
    choices, least, most = (one.metadata[fact] for fact in ("choices", "least", "most"))
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item is not None and item not in choices:
            near = difflib.get_close_matches(str(item), choices, n=1)
            raise UsageError(
                f"{one.name} is {item!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                where=where,
                hint=f"choose one of {', '.join(choices)}",
            )
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str) or not isinstance(item, (int, float)):
            continue
        if not math.isfinite(item):
            raise UsageError(f"{one.name} is {item}, expected a finite number", where=where)
        if least is not None and item < least:
            raise UsageError(f"{one.name} is {item}, expected at least {least:g}", where=where)
        if most is not None and item > most:
            raise UsageError(f"{one.name} is {item}, expected at most {most:.10g}", where=where)


def _check_together(settings: Settings) -> None:
    if not 0 < settings.test_size < 1:
        raise UsageError(f"test_size is {settings.test_size}, expected a share between 0 and 1")
    for name in ("sft_learning_rate", "qat_learning_rate", "sft_epochs", "qat_epochs", "lora_alpha"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UsageError(f"{name} is {value}, expected more than 0")
    for name in ("sft_max_steps", "qat_max_steps"):
        value = getattr(settings, name)
        if value != -1 and value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1, or -1: epochs decide")
    if settings.chat_date is not None and not _is_day(settings.chat_date):
        raise UsageError(f"chat_date is {settings.chat_date!r}, expected a day such as 2026-01-31")
    parse_size(settings.max_memory)
    if settings.lora and settings.lora_dropout and settings.lora_experts:
        raise UsageError(
            "lora_dropout is set, but factors of expert parameters are added to the weights, where nothing drops out",
            hint="--lora-dropout 0, or --no-lora-experts",
        )


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
