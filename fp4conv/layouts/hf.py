"""Hugging Face dense checkpoints: every tensor in BF16, F16 or F32 under its transformers name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fp4conv.errors import SourceError
from fp4conv.families import Family
from fp4conv.formats import BlockFormat
from fp4conv.layouts.base import Parsed, Written, layer_count
from fp4conv.layouts.damaged import mending_notes, misnamed_experts, refuse_lost_experts
from fp4conv.layouts.parts import Part, dense_part, dense_weight
from fp4conv.layouts.quant_config import MODEL_CONFIG, read_quant_config
from fp4conv.model import JSON, Source, Weight
from fp4conv.safetensors_io import TensorRef

# Suffixes that only a quantised checkpoint of a kind that is not read here has.
_FOREIGN = (
    (".qweight", "GPTQ or AWQ"),
    (".weight.absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes int8"),
    (".W_q", "HQQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".codebooks", "AQLM"),
    (".weight_packed", "compressed-tensors"),
    (".weight_shape", "compressed-tensors integer"),
)


def foreign_kind(ref: TensorRef) -> str | None:
    """What kind of quantised checkpoint, that is not read here, has such a tensor; None for one that is dense."""
    for suffix, kind in _FOREIGN:
        if ref.name.endswith(suffix):
            return kind
    if ref.name.endswith(".weight") and ref.spec.dtype[0] in "UI" and len(ref.spec.shape) >= 2:
        return f"quantised ({ref.spec.dtype})"  # codes of some kind (MLX, bitsandbytes), or of no kind known
    return "FP8" if ref.spec.dtype.startswith("F8_") else None


class HfDense:
    name = "hf"
    formats: tuple[str, ...] = ()
    kv_scales = False

    def recognises(self, source: Source) -> bool:
        return True  # the last in the list: what no other layout claims

    def parse(self, source: Source, family: Family) -> Parsed:
        refuse_lost_experts(source.tensors)
        mended = misnamed_experts(source.tensors)
        for name, ref in source.tensors.items():
            if kind := foreign_kind(ref):
                raise SourceError(
                    f"this is a tensor of a {kind} checkpoint, which fp4conv does not read",
                    where=f"{name} ({ref.file})",
                    hint="convert from the BF16 checkpoint instead",
                )
        layers = layer_count(source)
        renamed = (replace(ref, name=mended.get(name, name)) for name, ref in source.tensors.items())
        weights = tuple(dense_weight(ref, family, layers) for ref in renamed)
        claim = read_quant_config(source)
        warnings = mending_notes(mended, source)
        if claim is not None:
            warnings.append(
                f"the config says the weights are quantised ({claim.algo or claim.format or claim.method}), but no "
                "tensor has scales: they are read as the dense values that they are"
            )
        return Parsed(weights, {}, tuple(warnings))

    def refusal(self, weight: Weight, family: Family) -> str | None:
        return "the hf layout holds dense tensors only"

    def place(self, weight: Weight, target: BlockFormat, input_scale: bool) -> tuple[Part, ...]:
        raise AssertionError("a dense layout places no quantised weight")

    def place_dense(self, weight: Weight, dtype: str) -> Part:
        return dense_part(weight, dtype)

    def config(self, written: Written) -> Mapping[str, JSON]:
        return {MODEL_CONFIG: dict(written.config)}
