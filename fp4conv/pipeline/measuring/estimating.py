"""What a conversion would make of a dense model, by each format and rule: which weights, in which sets, by what amax.

The choice is the planner's own, so that an estimate is what `convert` then reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fp4conv.errors import PlanError
from fp4conv.formats import BLOCK_FORMATS, BlockFormat, ScaleRule
from fp4conv.model import BlockScaled, Model, Stored
from fp4conv.plan import Action, Step
from fp4conv.planner import Options, make_plan
from fp4conv.safetensors_io import TensorRef
from fp4conv.training_rules import frozen_amax


@dataclass(frozen=True)
class Trial:
    """One encoding to try. `amax`: the largest magnitude that training froze, where the rule follows it."""

    format: BlockFormat
    rule: ScaleRule
    amax: TensorRef | None = None


@dataclass(frozen=True)
class Trials:
    """`by_weight`: name -> encodings. `groups`: name -> the set that shares an NVFP4 tensor scale with it."""

    by_weight: dict[str, tuple[Trial, ...]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def trials_of(model: Model, formats: Sequence[str]) -> Trials:
    """Every rule of each of `formats` for the weights that a conversion at defaults would quantise."""
    by_weight: dict[str, tuple[Trial, ...]] = {}
    groups: dict[str, str] = {}
    notes: list[str] = []
    for name in formats:
        target = BLOCK_FORMATS[name]
        try:
            plan = make_plan(model, Options(to=name, rule=target.rules[0]))
        except PlanError as error:
            where = f"{error.where}: " if error.where else ""
            notes.append(
                f"no estimate for {name}, which this model cannot be converted to as it is: {where}{error.what}"
            )
            continue
        for step in plan.steps:
            if not _encodes(step):
                continue
            assert step.weight is not None
            by_weight[step.key] = by_weight.get(step.key, ()) + tuple(
                Trial(target, rule, frozen_amax(model, step.weight, target, rule)) for rule in target.rules
            )
            if step.group is not None:
                groups[step.key] = step.group
    return Trials(by_weight, groups, tuple(notes))


def _encodes(step: Step) -> bool:
    """Whether it encodes values by a rule; MXFP4 to NVFP4 has a closed form, and what is in four bits stays."""
    return (
        step.action in (Action.QUANTIZE, Action.TRANSCODE)
        and step.weight is not None
        and isinstance(step.weight.value, (Stored, BlockScaled))
    )
