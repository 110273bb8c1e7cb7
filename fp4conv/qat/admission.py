"""What would stop a run, found from config, headers and dataset: before the model is decoded, loaded or trained.

The model is made without its values, and its conversions are planned. What only ModelOpt can tell, a recipe of its own,
is left to the step that calibrates.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp4conv.errors import PlanError, SourceError, UsageError
from fp4conv.formats import NVFP4
from fp4conv.model import FLOAT_DTYPES, Model, Stored, Weight
from fp4conv.planner import Options, layout_for, make_plan
from fp4conv.qat.adapters import targets_of
from fp4conv.qat.modelopt_recipes import kv_cache_of, needs_examples
from fp4conv.qat.models import attention_of, check_tensors, empty_model, parsed, spread
from fp4conv.qat.placing import device_map, room
from fp4conv.qat.quantising import recipe_of
from fp4conv.qat.recipes import SCHEMES
from fp4conv.qat.steps import dense_format, needs_upcast, selection
from fp4conv.qat.targets import Target, checkpoint_modules, choose
from fp4conv.safetensors_io import TensorRef, TensorSpec
from fp4conv.selection import Selection

if TYPE_CHECKING:
    import transformers

    from fp4conv.layouts import Layout
    from fp4conv.qat.data import Data, Example
    from fp4conv.qat.settings import Settings

# Its masks are made without position_ids, from which others see where an example of a pack ends.
_MASKS_NO_PACKS = frozenset({"gpt_oss"})


def check_skipped(settings: Settings) -> None:
    """UsageError where the recipe has scales that only examples can tell, and calibration is skipped."""
    if "calibrate" not in settings.skip or settings.quant_cfg is None:
        return
    recipe = recipe_of(settings)
    scheme = SCHEMES.get(settings.quant_cfg.removesuffix(".yaml").removesuffix(".yml"))
    known = settings.format == NVFP4.name and scheme is not None and scheme.inputs
    if known or (settings.backend == "modelopt" and needs_examples(recipe)):
        raise UsageError(
            f"--skip calibrate, but {settings.quant_cfg} quantises inputs or the KV cache, whose scales calibration "
            "finds",
            hint="calibrate, or train weights only: leave --quant-cfg out",
        )


def check_sharing(settings: Settings) -> None:
    """UsageError for what several processes would train in another way than it is exported, or cannot start with."""
    if settings.gpus == 1:
        return
    if settings.dtype == "float32":
        raise UsageError(
            f"--dtype float32 with --gpus {settings.gpus}: several processes compute in BF16, so quantisers would see "
            "rounded weights, and the export would quantise others",
            hint="--dtype bfloat16, whose optimizer keeps float32 copies",
        )
    if settings.sharding == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "--sharding zero3 needs DeepSpeed, which is not installed",
            hint="DS_BUILD_OPS=0 pip install 'fp4conv[zero3]', or --sharding fsdp2",
        )


def check_counted_experts(model: Model, settings: Settings) -> None:
    """UsageError where ModelOpt would count the experts of a parameter that ZeRO-3 has cut up, and find none."""
    cut_up = settings.gpus > 1 and settings.sharding == "zero3" and "qat" not in settings.skip
    if cut_up and settings.backend == "modelopt" and model.family.name == "moe":
        raise UsageError(
            "--sharding zero3 with --backend modelopt: ModelOpt finds no experts in weights that ZeRO-3 has cut up",
            where=str(settings.model),
            hint="--sharding fsdp2, or --backend fp4conv",
        )


def check_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, source: Path) -> None:
    """SourceError where the tokenizer has no end of text."""
    if tokenizer.eos_token_id is None:
        raise SourceError(
            "its tokenizer names no end of text (eos_token): no answer could end",
            where=str(source),
            hint="add eos_token, and pad_token if there is one, to tokenizer_config.json",
        )


def check_packing(model: transformers.PreTrainedModel, settings: Settings) -> None:
    """PlanError where tokens of one packed example would attend to those of another."""
    kernel = attention_of(model.config, settings) or ""
    if settings.packing and model.config.model_type in _MASKS_NO_PACKS and "flash" not in kernel:
        raise PlanError(
            f"transformers' {model.config.model_type} masks by place alone, so that packed examples would see one "
            f"another under {kernel} attention",
            where=str(settings.model),
            hint="--no-packing, or a flash attention, which is told where examples end: "
            "--attn-implementation kernels-community/vllm-flash-attn3",
        )


def check_model(source: Path, settings: Settings, data: Data) -> None:
    """Raise what loading, training, LoRA and the export would of the model in `source`, in whatever format it is."""
    model, checkpoint = checked_model(source, settings), parsed(source)
    check_tensors(model, _as_loaded(checkpoint, settings), source)
    check_vocabulary(model, (*data.train, *data.test), settings)
    check_packing(model, settings)
    if spread(settings):
        device_map(model, getattr(torch, settings.dtype), room(settings.gpus, free=False))
    if settings.lora:
        targets_of(model, settings, ())
    layout = layout_for(str(settings.format), settings.layout, checkpoint.family)
    if settings.backend == "modelopt" and settings.quant_cfg is not None:
        _check_kv_cache(layout, settings)
        return
    chosen = choose(model, recipe_of(settings))
    _check_names(chosen, checkpoint)
    taken = selection(checkpoint, tuple(target.weight for target in chosen))
    make_plan(
        as_decoded(checkpoint, dense_format(settings)),
        Options(
            to=str(settings.format),
            layout=settings.layout,
            selection=Selection("all", taken.taken, taken.left),
            hints=False,
        ),
    )


def _check_kv_cache(layout: Layout, settings: Settings) -> None:
    """PlanError where training would quantise a KV cache whose scales the export has no place for."""
    if not layout.kv_scales and kv_cache_of(recipe_of(settings)) is not None:
        raise PlanError(
            f"{settings.quant_cfg} quantises the KV cache, and the {layout.name} layout has no place for its scales",
            where=str(settings.model),
            hint="--format nvfp4 with --layout modelopt has one; or choose a --quant-cfg without a KV cache",
        )


def _as_loaded(checkpoint: Model, settings: Settings) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that transformers will find, once the checkpoint is decoded where it must be."""
    if needs_upcast(checkpoint, settings):
        return {weight.name: weight.shape for weight in checkpoint.weights}
    return {name: ref.spec.shape for name, ref in checkpoint.source.tensors.items()}


def checked_model(source: Path, settings: Settings) -> transformers.PreTrainedModel:
    """The model without values. PlanError where transformers makes none, or one that generates no text."""
    from transformers import AutoConfig

    try:
        _check_causal(AutoConfig.from_pretrained(source, trust_remote_code=False), source)
        model = empty_model(source, settings)
    except (ImportError, KeyError, OSError, ValueError) as error:
        # transformers raises these for what it does not know, and for attention whose package is missing.
        raise PlanError(
            f"transformers cannot make this model: {(str(error).splitlines() or [''])[0]}",
            where=str(source),
            hint="look at config.json and --attn-implementation; code that comes with a model is not run",
        ) from error
    return model


def _check_causal(config: transformers.PreTrainedConfig, source: Path) -> None:
    """transformers makes a causal model of an encoder's config too, with a head that no checkpoint has."""
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    if names and not any(word in name for name in names for word in ("CausalLM", "LMHead", "ConditionalGeneration")):
        raise PlanError(
            f"is a {names[0]}; expected a causal language model, which generates text",
            where=str(source),
            hint="this takes models such as LlamaForCausalLM; to quantise this one as it is: fp4conv convert",
        )


def check_vocabulary(model: transformers.PreTrainedModel, examples: Sequence[Example], settings: Settings) -> None:
    """PlanError where the tokenizer gives a token that the model has no embedding of."""
    have = int(model.get_input_embeddings().weight.shape[0])
    largest = max(max(example.ids) for example in examples)
    if largest >= have:
        raise PlanError(
            f"its tokenizer gives token {largest}, and there are {have} embeddings",
            where=str(settings.model),
            hint="put the tokenizer of this very model into its folder",
        )


def _check_names(chosen: list[Target], checkpoint: Model) -> None:
    """Every quantised parameter is in the checkpoint, by its name: the export could not find another."""
    known = {weight.module for weight in checkpoint.weights}
    for target in chosen:
        for module in checkpoint_modules(target):
            if module not in known:
                raise PlanError(
                    f"transformers calls a layer {module}, and the checkpoint has none of that name",
                    where=checkpoint.source.name,
                    hint="this release of transformers names the modules of this model in another way than its "
                    "checkpoint; leave the layer out with --exclude 'GLOB'",
                )


def as_decoded(model: Model, dtype: str) -> Model:
    """What `model` will be once it is decoded to `dtype` (bf16, f32), to be planned with; its bytes do not exist."""

    def dense(weight: Weight) -> Weight:
        if isinstance(weight.value, Stored) and weight.value.ref.spec.dtype not in FLOAT_DTYPES:
            return weight
        spec = TensorSpec(dtype.upper(), weight.shape)
        return replace(weight, value=Stored(TensorRef(weight.name, weight.name, spec, 0)))

    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    weights = tuple(dense(weight) for weight in model.weights)
    return replace(model, layout="hf", weights=weights, config=config, calibration={}, trained={}, trained_kv={})
