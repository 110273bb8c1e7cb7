"""Models and tokenizers from folders, and how much memory training one takes."""

from __future__ import annotations

import copy
import gc
import os
import types
import warnings
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp4conv.commands.convert import peak_rss_bytes
from fp4conv.errors import PlanError, SourceError
from fp4conv.families import SCOPES
from fp4conv.qat.placing import device_map, room, run_where_they_lie
from fp4conv.sizes import format_size
from fp4conv.sources import open_source

if TYPE_CHECKING:
    import transformers

    from fp4conv.model import Model
    from fp4conv.qat.settings import Settings

_EAGER = frozenset({"gpt_oss"})  # its attention sinks are learned with eager attention, as the published recipe does


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in `folder`, with a token to pad with; SourceError where there is none that transformers reads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"has no tokenizer that transformers reads: {(str(error).splitlines() or [''])[0]}",
            where=str(folder),
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, settings: Settings) -> transformers.PreTrainedModel:
    """The model in `folder`, in the dtype and with the attention of `settings`.

    A lone process has it on `device()`, or with `--gpus N` over those GPUs; of several that train together, each as
    the way of sharing wants it. MXFP4 is decoded by transformers as it loads; other block formats are not read here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    decoded = {"quantization_config": Mxfp4Config(dequantize=True)} if method == "mxfp4" else {}
    dtype = getattr(torch, settings.dtype)
    places = None
    if spread(settings):
        places = device_map(empty_model(folder, settings), dtype, room(settings.gpus, free=True))
    options = {"config": config, "dtype": dtype, "attn_implementation": attention_of(config, settings)}
    if is_given_its_part():
        model = type(empty_model(folder, settings)).from_pretrained(None, state_dict={}, **options)
    else:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, device_map=places, trust_remote_code=False, output_loading_info=True, **options, **decoded
        )
        if not distributed():  # what the others of several processes do not read is no fault of the checkpoint
            check_loaded(found, folder)
    model.config.use_cache = False
    if settings.dtype == "float32":
        # What transformers decodes from four bits is BF16 whatever was asked for; every value fits.
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    if places is not None:
        run_where_they_lie(model, places)
        return model
    return model if distributed() else model.to(device())


def check_loaded(found: Mapping[str, Collection[str]], folder: Path) -> None:
    """SourceError for tensors that transformers made up for want of them, or passed over, in silence.

    `found`: its loading info. A head that is the embedding is in neither list.
    """
    for key, what in (
        ("missing_keys", "is not in the checkpoint, and transformers would train random values in its place"),
        ("unexpected_keys", "is in the checkpoint, and transformers has no place for it: it would be lost"),
    ):
        if names := sorted(found.get(key, ())):
            raise SourceError(
                f"{what} (one of {len(names)})",
                where=f"{names[0]} ({folder})",
                hint="look at the checkpoint with fp4conv verify; another release of transformers may know the model",
            )


def check_tensors(model: transformers.PreTrainedModel, tensors: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """SourceError for what `load_model` would not find in a dense checkpoint, or would find of another shape.

    `model`: made without values. `tensors`: name -> shape, as the checkpoint has them. transformers loads tensors
    without values in their place, so that it renames and joins them as it will.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        state = {name: torch.empty(shape, dtype=model.dtype) for name, shape in tensors.items()}
    _, found = _own_loader(type(model))(
        None,
        config=config,
        state_dict=state,
        dtype=model.dtype,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_loaded(found, folder)
    for name, stored, expected in sorted(found.get("mismatched_keys", ())):
        raise SourceError(
            f"has shape {list(stored)}, expected {list(expected)} (one of {len(found['mismatched_keys'])})",
            where=f"{name} ({folder})",
            hint="config.json is that of another model, or the checkpoint is damaged: look with fp4conv verify",
        )


def _own_loader(kind: type[transformers.PreTrainedModel]) -> Callable[..., Any]:
    """transformers' own `from_pretrained`: over it ModelOpt's trainer lays one that wants a folder."""
    kept = getattr(kind, "_modelopt_cache", {}).get("from_pretrained")
    return kind.from_pretrained if kept is None else types.MethodType(kept.__func__, kind)


def attention_of(config: transformers.PreTrainedConfig, settings: Settings) -> str | None:
    """What transformers is told; None: its own choice."""
    return settings.attn_implementation or ("eager" if config.model_type in _EAGER else None)


def empty_model(folder: Path, settings: Settings) -> transformers.PreTrainedModel:
    """The model that the config in `folder` describes, without values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model: transformers.PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention_of(config, settings), trust_remote_code=False
        )
    return model


def spread(settings: Settings) -> bool:
    """Whether this process alone has a model over several GPUs."""
    return settings.gpus > 1 and torch.cuda.is_available() and not distributed()


def quiet() -> None:
    """One bar for training is enough: the libraries' own go, and what they tell one another of names to come."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|transformers)\b")


def distributed() -> bool:
    """Whether this process is one of those that `launch` started, which share a model."""
    shared = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or any(os.environ.get(name) == "true" for name in shared)


def is_given_its_part() -> bool:
    """Whether this process reads no weights: under FSDP the first one reads them, and gives the others their parts."""
    from transformers.integrations import is_fsdp_enabled

    return bool(is_fsdp_enabled()) and os.environ.get("LOCAL_RANK") != "0"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free() -> None:
    """Give back what models that are gone have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_peak() -> None:
    """Let `peak_bytes` begin anew, where the device can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The most that was held on the GPU since `forget_peak`, or without one by this process since it began."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_rss_bytes()


def training_bytes(parameters: int, settings: Settings) -> int:
    """What training takes at the least, over all devices: masters, and with all parameters trained gradients and Adam.

    Activations come on top, and depend on max_length and batch_size.
    """
    if settings.lora:
        return parameters * (2 if settings.dtype == "bfloat16" else 4)
    return parameters * 16  # BF16: weight and gradient, and the optimizer's three in float32; float32: all four


def kept_bytes(model: Model, settings: Settings) -> int:
    """What each device holds from a forward pass to its backward pass, at the least: fake-quantised weights, whole.

    They are made on every device, however the masters are shared. Where layers are recomputed, one has them at a time.
    """
    chosen_otherwise = settings.quant_cfg or settings.include or settings.exclude
    if settings.gradient_checkpointing or "qat" in settings.skip or chosen_otherwise:
        return 0
    roles = SCOPES[settings.modules or model.family.scope]
    return 2 * sum(prod(weight.shape) for weight in model.weights if weight.is_matrix and weight.role in roles)


def host_bytes(parameters: int, settings: Settings) -> int:
    """What the first of several processes has in the machine's memory: all weights, FSDP's trained ones in float32."""
    wide = settings.dtype == "float32" or (settings.sharding == "fsdp2" and not settings.lora)
    return parameters * (4 if wide else 2)


def check_memory(model: Model, settings: Settings) -> None:
    """PlanError where the machine has less memory than training takes at the least."""
    parameters = sum(prod(weight.shape) for weight in model.weights)
    needed = training_bytes(parameters, settings) + settings.gpus * kept_bytes(model, settings)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        have = sum(torch.cuda.get_device_properties(i).total_memory for i in range(settings.gpus))
        place = f"{settings.gpus} GPU{'s' if settings.gpus > 1 else ''}"
    else:
        have, place = machine, "this machine"
    if needed > have:
        ways = [] if settings.gradient_checkpointing else ["--gradient-checkpointing"]
        ways += [] if settings.lora else ["--lora trains adapters alone"]
        ways += ["--gpus N shares the model among more GPUs"]
        raise PlanError(
            f"training takes at least {format_size(needed)} (masters, gradients, optimizer), {place} "
            f"{'have' if settings.gpus > 1 else 'has'} {format_size(have)}",
            where=str(settings.model),
            hint="; ".join(ways),
        )
    if settings.gpus > 1 and host_bytes(parameters, settings) > machine:
        raise PlanError(
            f"the process that reads the model takes at least {format_size(host_bytes(parameters, settings))} of the "
            f"machine's memory, which is {format_size(machine)}",
            where=str(settings.model),
            hint="--lora or --sharding zero3 take half of what FSDP2 with all parameters does; or a larger machine",
        )


def parsed(folder: Path | str) -> Model:
    from fp4conv.layouts import parse

    return parse(open_source(folder))
