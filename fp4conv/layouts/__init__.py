"""The on-disk conventions, in the order in which a source is asked whether it is one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from fp4conv.errors import SourceError, UsageError
from fp4conv.families import Family, family_of, natural_key
from fp4conv.layouts.base import Layout, Parsed, Written
from fp4conv.layouts.completeness import check_complete, check_size
from fp4conv.layouts.compressed_tensors import MX, NV, CompressedTensors
from fp4conv.layouts.fakequant import attach_training
from fp4conv.layouts.fp8 import Fp8
from fp4conv.layouts.hf import HfDense
from fp4conv.layouts.modelopt import EXPERTS, LINEAR, MX_LINEAR, ModelOpt
from fp4conv.layouts.openai import EXPERTS as OPENAI_EXPERTS
from fp4conv.layouts.openai import OpenAI
from fp4conv.layouts.openai_original import OpenAIOriginal
from fp4conv.layouts.parts import PartNames
from fp4conv.model import FP8, Model, Source, Weight

LAYOUTS: tuple[Layout, ...] = (OpenAIOriginal(), OpenAI(), CompressedTensors(), ModelOpt(), Fp8(), HfDense())

# How each layout names the parts of quantised weights; the others hold none, or (FP8) parts of another kind.
PART_TABLES: Mapping[str, tuple[PartNames, ...]] = {
    "openai": (OPENAI_EXPERTS,),
    "openai-original": (OPENAI_EXPERTS,),  # once its tensors have Hugging Face's names
    "compressed-tensors": (MX, NV),
    "modelopt": (LINEAR, MX_LINEAR, EXPERTS),
}


def recognised(source: Source) -> Layout:
    """The first layout that takes `source` for its own."""
    return next(layout for layout in LAYOUTS if layout.recognises(source))


def parse(source: Source) -> Model:
    """Everything that a source holds, by the first layout that recognises it. Reads headers and configs only."""
    check_size(source.json("config.json") or {})
    family = family_of(source.tensors)
    layout = recognised(source)
    parsed = layout.parse(source, family)
    weights = tuple(sorted(parsed.weights, key=lambda weight: natural_key(weight.name)))
    _check_once(weights)
    config = parsed.config if parsed.config is not None else source.json("config.json")
    notes = () if config is not None else ("there is no config.json: no program knows what model these tensors are",)
    missing = check_complete(weights, config or {})
    warnings = (*source.warnings, *parsed.warnings, *notes, *missing)
    model = Model(source, family, layout.name, weights, config or {}, parsed.calibration, warnings=warnings)
    return attach_training(model, source)


def _check_once(weights: Sequence[Weight]) -> None:
    """SourceError where a weight is there dense and in codes: which of the two is meant?"""
    for first, second in pairwise(weights):  # sorted by name
        if first.name == second.name:
            raise SourceError(
                f"it is there twice: as {first.value.refs[0].name} and as {second.value.refs[0].name}",
                where=first.name,
                hint="see all that is wrong with: fp4conv verify SRC",
            )


def layout_named(name: str) -> Layout:
    """The layout that `--layout NAME` means. Raises UsageError for a name that is none."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    names = ", ".join(layout.name for layout in LAYOUTS if layout.name != FP8)
    raise UsageError(f"--layout: there is no layout {name!r}", hint=f"choose one of: {names}")


def default_layout(format_name: str, family: Family) -> Layout:
    """What servers expect of `format_name` ('mxfp4', 'nvfp4', or a dense dtype) for a model of `family`."""
    if format_name == "mxfp4":
        return layout_named("openai" if family.name == "gpt-oss" else "compressed-tensors")
    return layout_named("modelopt" if format_name == "nvfp4" else "hf")


__all__ = [
    "LAYOUTS",
    "PART_TABLES",
    "Layout",
    "Parsed",
    "Written",
    "default_layout",
    "layout_named",
    "parse",
    "recognised",
]
