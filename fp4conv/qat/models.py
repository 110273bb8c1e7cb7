"""Models and tokenizers from folders, and how much memory training one takes."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp4conv.errors import PlanError, SourceError
from fp4conv.sizes import format_size
from fp4conv.sources import open_source

if TYPE_CHECKING:
    import transformers

    from fp4conv.model import Model
    from fp4conv.qat.settings import Settings

_EAGER = frozenset({"gpt_oss"})  # its attention sinks are learned with eager attention, as the published recipe does


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in `folder`, which pads on the right; SourceError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"has no tokenizer that transformers reads: {str(error).splitlines()[0]}",
            where=str(folder),
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, settings: Settings) -> transformers.PreTrainedModel:
    """The model in `folder`, in the dtype and with the attention of `settings`, on `device()` in a lone process.

    MXFP4 is decoded by transformers as it loads; other block formats are not read here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    decoded = {"quantization_config": Mxfp4Config(dequantize=True)} if method == "mxfp4" else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, settings.dtype), attn_implementation=attention_of(config, settings), **decoded
    )
    model.config.use_cache = False
    if settings.dtype == "float32":
        # What transformers decodes from four bits is BF16 whatever was asked for; every value fits.
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    return model if distributed() else model.to(device())


def attention_of(config: transformers.PreTrainedConfig, settings: Settings) -> str | None:
    """What transformers is told; None: its own choice."""
    return settings.attn_implementation or ("eager" if config.model_type in _EAGER else None)


def quiet() -> None:
    """One bar for training is enough: the libraries' own go."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def distributed() -> bool:
    """Whether this process is one of several that accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free() -> None:
    """Give back what models that are gone have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Fills in `bytes` at the end: the most that was held on the GPU inside, or else by this process so far."""
    import resource

    found: dict[str, int] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield found
    if torch.cuda.is_available():
        found["bytes"] = int(torch.cuda.max_memory_allocated())
    else:
        found["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def training_bytes(parameters: int, settings: Settings) -> int:
    """What training takes at the least, over all devices: masters, and with all parameters trained gradients and Adam.

    Activations come on top, and depend on max_length and batch_size.
    """
    if settings.lora:
        return parameters * (2 if settings.dtype == "bfloat16" else 4)
    return parameters * 16  # BF16: weight and gradient, and the optimizer's three in float32; float32: all four


def check_memory(model: Model, settings: Settings) -> None:
    """PlanError where the machine has less memory than training takes at the least."""
    needed = training_bytes(sum(prod(weight.shape) for weight in model.weights), settings)
    if torch.cuda.is_available():
        have = sum(torch.cuda.get_device_properties(i).total_memory for i in range(settings.gpus))
        place = f"{settings.gpus} GPU{'s' if settings.gpus > 1 else ''}"
    else:
        have, place = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    if needed > have:
        ways = [] if settings.lora else ["--lora trains adapters alone"]
        ways += ["--gpus N shares the model among more GPUs"]
        raise PlanError(
            f"training takes at least {format_size(needed)} (masters, gradients, optimizer), {place} "
            f"{'have' if settings.gpus > 1 else 'has'} {format_size(have)}",
            where=str(settings.model),
            hint="; ".join(ways),
        )


def parsed(folder: Path | str) -> Model:
    from fp4conv.layouts import parse

    return parse(open_source(folder))
