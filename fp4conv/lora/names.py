"""How peft spells an adapter's tensors: which module each belongs to, and what it is there.

    base_model.model.<module>.lora_A.weight, .lora_B.weight, .lora_B.bias, .lora_magnitude_vector
    base_model.model.<module>.lora_embedding_A, .lora_embedding_B
    base_model.model.<module>.base_layer.bias         a trained bias beneath an adapter
    base_model.model.<module>.weight                  a module saved whole

Where an adapter sits on a wrapped parameter, <module> ends in '.base_layer' once for each wrapper around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fp4conv.errors import PlanError
from fp4conv.safetensors_io import TensorRef

ROOT = "base_model.model."
BASE_LAYER = ".base_layer"
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.(?P<leaf>weight|bias))?$"
)
# An adapter may be named after a class with a head, or without, or by the names of an older or newer release.
_OTHER_ROOTS = (("", "model."), ("model.", ""), ("model.language_model.", "language_model.model."))


@dataclass(frozen=True)
class AdapterTensors:
    """`parts`: module -> part ('lora_A', 'lora_B', 'lora_B.bias', ...) -> tensor. `whole`: tensors that replace."""

    parts: Mapping[str, Mapping[str, TensorRef]]
    whole: Mapping[str, TensorRef] = field(default_factory=dict)


def sort_tensors(tensors: Mapping[str, TensorRef], adapter: str) -> AdapterTensors:
    """Every tensor of an adapter, by what it is. Nothing is left out: what is not a part is a whole tensor."""
    parts: dict[str, dict[str, TensorRef]] = {}
    whole: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        inner = name.removeprefix(ROOT)
        found = _PART.match(inner)
        if found:
            part = found["part"] + (".bias" if found["leaf"] == "bias" else "")
            target, key = parts.setdefault(found["module"], {}), part
        else:
            target, key = whole, inner.replace(".modules_to_save.", ".").replace(BASE_LAYER + ".", ".")
        if key in target:
            raise unused(ref, adapter, f"{target[key].name} is the same by another name", "save the adapter again")
        target[key] = ref
    return AdapterTensors(parts, whole)


def candidates(name: str) -> tuple[str, ...]:
    """The names under which the base may have what an adapter calls `name`, the likeliest first."""
    others = [new + name.removeprefix(old) for old, new in _OTHER_ROOTS if name.startswith(old)]
    return tuple(dict.fromkeys([name, *others]))


def depth(module: str) -> int:
    """How many wrappers lie around the adapter of `module`."""
    return module.count(BASE_LAYER)


def unwrapped(module: str) -> str:
    return module.replace(BASE_LAYER, "")


def unused(ref: TensorRef, adapter: str, why: str, hint: str) -> PlanError:
    """The error for an adapter's tensor that would not be merged."""
    return PlanError(f"this adapter tensor cannot be merged: {why}", where=f"{ref.name} ({adapter})", hint=hint)
