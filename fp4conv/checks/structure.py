"""Is every tensor there that the config promises, in the right shape, and nothing else? From headers and configs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from fp4conv.checks.architecture import Promise, promised
from fp4conv.checks.weights import Held, Shape, by_name
from fp4conv.families import Role
from fp4conv.faults import Found, Kind
from fp4conv.formats import MXFP4
from fp4conv.layouts.completeness import Gap, gaps
from fp4conv.layouts.parts import BLOCK_SCALE, PACKED
from fp4conv.model import JSON

# Tensors beside the weights, known and harmless: rotary tables, masks, scales of KV caches and
# of FP8, quantisers of training.
_BESIDE = (".inv_freq", ".masked_bias", ".k_scale", ".v_scale", ".q_scale", ".weight_scale_inv")
_FLOATS = ("BF16", "F16", "F32", "F64")
_MOST_GAPS = 1_000  # a config may say any number of experts
_LAYER = re.compile(r"model\.layers\.[0-9]+(?=\.)")
_QUANTIZER = "_quantizer"


def structure_faults(
    weights: Sequence[Held],
    config: Mapping[str, JSON],
    *,
    layout: str,
    lost: frozenset[str] = frozenset(),
    partial: bool = False,
) -> Iterator[Found]:
    """`lost`: names of tensors that are reported otherwise; `partial`: what is missing says nothing."""
    for weight in weights:
        if layout != "modelopt" or not _is_turned_mxfp4(weight):
            yield from (fault for fault in weight.faults if not _said_otherwise(fault, lost, partial=partial))
    yield from _without_reader(weights, layout)
    yield from _stored_twice(weights)
    yield from _no_floats(weights)
    promise = promised(config)
    if promise is None or named_otherwise(weights, promise):
        found = gaps([_bare(weight) for weight in weights], config)
        yield from _gap_faults([] if partial else islice(found, _MOST_GAPS))
        return
    held = by_name(weights)
    gone = {_canonical(name) for name in lost}
    if not partial:
        yield from _missing(promise, held, gone)
    yield from _strange(promise, weights)
    yield from _misshapen(promise, held)


def named_otherwise(weights: Sequence[Held], promise: Promise) -> bool:
    """Whether tensors go by names that no table has: within another model, or with experts fused into one tensor."""
    if promise.model_type != "gpt_oss" and any(weight.name.endswith("experts.gate_up_proj") for weight in weights):
        return True
    inner = [weight.name for weight in weights if ".layers." in weight.name]
    return bool(inner) and not any(name.startswith("model.layers.") for name in inner)


def _said_otherwise(fault: Found, lost: frozenset[str], *, partial: bool) -> bool:
    """Whether a part is missing because its file could not be read."""
    return fault.kind is Kind.INCOMPLETE_WEIGHT and (partial or fault.name in lost)


def _bare(weight: Held) -> tuple[str, Role]:
    return weight.name, weight.role


def _without_reader(weights: Sequence[Held], layout: str) -> Iterator[Found]:
    """MXFP4 as ModelOpt's export names it, which no server reads; said once, since all of it is so."""
    odd = [weight for weight in weights if layout == "modelopt" and weight.table and weight.table.format is MXFP4]
    turned = [weight for weight in weights if layout == "modelopt" and _is_turned_mxfp4(weight)]
    if odd or turned:
        found = f"{len(odd) + len(turned)} weights in MXFP4 in ModelOpt's layout"
        expected = "compressed-tensors for linear layers, OpenAI's own layout for gpt-oss"
        if turned:
            found += ", with blocks along the out-features of experts"
            expected = "OpenAI's own layout, with blocks along the in-features"
        ref = (turned or odd)[0].parts[BLOCK_SCALE]
        yield Found(Kind.NO_READER, found, expected, ref.name, ref.file, places=len(odd) + len(turned))


def _stored_twice(weights: Sequence[Held]) -> Iterator[Found]:
    """Weights that are there dense and in codes, or in codes of two kinds."""
    first: dict[str, Held] = {}
    for weight in weights:
        other = first.setdefault(weight.name, weight)
        if other is not weight:
            ref, beside = (next(iter(each.parts.values())) for each in (weight, other))
            found = f"{ref.spec.dtype} {list(ref.spec.shape)}, beside {beside.name}"
            experts = weight.role is Role.EXPERT
            yield Found(Kind.STORED_TWICE, found, "each weight once", ref.name, ref.file, weight.name, experts=experts)


def _no_floats(weights: Sequence[Held]) -> Iterator[Found]:
    """Dense weights in a type that no layer computes with: integers, or FP8 without a scale."""
    scaled = {weight.name.rpartition("_scale")[0] for weight in weights if "_scale" in weight.name}
    for weight in weights:
        ref = weight.parts.get(PACKED)
        if weight.quantized or ref is None or not _is_weight(weight) or ref.spec.dtype in _FLOATS:
            continue
        if ref.spec.dtype.startswith("F8_") and weight.name in scaled:
            continue
        expected = "BF16, F16 or F32" + (", or a scale beside it" if ref.spec.dtype.startswith("F8_") else "")
        experts = weight.role is Role.EXPERT
        yield Found(Kind.WRONG_DTYPE, ref.spec.dtype, expected, ref.name, ref.file, weight.name, experts=experts)


def _is_weight(weight: Held) -> bool:
    return weight.name.endswith(".weight") or (weight.role is Role.EXPERT and len(weight.shape or ()) == 3)


def _is_turned_mxfp4(weight: Held) -> bool:
    """Whether it has E8M0 scales where NVFP4's experts have theirs: ModelOpt's export of gpt-oss to MXFP4."""
    scale = weight.parts.get(BLOCK_SCALE)
    experts = weight.table is not None and weight.table.experts and weight.table.format is not MXFP4
    return experts and scale is not None and scale.spec.dtype == "U8"


def _gap_faults(found: Iterable[Gap]) -> Iterator[Found]:
    for gap in found:
        kind = Kind.MISSING_EXPERT if gap.fatal else Kind.POORER_LAYER
        yield Found(kind, gap.found, "what others of its kind have", name=gap.where, weight=gap.where)


def _missing(promise: Promise, held: Mapping[str, Held], gone: set[str]) -> Iterator[Found]:
    expected = f"config.json promises it, model_type {promise.model_type}"
    absent = {name: _layer(name) for name in promise.shapes if name not in held and name not in gone}
    there = {layer for name in (*held, *gone) if (layer := _layer(name))}
    whole = dict.fromkeys(layer for layer in absent.values() if layer and layer not in there)
    for layer in whole:
        count = sum(at == layer for at in absent.values())
        yield Found(Kind.MISSING_TENSOR, f"no file has any of its {count} tensors", expected, layer, weight=layer)
    for name, layer in absent.items():
        if layer not in whole:
            experts = ".experts." in name
            kind = Kind.MISSING_EXPERT if experts else Kind.MISSING_TENSOR
            yield Found(kind, "no file has it", expected, name=name, weight=name, experts=experts)


def _layer(name: str) -> str:
    """'model.layers.7' of what is inside it; '' for the rest."""
    found = _LAYER.match(name)
    return found[0] if found else ""


def _strange(promise: Promise, weights: Sequence[Held]) -> Iterator[Found]:
    for weight in weights:
        known = weight.name in promise.shapes or weight.name.endswith(_BESIDE) or _QUANTIZER in weight.name
        tied = weight.name == "lm_head.weight"  # stored beside the embeddings that it is tied to
        if known or tied:
            continue
        ref = next(iter(weight.parts.values()))
        found = f"{ref.spec.dtype} {list(ref.spec.shape)}"
        expected = f"no tensor of this name in a model of type {promise.model_type} with {promise.layers} layers"
        yield Found(Kind.UNKNOWN_TENSOR, found, expected, ref.name, ref.file, weight.name)


def _misshapen(promise: Promise, held: Mapping[str, Held]) -> Iterator[Found]:
    for name, expected in promise.shapes.items():
        weight = held.get(name)
        if weight is None or weight.shape is None or _agrees(weight.shape, expected):
            continue
        ref = weight.parts[PACKED]
        turned = len(weight.shape) == 3 and _agrees((weight.shape[0], *weight.shape[:0:-1]), expected)
        kind = Kind.TRANSPOSED_EXPERTS if turned else Kind.WRONG_SHAPE
        stored = "" if ref.spec.shape == weight.shape else f", stored as {ref.spec.dtype} {list(ref.spec.shape)}"
        wanted = "[" + ", ".join("?" if size is None else str(size) for size in expected) + "]"
        yield Found(
            kind,
            f"{list(weight.shape)}{stored}",
            f"{wanted} by config.json",
            ref.name,
            ref.file,
            name,
            experts=weight.role is Role.EXPERT,
        )


def _agrees(shape: Shape, expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(size in (None, got) for got, size in zip(shape, expected, strict=True))


def _canonical(part: str) -> str:
    """The weight that a stored part of any layout belongs to, as far as its name tells."""
    for suffix in ("_blocks", "_scales", "_weight_scale", "_weight_scale_2", "_input_scale"):
        if part.endswith(suffix):
            return part.removesuffix(suffix)
    for suffix in (".weight_packed", ".weight_scale", ".weight_scale_2", ".weight_global_scale"):
        if part.endswith(suffix):
            return part.removesuffix(suffix) + ".weight"
    return part
