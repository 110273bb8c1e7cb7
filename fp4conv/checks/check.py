"""The faults of one source, from its files to its values: what the parts of this room find, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from fp4conv.checks.agreement import agreement_faults, linear
from fp4conv.checks.architecture import odd_sizes, promised
from fp4conv.checks.claims import read_claims
from fp4conv.checks.structure import named_otherwise, structure_faults
from fp4conv.checks.tied import tied_bytes, tied_faults
from fp4conv.checks.values import bytes_to_read, value_faults
from fp4conv.checks.weights import Held, held_weights
from fp4conv.errors import SourceError
from fp4conv.families import EXCLUDED, FAMILIES, IN_OUT_MODEL_TYPES, UNKNOWN, Family, Role, family_of
from fp4conv.faults import Found, Kind
from fp4conv.layouts import PART_TABLES, parse, recognised
from fp4conv.layouts.completeness import check_size
from fp4conv.layouts.damaged import misnamed_experts
from fp4conv.layouts.hf import foreign_kind
from fp4conv.layouts.openai_original import with_hugging_face_names
from fp4conv.layouts.parts import INPUT_SCALE, PACKED
from fp4conv.model import JSON, Model, Source
from fp4conv.readings import Checkpoint
from fp4conv.servers import Artifact

_FOREIGN_LAYOUTS = ("fp8",)  # read by a parser of their own, whose first complaint is taken


@dataclass(frozen=True)
class Checked:
    """What was looked at. `model`: as a conversion would read it, None where it would not."""

    source: Source
    layout: str
    family: Family
    weights: tuple[Held, ...]
    config: Mapping[str, JSON]
    faults: tuple[Found, ...]
    model: Model | None
    known_type: bool

    @property
    def format_name(self) -> str:
        """The block formats of its quantised weights, or the dtype of most dense bytes."""
        quantized = {weight.format_name for weight in self.weights if weight.quantized}
        if quantized:
            return "+".join(sorted(quantized))
        return self.model.format_name if self.model else _main_dtype(self.weights)

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.format_name, self.layout, self.family.name)

    @property
    def artifact(self) -> Artifact:
        """As `servers.verdicts` asks of it."""
        quantized = [weight for weight in self.weights if weight.quantized and weight.shape]
        model_type = str(self.config.get("model_type") or "")
        ordinary = (self.layout == "openai-original" or bool(model_type)) and model_type not in IN_OUT_MODEL_TYPES
        ordinary &= not any(weight.role in EXCLUDED and weight.role is not Role.ABSORBED for weight in quantized)
        return Artifact(
            format=self.format_name,
            layout=self.layout,
            family=self.family.name if ordinary else "unknown",
            input_scales=any(INPUT_SCALE in weight.parts for weight in quantized),
            k_multiple=gcd(*(_k(weight, self.family) for weight in quantized)),
            model_type=model_type,
            quantised=frozenset(weight.module.rpartition(".")[2] for weight in quantized),
            dense_experts=any(w.role is Role.EXPERT and not w.quantized and linear(w) for w in self.weights),
        )


def _k(weight: Held, family: Family) -> int:
    assert weight.shape is not None
    return weight.shape[-2] if len(weight.shape) == 3 and family.experts_kn else weight.shape[-1]


def _main_dtype(weights: Sequence[Held]) -> str:
    sizes: dict[str, int] = {}
    for weight in weights:
        ref = weight.parts[PACKED]
        sizes[ref.spec.dtype] = sizes.get(ref.spec.dtype, 0) + ref.spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default="unknown").lower()


def check_structure(
    source: Source, *, lost: frozenset[str] = frozenset(), partial: bool = False, parsed: bool = True
) -> Checked:
    """Names, shapes, dtypes and configs of `source`; its headers are read, and no tensor.

    `lost`: names of tensors that its files should have and that could not be read; `partial`: files could not be
    read, so that what is missing says nothing. `parsed`: the conversion's own reader is asked too.
    """
    layout = recognised(source).name
    faults: list[Found] = []
    if layout == "hf" and (odd := _foreign(source)):
        return Checked(source, layout, UNKNOWN, (), {}, (odd,), None, known_type=False)
    named: Source = source
    if layout == "openai-original":
        try:
            named, _ = with_hugging_face_names(source)
        except SourceError as error:
            faults.append(_complaint(error, Kind.MISSING_TENSOR if partial else Kind.FOREIGN_FORMAT))
    config = named.json("config.json") or {}
    try:
        check_size(config)
    except SourceError as error:
        faults.append(Found(Kind.BAD_CONFIG, error.what, "the number of layers of a model", file="config.json"))
        config = {key: value for key, value in config.items() if key not in ("num_hidden_layers", "text_config")}
    for key in odd_sizes(config):
        found = f"{key} is {json.dumps(config[key])[:100]}"
        faults.append(Found(Kind.BAD_CONFIG, found, "a whole number", file="config.json"))
    family = _family(source, config)
    promise = promised(config)
    layers = promise.layers if promise else _layers(config)
    weights = held_weights(named.tensors, family, PART_TABLES.get(layout, ()), layers)
    misnamed = misnamed_experts(source.tensors)
    faults += _misnamed(source, misnamed)
    weights = tuple(weight for weight in weights if weight.name not in misnamed)
    absent = lost | set(misnamed.values())
    if not (faults and layout == "openai-original"):
        faults += structure_faults(weights, config, layout=layout, lost=absent, partial=partial)
    if layout not in _FOREIGN_LAYOUTS:
        configs = {name: source.json(name) for name in ("config.json", "hf_quant_config.json")}
        faults += agreement_faults(weights, read_claims(configs), layout, whole=not (lost or partial))
    model, complaint = _parsed(source, blank=not faults and not partial and not lost) if parsed else (None, [])
    faults += complaint
    known = promise is not None and not named_otherwise(weights, promise)
    return Checked(source, layout, family, weights, config, tuple(faults), model, known)


def _foreign(source: Source) -> Found | None:
    """A tensor of a quantised checkpoint of a kind that is not known here, and so is not checked."""
    for ref in source.tensors.values():
        if kind := foreign_kind(ref):
            expected = "BF16, F16, F32, MXFP4, NVFP4, or FP8 with a scale a tile"
            return Found(Kind.FOREIGN_FORMAT, f"a tensor of a {kind} checkpoint", expected, ref.name, ref.file)
    return None


def _family(source: Source, config: Mapping[str, JSON]) -> Family:
    """As the tensors tell; gpt-oss also by its config, since one that lacks tensors may not look like it."""
    if config.get("model_type") == "gpt_oss":
        return next(family for family in FAMILIES if family.name == "gpt-oss")
    return family_of(source.tensors)


def check_values(
    checked: Checked,
    *,
    chunk_bytes: int,
    workers: int,
    progress: Callable[[int], object] | None = None,
) -> list[Found]:
    """Block scales, scalars and dense values of what `check_structure` found."""
    with checked.source.reader() as reader:
        faults = value_faults(checked.weights, reader, chunk_bytes=chunk_bytes, workers=workers, progress=progress)
        tied = tied_faults(checked.weights, checked.config, reader, chunk_bytes=chunk_bytes, progress=progress)
        return [*faults, *tied]


def value_bytes(checked: Checked) -> int:
    """What `check_values` reads at the least."""
    return bytes_to_read(checked.weights) + tied_bytes(checked.weights, checked.config)


def _layers(config: Mapping[str, JSON]) -> int | None:
    stated = config.get("text_config")
    found = (stated if isinstance(stated, dict) else config).get("num_hidden_layers")
    return found if type(found) is int and found > 0 else None


def _misnamed(source: Source, misnamed: Mapping[str, str]) -> list[Found]:
    return [
        Found(
            Kind.MISNAMED_EXPERTS,
            f"{source.tensors[name].spec.dtype} {list(source.tensors[name].spec.shape)} under the name of packed codes",
            f"dense experts under the name {true}",
            name,
            source.tensors[name].file,
            true,
            experts=True,
        )
        for name, true in misnamed.items()
    ]


def _parsed(source: Source, *, blank: bool) -> tuple[Model | None, list[Found]]:
    """The model as a conversion reads it, and, where nothing else was found, what it complains of."""
    try:
        return parse(source), []
    except SourceError as error:
        return None, [_complaint(error, Kind.FOREIGN_FORMAT)] if blank else []


def _complaint(error: SourceError, kind: Kind) -> Found:
    where, _, file = (error.where or "").partition(" (")
    is_file = where.endswith((".json", ".safetensors", ".pth"))
    name, inside = (None, where) if is_file else (where or None, file.rstrip(")") or None)
    return Found(kind, error.what, "what a conversion can read", name, inside, name)
