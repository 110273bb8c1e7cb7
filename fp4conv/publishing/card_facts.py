"""What cards say: of a conversion by its plan and its result, of a finished folder by what is in it."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

from fp4conv.families import EXCLUDED
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.model import Model, Pinned, Weight
from fp4conv.plan import Plan, Step
from fp4conv.publishing.card import Card, Part
from fp4conv.publishing.repository import CARD, Repository
from fp4conv.report.converted import ConvertResult
from fp4conv.training_rules import taken_as, trained_formats


def card_of(plan: Plan, result: ConvertResult, repo: str, command: str) -> Card:
    known = {name: db for name, db in result.per_tensor.items() if db is not None}
    worst = min(known, key=lambda name: known[name]) if known else None
    source = plan.model.source
    adapters = [(adapter.name, adapter.pinned) for adapter in plan.model.adapters]
    four_bits = plan.target in BLOCK_FORMATS
    return Card(
        repo=repo,
        source=_named(source.name, source.pinned),
        bases=tuple(place.repo for place in (source.pinned, *(pinned for _, pinned in adapters)) if place),
        relation="quantized" if four_bits or not adapters else "finetune",
        format=plan.target,
        layout=plan.layout,
        rule=plan.rule.value if plan.rule else "",
        parts=parts_of(plan),
        servers=plan.servers,
        version=plan.version,
        command=command,
        quantised=len(result.per_tensor),
        sqnr_db=result.sqnr_db,
        worst=(worst, known[worst]) if worst else None,
        lossy_blocks=result.lossy_blocks,
        adapters=tuple(_named(name, pinned) for name, pinned in adapters),
        notes=tuple(_notes(plan, result)),
    )


def base_card(plan: Plan) -> str:
    """The model card of the source; '' where it has none that can be read."""
    pinned = plan.model.source.pinned
    if pinned is not None:  # also of a folder in a repository: the licence is at its top
        return Repository(pinned.repo).card(pinned.commit)
    if not any(file.name == CARD for file in plan.model.source.files):
        return ""
    return plan.model.source.read_bytes(CARD).decode("utf-8", "replace")


def parts_of(plan: Plan) -> tuple[Part, ...]:
    """The tensors of the result: what is in four bits, and what is dense for which reason."""
    groups: dict[str, list[Step]] = {}
    for step in plan.model_steps:
        groups.setdefault(_kind(step.weight, step.target), []).append(step)
    return tuple(
        Part(
            what,
            len(steps),
            sum(step.bytes_written for step in steps),
            Counter(step.weight.module.rpartition(".")[2] for step in steps if step.weight and step.weight.is_matrix),
        )
        for what, steps in sorted(groups.items(), key=lambda item: -sum(step.bytes_written for step in item[1]))
    )


def parts_of_model(model: Model) -> tuple[Part, ...]:
    """The same of a checkpoint that is there already."""
    groups: dict[str, list[Weight]] = {}
    for weight in model.weights:
        groups.setdefault(_kind(weight, weight.format_name), []).append(weight)
    return tuple(
        Part(
            what,
            len(weights),
            sum(weight.nbytes for weight in weights),
            Counter(weight.module.rpartition(".")[2] for weight in weights if weight.is_matrix),
        )
        for what, weights in sorted(groups.items(), key=lambda item: -sum(weight.nbytes for weight in item[1]))
    )


def _kind(weight: Weight | None, target: str) -> str:
    if target in BLOCK_FORMATS:
        return f"quantised, {target}"
    if weight is None or not weight.is_matrix:
        return "norms, biases and the like"
    return f"dense, {EXCLUDED.get(weight.role, 'not selected')}"


def _named(name: str, pinned: Pinned | None) -> str:
    """A repository with its commit; of a folder only its name, which is nobody's business above that."""
    if pinned is not None:
        return f"{pinned.repo} at commit {pinned.commit}"
    return PurePath(name).name or "a local checkpoint"


def _notes(plan: Plan, result: ConvertResult) -> list[str]:
    notes = []
    if trained_formats(plan.model):
        notes.append(f"the source is {taken_as(plan.model)}")
    apart = result.forward_difference
    if apart is not None:
        notes.append(
            f"{apart.values:,} of the {apart.of:,} values of {apart.tensors} weights differ from the forward pass of "
            "training, since servers fuse weights that were calibrated apart"
        )
    if result.beside_sqnr_db is not None:
        notes.append(
            "training ran the adapter beside the quantised weights; against that the merged ones have a "
            f"signal-to-noise ratio of {result.beside_sqnr_db:.2f} dB"
        )
    return notes
