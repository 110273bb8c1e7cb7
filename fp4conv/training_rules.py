"""What quantisation-aware training means for a plan: its rule, its frozen amax, and words where a plan departs from it.

The MXFP4 forward pass of ModelOpt takes the smallest scale that does not saturate (rceil) and rounds half to
even; the NVFP4 one takes the amax that calibration froze. A plan that does the same exports the values that
were trained; for any other the user is told.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp4conv.formats import BLOCK_FORMATS, MXFP4, NVFP4, BlockFormat, MergeRounding, ScaleRule, Ties
from fp4conv.model import LoraMerged, Model, Stored, Weight
from fp4conv.safetensors_io import TensorRef

FORWARD_RULES: Mapping[str, ScaleRule] = {MXFP4.name: ScaleRule.RCEIL, NVFP4.name: ScaleRule.AMAX}


def trained_formats(model: Model) -> frozenset[str]:
    """The block formats that training used for weights."""
    return frozenset(how.format_name for how in model.trained.values() if how.format_name in BLOCK_FORMATS)


def taken_as(model: Model) -> str:
    """What the source was taken for: 'plain bf16', 'bf16 trained for nvfp4', 'mxfp4'."""
    if formats := trained_formats(model):
        return f"{model.format_name} trained for {' and '.join(sorted(formats))}"
    quantized = any(not isinstance(weight.base, Stored) for weight in model.weights)
    return model.format_name if quantized else f"plain {model.format_name}"


def default_rule(model: Model, target: BlockFormat) -> ScaleRule:
    """The rule of the forward pass where the model or an adapter was trained for it, else the least squared error."""
    trained = target.name in trained_formats(model) or any(adapter.trained for adapter in model.adapters)
    return FORWARD_RULES[target.name] if trained else ScaleRule.MSE


def frozen_amax(model: Model, weight: Weight, target: BlockFormat, rule: ScaleRule) -> TensorRef | None:
    """The stored amax that decides the tensor scale of `weight`, where the plan follows the forward pass."""
    how = model.trained.get(weight.name)
    if how is None or how.format_name != target.name or rule is not FORWARD_RULES[target.name]:
        return None
    return how.amax


def training_notes(model: Model, target: BlockFormat | None, rule: ScaleRule | None, ties: Ties) -> list[str]:
    """Warnings about each way in which the result is not what was trained."""
    if any(adapter.trained for adapter in model.adapters):
        return _adapter_notes(model, target, rule, ties)
    formats = trained_formats(model)
    if not formats:
        return []
    names = " and ".join(sorted(formats))
    unused = sum(how.amax is not None or how.input_amax is not None for how in model.trained.values())
    dropped = f"; the stored amax of {unused} weights is left out" if unused else ""
    if target is None:
        return [f"trained with {names} fake quantisers: the result holds the unquantised master weights{dropped}"]
    if target.name not in formats:
        return [f"trained for {names}, not for {target.name}: the result has other values than were trained{dropped}"]
    notes = []
    if rule is not FORWARD_RULES[target.name]:
        forward = FORWARD_RULES[target.name].value
        chosen = rule.value if rule else "none"
        notes.append(f"--scale-rule {chosen} gives other values than were trained, whose rule is {forward}{dropped}")
    if ties is Ties.DOWN:
        notes.append("--ties down gives other values than were trained: the forward pass rounds half to even")
    others = sorted(formats - {target.name})
    if others:
        notes.append(f"some weights were trained for {', '.join(others)}: theirs are other values than were trained")
    return notes


def _adapter_notes(model: Model, target: BlockFormat | None, rule: ScaleRule | None, ties: Ties) -> list[str]:
    """The same for adapters of LoRA-QAT, whose state is a pickle that is not opened: it may name another format."""
    if target is None:
        return ["the adapter was trained with fake quantisers: the result holds the merged weights unquantised"]
    notes = []
    rounding = next((w.value.rounding for w in model.weights if isinstance(w.value, LoraMerged)), None)
    if rounding is not None and rounding is not MergeRounding.TRAINING:
        notes.append(
            f"--merge-rounding {rounding.value} gives other values than were trained, whose sum is rounded once"
        )
    if rule is not FORWARD_RULES[target.name]:
        forward, chosen = FORWARD_RULES[target.name].value, rule.value if rule else "none"
        notes.append(f"--scale-rule {chosen} gives other values than were trained, whose rule is {forward}")
    if ties is Ties.DOWN:
        notes.append("--ties down gives other values than were trained: the forward pass rounds half to even")
    if target is NVFP4:
        notes.append(
            "the amax that training froze lies in a pickle that is not opened: tensor scales follow from the values"
        )
    return notes
