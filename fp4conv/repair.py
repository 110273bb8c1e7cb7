"""Sets of NVFP4 weights that servers fuse and whose stored tensor scales differ: found, and given one scale.

A server that stacks q, k and v takes one tensor scale for them, the largest or the first, without a word: what it
then computes is another model. Reading scales is the caller's; this module is pure.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fp4conv.errors import PlanError
from fp4conv.families import shared_set_of
from fp4conv.formats import NVFP4
from fp4conv.input_scales import reciprocal_bytes
from fp4conv.layouts.parts import BLOCK_SCALE, PACKED, TENSOR_SCALE
from fp4conv.model import Decoded
from fp4conv.plan import Action, Output, Plan, Step
from fp4conv.safetensors_io import TensorRef


def kept_scales(plan: Plan) -> dict[str, dict[str, TensorRef]]:
    """Set -> step -> its stored scale, for the weights that keep that scale and that servers fuse."""
    sets: dict[str, dict[str, TensorRef]] = {}
    for step in plan.steps:
        value = step.weight.base if step.weight else None
        if not isinstance(value, Decoded) or step.target != NVFP4.name or value.tensor_scale is None or step.group:
            continue
        assert step.weight is not None
        if key := shared_set_of(step.weight.module):
            sets.setdefault(key, {})[step.key] = value.tensor_scale
    return {key: members for key, members in sets.items() if len(members) > 1}


def sets_apart(sets: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The sets whose members' scales differ. `sets`: set -> step -> the scale as stored."""
    return {key: members for key, members in sets.items() if len(set(members.values())) > 1}


def refuse_apart(apart: Mapping[str, Mapping[str, float]]) -> PlanError:
    key, members = next(iter(apart.items()))
    found = ", ".join(f"{name.removesuffix('.weight').rpartition('.')[2]} {scale!r}" for name, scale in members.items())
    return PlanError(
        f"servers fuse these modules and take one tensor scale for all, but the stored ones differ: {found} "
        f"({len(apart)} such sets)",
        where=key,
        hint="--repair requantises the set to its largest tensor scale, and reports what that costs; or --to bf16",
    )


def repaired(plan: Plan, apart: Mapping[str, Mapping[str, float]]) -> Plan:
    """`plan` with the members of each set encoded by its largest tensor scale; those that have it stay as they are."""
    shared: dict[str, float] = {}
    steps = {step.key: step for step in plan.steps}
    for members in apart.values():
        inverse = _value(steps[next(iter(members))]).inverse
        largest = (min if inverse else max)(members.values())
        shared |= {key: largest for key, scale in members.items() if scale != largest}
    note = (
        f"{len(shared)} weights of {len(apart)} sets whose tensor scales differed were requantised to their set's "
        f"largest ({next(iter(shared))}, ...)"
    )
    done = tuple(_requantised(step, shared[step.key]) if step.key in shared else step for step in plan.steps)
    return replace(plan, steps=done, warnings=(*plan.warnings, note))


def _requantised(step: Step, stored: float) -> Step:
    """`stored`: the shared scale as the source stores it, plain or as a reciprocal."""
    value = _value(step)
    content = struct.pack("<f", stored)
    scale = float(np.float32(1.0) / np.float32(stored)) if value.inverse else stored

    def renewed(output: Output) -> Output:
        if output.part.kind in (PACKED, BLOCK_SCALE):
            return replace(output, origin=None)
        if output.part.kind == TENSOR_SCALE:
            same = output.part.inverse == value.inverse
            return replace(output, origin=content if same else reciprocal_bytes(content))
        return output

    outputs = tuple(renewed(output) for output in step.outputs)
    action = step.action if step.merged else Action.REQUANTIZE  # a merged weight is encoded anew anyway
    return replace(step, action=action, outputs=outputs, tensor_scale=scale)


def _value(step: Step) -> Decoded:
    assert step.weight is not None
    assert isinstance(step.weight.base, Decoded)
    return step.weight.base
