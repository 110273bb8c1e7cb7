"""Scales of activations: NVFP4 input scales (W4A4) and FP8 KV-cache scales, stored, constant, or from a file.

An input scale is input amax / 2688, a KV scale amax / 448. Servers run q/k/v and gate/up on one input, and
all experts of a layer on one scale, so those take the largest amax of their set.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from fp4conv.errors import PlanError, SourceError, UsageError
from fp4conv.families import module_of, shared_set_of
from fp4conv.formats import E4M3, NVFP4, NVFP4_AMAX_DIVISOR, BlockFormat
from fp4conv.layouts import Layout
from fp4conv.layouts.parts import Part
from fp4conv.model import Model
from fp4conv.plan import Origin, ScaleOf
from fp4conv.safetensors_io import Reader, TensorRef, TensorSpec, read_header

LEFT_OUT, KEPT = "are left out", "are kept in fp4conv/ alone, for the way back"
_EXPERT = re.compile(r"\.experts\.\d+\.")
_INPUT_AMAX, _KV = ".input_amax", {".k_amax": ".k_scale", ".v_amax": ".v_scale"}
SUFFIXES = (_INPUT_AMAX, *_KV)  # of the tensors in a file of amax


class InputScaleMode(str, Enum):
    STORED = "stored"
    NONE = "none"
    CONSTANT = "constant"
    FILE = "file"


@dataclass(frozen=True)
class InputScales:
    """`amax`: from the file, tensor name -> value."""

    mode: InputScaleMode = InputScaleMode.STORED
    amax: Mapping[str, float] | None = None

    @staticmethod
    def from_file(path: Path) -> InputScales:
        """Read F32 [] tensors `<module>.input_amax`, `.k_amax` and `.v_amax`; SourceError for others."""
        amax: dict[str, float] = {}
        with Reader(path.parent) as reader:
            for ref in read_header(path, path.name).tensors:
                if ref.spec.dtype != "F32" or ref.spec.elements != 1 or not ref.name.endswith(SUFFIXES):
                    raise SourceError(
                        f"{ref.spec.dtype} {list(ref.spec.shape)}; expected F32 scalars named <module>{_INPUT_AMAX} "
                        "(or .k_amax, .v_amax)",
                        where=f"{ref.name} ({path.name})",
                        hint="such a file is what calibration writes",
                    )
                value = np.empty(1, np.float32)
                reader.read_into(path.name, ref.offset, value)
                amax[ref.name] = float(value[0])
                if not (np.isfinite(value[0]) and value[0] > 0):
                    raise SourceError(
                        f"an amax of {value[0]}; expected finite and > 0", where=f"{ref.name} ({path.name})"
                    )
        return InputScales(InputScaleMode.FILE, amax)


def input_scales_for(
    model: Model,
    chosen: frozenset[str],
    wanted: InputScales,
    target: BlockFormat | None,
    fate: str = LEFT_OUT,
) -> tuple[dict[str, Origin], list[str]]:
    """Module -> its input scale (stored, or F32 bytes) for every chosen weight, or nothing; and warnings.

    `fate`: what the warning says of those that the result has no place for.
    """
    stored = _stored(model)
    modules = [weight.module for weight in model.weights if weight.name in chosen]
    takes = target is not None and target.name == NVFP4.name
    if wanted.mode in (InputScaleMode.CONSTANT, InputScaleMode.FILE) and not takes:
        raise UsageError("only NVFP4 has input scales", hint="leave --input-scales out")
    if wanted.mode is InputScaleMode.CONSTANT:
        return dict.fromkeys(modules, _f32(1.0)), []
    if wanted.mode is InputScaleMode.FILE:
        return _from_amax(modules, wanted.amax or {}), _unused(model, chosen, wanted.amax or {})
    if not stored:
        return {}, []
    if wanted.mode is InputScaleMode.NONE or not takes:
        if not model.calibration:  # those of training: `training_rules` has told of them
            return {}, []
        return {}, [f"the input scales of {len(stored)} modules {fate}: the result has unquantised activations"]
    without = [module for module in modules if module not in stored]
    if without:
        raise PlanError(
            f"{len(stored)} modules have a stored input scale, {len(without)} that would be quantised have none",
            where=without[0],
            hint="leave the activations unquantised with --input-scales none, or give --input-scales FILE",
        )
    unused = sorted(set(stored) - set(modules))
    notes = (
        [f"the input scales of {len(unused)} modules that are not quantised are left out ({unused[0]})"]
        if unused
        else []
    )
    return {module: stored[module] for module in modules}, notes


def _stored(model: Model) -> dict[str, Origin]:
    """Module -> its input scale as stored, or from the amax that training froze: the largest of its set."""
    scales: dict[str, Origin] = {
        _module(name): ref for name, ref in model.calibration.items() if name.endswith("input_scale")
    }
    modules = {weight.name: weight.module for weight in model.weights}
    amax: dict[str, dict[str, TensorRef]] = {}
    for name, how in model.trained.items():
        if how.input_amax is not None:
            amax.setdefault(_set_key(modules[name]), {})[how.input_amax.name] = how.input_amax
    for name, how in model.trained.items():
        if how.input_amax is not None:
            refs = tuple(amax[_set_key(modules[name])].values())
            scales[modules[name]] = ScaleOf(refs, NVFP4_AMAX_DIVISOR)
    return scales


def _from_amax(modules: Sequence[str], amax: Mapping[str, float]) -> dict[str, Origin]:
    """None of a file with the KV cache's alone: activations stay unquantised."""
    given = {name.removesuffix(_INPUT_AMAX): value for name, value in amax.items() if name.endswith(_INPUT_AMAX)}
    if amax and not given:
        return {}
    largest: dict[str, float] = {}
    for module in modules:
        if module not in given:
            raise PlanError(f"the file has no {module}{_INPUT_AMAX}", where=module, hint="calibrate this model again")
        key = _set_key(module)
        largest[key] = max(largest.get(key, 0.0), given[module])
    return {module: _f32(largest[_set_key(module)] / NVFP4_AMAX_DIVISOR) for module in modules}


def _unused(model: Model, chosen: frozenset[str], amax: Mapping[str, float]) -> list[str]:
    """A note on values of modules that stay dense. Raises PlanError for a module that the model has not."""
    quantized = {weight.module: weight.name in chosen for weight in model.weights if weight.is_matrix}
    unused = []
    for name in amax:
        suffix = next(suffix for suffix in SUFFIXES if name.endswith(suffix))
        module = name.removesuffix(suffix)
        if module not in quantized:
            raise PlanError(
                f"the file has {name}, but the model has no such module",
                where=module,
                hint="was another model calibrated? List the modules with: fp4conv inspect SRC --headers-only",
            )
        if suffix == _INPUT_AMAX and not quantized[module]:
            unused.append(module)
    return (
        [f"the input amax of {len(unused)} modules that are not quantised is left out ({unused[0]})"] if unused else []
    )


def _set_key(module: str) -> str:
    """The set that runs on one input scale: fused siblings, over all experts of a layer."""
    return _EXPERT.sub(".experts.*.", shared_set_of(module) or module)


def kv_scale_parts(
    model: Model, wanted: InputScales, layout: Layout, fate: str = LEFT_OUT
) -> tuple[list[tuple[Part, Origin]], list[str]]:
    """The FP8 KV-cache scales that come along: stored ones, or from the file's k_amax and v_amax."""
    found = _kv_scales(model, wanted)
    if found and not layout.kv_scales:
        return [], [f"{len(found)} FP8 KV-cache scales {fate}: the {layout.name} layout has no place for them"]
    return found, []


def _kv_scales(model: Model, wanted: InputScales) -> list[tuple[Part, Origin]]:
    """From the file, else from the amax that training froze, else as stored."""
    scalar = TensorSpec("F32", ())
    if wanted.mode is InputScaleMode.FILE and wanted.amax:
        return [
            (Part("kv_scale", name.removesuffix(suffix) + scale, scalar), _f32(value / E4M3.max_value))
            for name, value in wanted.amax.items()
            for suffix, scale in _KV.items()
            if name.endswith(suffix)
        ]
    if model.trained_kv and wanted.mode is not InputScaleMode.NONE:
        return [
            (Part("kv_scale", name, scalar), ScaleOf((ref,), E4M3.max_value)) for name, ref in model.trained_kv.items()
        ]
    stored = [ref for name, ref in model.calibration.items() if name.endswith(tuple(_KV.values()))]
    return [(Part("kv_scale", ref.name, ref.spec), ref) for ref in stored]


def _module(input_scale_name: str) -> str:
    """'X.input_scale' and 'P_input_scale' -> the module or parameter."""
    return module_of(input_scale_name.removesuffix("input_scale")[:-1])


def _f32(value: float) -> bytes:
    return struct.pack("<f", value)


def reciprocal_bytes(scale: bytes) -> bytes:
    """F32 bytes of 1 / the F32 value in `scale`, which is finite and greater than zero."""
    return (np.float32(1.0) / np.frombuffer(scale, "<f4")).astype("<f4").tobytes()
