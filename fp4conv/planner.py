"""Make a plan: a pure function of a model's headers and the options. Every byte placed, every problem found.

It reads no tensor and writes nothing. What it can know it refuses here: a K that is no multiple of the
block, a layout that cannot hold a weight, a set that would be quantised in part, a server that would not load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd

from fp4conv.companions import companion_files
from fp4conv.errors import PlanError, UsageError
from fp4conv.families import EXCLUDED, IN_OUT_MODEL_TYPES, Family, Role, natural_key, shared_set_of
from fp4conv.formats import BLOCK_FORMATS, DENSE_FORMATS, MXFP4, NVFP4, TARGETS, BlockFormat, ScaleRule, Ties
from fp4conv.hints.keeping import Beside, with_hints, with_room
from fp4conv.hints.reading import read_hints
from fp4conv.hints.reciprocals import read_exact_scales
from fp4conv.hints.values import Hints
from fp4conv.input_scales import KEPT, LEFT_OUT, InputScales, input_scales_for, kv_scale_parts, reciprocal_bytes
from fp4conv.layouts import Layout, Written, default_layout, layout_named
from fp4conv.layouts.parts import BLOCK_SCALE, INPUT_SCALE, PACKED, TENSOR_SCALE, Part
from fp4conv.model import FLOAT_DTYPES, JSON, BlockScaled, Decoded, LoraMerged, Model, Stored, Weight
from fp4conv.plan import Action, Origin, Output, Plan, PlannedFile, Reciprocal, Step
from fp4conv.safetensors_io import ShardLayout, TensorRef, lay_out
from fp4conv.selection import Selection, select
from fp4conv.servers import Artifact, Verdict, verdicts
from fp4conv.stacking import Stacked, bundled
from fp4conv.training_rules import default_rule, frozen_amax, training_notes
from fp4conv.version import __version__

_CONFIG_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class Options:
    """What the user asked for, as far as it changes the bytes of the result."""

    to: str
    layout: str | None = None
    selection: Selection = field(default_factory=Selection)
    rule: ScaleRule | None = None
    ties: Ties | None = None
    input_scales: InputScales = field(default_factory=InputScales)
    max_shard_bytes: int = 5_000_000_000
    server: str | None = None
    hints: bool = True
    repair: bool = False  # sets may have to be encoded anew once their scales are read


@dataclass(frozen=True)
class Draft:
    """A step before its tensors have a place."""

    key: str
    action: Action
    parts: tuple[tuple[Part, Origin], ...]
    target: str
    weight: Weight | None = None
    group: str | None = None
    amax: TensorRef | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.spec.nbytes for part, _ in self.parts)


def make_plan(model: Model, options: Options) -> Plan:
    """The plan that turns `model` into `options.to`. Raises PlanError or UsageError; see the module's docstring."""
    target, layout, rule = _resolve(model, options)
    hints, hint_notes = read_hints(model, target.name) if target and options.hints else (Hints(), ())
    model = replace(model, calibration={**model.calibration, **hints.calibration})
    chosen = select(model, target, layout, options.selection, hints.selection) if target else frozenset[str]()
    if not target and not options.selection.is_default:
        raise UsageError(
            f"--modules, --include and --exclude choose what is quantised; --to {options.to} quantises nothing"
        )
    fate = KEPT if options.hints and target is None else LEFT_OUT
    scales, notes = input_scales_for(model, chosen, options.input_scales, target, fate)
    kv_scales, kv_notes = kv_scale_parts(model, options.input_scales, layout, fate)
    exact = read_exact_scales(model.source) if target is NVFP4 and options.hints else {}
    goal = _Goal(
        model,
        options.to,
        target,
        layout,
        rule,
        chosen,
        scales,
        bool(kv_scales),
        _partly_merged(model),
        options.repair,
        hints,
        exact,
    )
    drafts = [_draft(goal, weight) for weight in model.weights]
    drafts += [Draft(part.name, Action.COPY, ((part, origin),), "f32") for part, origin in kv_scales]
    drafts = _in_order_of_source(drafts, model)
    _check_groups(drafts)
    _check_names(drafts)
    steps, shards = _place(drafts, options.max_shard_bytes)
    config = _config(goal, [part for draft in drafts for part, _ in draft.parts])
    generated = _generated(config, shards)
    steps = with_room(steps, hints)
    beside = (
        with_hints(model, steps, shards, __version__) if target is None and options.hints else Beside(steps, shards)
    )
    companions, left_out = companion_files(model.source, config)
    servers = verdicts(_artifact(goal))
    _check_server(servers, options.server)
    ties = options.ties or Ties.EVEN
    training = training_notes(model, target, rule, ties)
    own = _notes(goal, drafts, None if options.repair else options.rule)
    warnings = (*model.warnings, *training, *hint_notes, *notes, *kv_notes, *own, *left_out)
    files = (*generated, *beside.files, *companions)
    return Plan(
        model,
        options.to,
        layout.name,
        rule,
        ties,
        beside.steps,
        beside.shards,
        files,
        servers,
        warnings,
        __version__,
        hints,
        beside.kept,
    )


@dataclass(frozen=True)
class _Goal:
    """The options resolved against a model. `chosen`: names of weights; `scales`: module -> input scale.

    `partly_merged`: sets with members that adapters change and others that they leave alone; their stored tensor scales
    stay, unless `repair` gives the whole set a new one. `exact`:
    scales as they were before they were turned into reciprocals.
    """

    model: Model
    to: str
    target: BlockFormat | None
    layout: Layout
    rule: ScaleRule | None
    chosen: frozenset[str]
    scales: Mapping[str, Origin]
    kv_scales: bool
    partly_merged: frozenset[str]
    repair: bool
    hints: Hints
    exact: Mapping[str, float]


def _resolve(model: Model, options: Options) -> tuple[BlockFormat | None, Layout, ScaleRule | None]:
    """(block format or None, layout, scale rule or None), each checked against the others."""
    target = BLOCK_FORMATS.get(options.to)
    if target is None and options.to not in DENSE_FORMATS:
        raise UsageError(f"--to {options.to!r} is none of {', '.join(TARGETS)}")
    layout = layout_for(options.to, options.layout, model.family)
    if target is None:
        if options.rule is not None:
            raise UsageError(f"--scale-rule chooses scales of four-bit formats; --to {options.to} has none")
        if options.ties is not None:
            raise UsageError(f"--ties says how codes of four-bit formats are rounded; --to {options.to} has none")
        return None, layout, None
    rule = options.rule or default_rule(model, target)
    if rule not in target.rules:
        choices = ", ".join(choice.value for choice in target.rules)
        raise UsageError(f"--scale-rule {rule.value} is not a rule of {target.name}; choose one of {choices}")
    return target, layout, rule


def layout_for(to: str, name: str | None, family: Family) -> Layout:
    """The layout of a result in `to`, by its `name` or (None) by default. UsageError where it does not hold `to`."""
    layout, target = layout_named(name) if name else default_layout(to, family), BLOCK_FORMATS.get(to)
    if (target.name if target else None) not in (layout.formats or (None,)):
        raise UsageError(
            f"the {layout.name} layout does not hold {to}",
            hint=f"leave --layout out, or use --layout {default_layout(to, family).name}",
        )
    return layout


# ---- one weight


def _draft(goal: _Goal, weight: Weight) -> Draft:
    if goal.target is not None and weight.name in goal.chosen:
        return _draft_quantized(goal, weight, goal.target)
    main = goal.model.main_dtype
    if isinstance(weight.value, LoraMerged):
        return _draft_merged(goal, weight, weight.value)
    if not isinstance(weight.value, Stored):
        dtype = main if goal.target is not None else goal.to.upper()
        part = goal.layout.place_dense(weight, dtype)
        return Draft(weight.name, Action.DEQUANTIZE, ((part, None),), dtype.lower(), weight)
    ref = weight.value.ref
    # Tensors of another float type than most were put so on purpose (a router's F32 bias): they stay.
    if goal.target is None and ref.spec.dtype == main and main != goal.to.upper():
        part = goal.layout.place_dense(weight, goal.to.upper())
        return Draft(weight.name, Action.CAST, ((part, None),), goal.to, weight)
    before = goal.hints.dense.get(weight.name, ref.spec.dtype)
    if before != ref.spec.dtype and ref.spec.dtype in FLOAT_DTYPES:
        return Draft(
            weight.name, Action.CAST, ((goal.layout.place_dense(weight, before), None),), before.lower(), weight
        )
    part = goal.layout.place_dense(weight, ref.spec.dtype)
    return Draft(weight.name, Action.COPY, ((part, ref),), ref.spec.dtype.lower(), weight)


def _draft_merged(goal: _Goal, weight: Weight, value: LoraMerged) -> Draft:
    """A merged weight that stays or becomes dense; a tensor of an adapter that is as it should be is copied."""
    stays = goal.target is not None or (isinstance(value.base, Stored) and value.dtype != goal.model.main_dtype)
    part = goal.layout.place_dense(weight, value.dtype if stays else goal.to.upper())
    dtype = part.spec.dtype
    if not value.deltas and isinstance(value.base, Stored) and value.base.ref.spec.dtype == dtype:
        return Draft(weight.name, Action.COPY, ((part, value.base.ref),), dtype.lower(), weight)
    return Draft(weight.name, Action.MERGE, ((part, None),), dtype.lower(), weight)


def _partly_merged(model: Model) -> frozenset[str]:
    """Sets of which one member is as it lies on disk, in four bits, and another has an adapter."""

    def sets(kind: type) -> set[str | None]:
        return {shared_set_of(weight.module) for weight in model.weights if isinstance(weight.value, kind)}

    return frozenset(key for key in sets(Decoded) & sets(LoraMerged) if key)


def _draft_quantized(goal: _Goal, weight: Weight, target: BlockFormat) -> Draft:
    input_scale = goal.scales.get(weight.module)
    parts = goal.layout.place(weight, target, input_scale is not None)
    value = weight.value
    origins: dict[str, Origin] = {INPUT_SCALE: input_scale}
    group: str | None = None
    amax: TensorRef | None = None
    partly = shared_set_of(weight.module) in goal.partly_merged
    if isinstance(value, LoraMerged):
        action = Action.QUANTIZE
        if isinstance(value.base, Decoded) and value.base.format_name == target.name and partly and not goal.repair:
            origins[TENSOR_SCALE] = value.base.tensor_scale
    elif isinstance(value, Stored):
        action = Action.QUANTIZE
    elif isinstance(value, BlockScaled) or value.format_name != target.name:
        action = Action.TRANSCODE
    elif target.tensor_scale and partly and goal.repair:
        action = Action.REQUANTIZE
    else:
        assert all(part.kn == value.kn for part in parts if part.kind == PACKED), "a layout that turns codes is new"
        origins |= {PACKED: value.packed, TENSOR_SCALE: value.tensor_scale}
        action = Action.COPY if value.block == target.block else Action.REBLOCK
        if action is Action.COPY:
            origins[BLOCK_SCALE] = value.block_scale
    anew = action in (Action.QUANTIZE, Action.TRANSCODE, Action.REQUANTIZE)
    if target.tensor_scale and anew and not origins.get(TENSOR_SCALE):
        assert goal.rule is not None
        group = shared_set_of(weight.module) or weight.module
        if not isinstance(value, LoraMerged):  # calibration saw the values without the adapter
            amax = frozen_amax(goal.model, weight, target, goal.rule)
    inverse = weight.base.inverse if isinstance(weight.base, Decoded) else goal.hints.inverse
    placed = tuple(
        (part, _turned_over(goal, weight.module, part, origins.get(part.kind), inverse=inverse)) for part in parts
    )
    return Draft(weight.name, action, placed, target.name, weight, group, amax)


def _turned_over(goal: _Goal, module: str, part: Part, origin: Origin, *, inverse: bool) -> Origin:
    """The origin of a scale in the form in which `part` is written; `inverse`: it is stored as a reciprocal."""
    if isinstance(origin, TensorRef) and part.kind in (TENSOR_SCALE, INPUT_SCALE) and part.inverse != inverse:
        key = f"{module}.{part.kind}"
        return Reciprocal(origin, key, goal.exact.get(key))
    return reciprocal_bytes(origin) if isinstance(origin, bytes) and part.inverse else origin


def _check_groups(drafts: Sequence[Draft]) -> None:
    """Refuse a set of which some members keep a stored tensor scale and others would get a new one."""
    new = {draft.group for draft in drafts if draft.group}
    for draft in drafts:
        if draft.weight is None or draft.target != NVFP4.name or draft.group is not None:
            continue
        key = shared_set_of(draft.weight.module)
        if key in new:
            raise PlanError(
                f"its stored tensor scale stays, but other members of {key} would be quantised anew with another",
                where=draft.key,
                hint="exclude the whole set, or start from the checkpoint this one was quantised from",
            )


def _check_names(drafts: Sequence[Draft]) -> None:
    """Refuse a source that already has a tensor under the name of a part that is to be written.

    Parts that are stacked into one tensor have one name and places of their own.
    """
    owners: dict[tuple[str, object], str] = {}
    for draft in drafts:
        for part, _ in draft.parts:
            place = (part.name, part.stack)
            if place in owners:
                raise PlanError(
                    f"both {owners[place]} and {draft.key} would be written under this name",
                    where=part.name,
                    hint="the source is no checkpoint as the tools write them; leave one of the two out with --exclude",
                )
            owners[place] = draft.key


# ---- places


def _in_order_of_source(drafts: Sequence[Draft], model: Model) -> list[Draft]:
    """File after file of the source, and within a file by names.

    Shards of models in the field are cut along any order of names ('layers.10' before 'layers.2'). Following it, a run
    needs few of them at a time, and what it writes is whole soon: so a disk can be smaller than the model.
    """
    ranks = {file.name: rank for rank, file in enumerate(model.source.files) if file.weights}

    def place(draft: Draft) -> tuple[int, object]:
        refs = [*(draft.weight.base.refs if draft.weight else ()), *(origin for _, origin in draft.parts)]
        files = [ref.file for ref in refs if isinstance(ref, TensorRef)]
        return min((ranks.get(file, len(ranks)) for file in files), default=len(ranks)), natural_key(draft.key)

    return sorted(drafts, key=place)


def _place(drafts: Iterable[Draft], max_shard_bytes: int) -> tuple[tuple[Step, ...], dict[str, ShardLayout]]:
    """Fill shards in order, a weight's parts together; a weight larger than the limit has a shard of its own.

    Weights that make one tensor together share a shard too.
    """
    shards: list[list[Draft]] = [[]]
    filled = 0
    for bundle in bundled(list(drafts), lambda draft: [part for part, _ in draft.parts]):
        nbytes = sum(draft.nbytes for draft in bundle)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += bundle
        filled += nbytes
    steps: list[Step] = []
    layouts: dict[str, ShardLayout] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        stacked = Stacked([part for draft in members for part, _ in draft.parts])
        layouts[file] = lay_out(stacked.specs, file=file)
        offsets = {ref.name: ref.offset for ref in layouts[file].tensors}
        for draft in members:
            outputs = tuple(
                Output(part, file, offsets[part.name] + stacked.start(part), origin) for part, origin in draft.parts
            )
            steps.append(Step(draft.key, draft.action, outputs, draft.target, draft.weight, draft.group, draft.amax))
    return tuple(steps), layouts


# ---- configs


def _config(goal: _Goal, parts: Sequence[Part]) -> Mapping[str, JSON]:
    dropped = ("quantization_config", "compression_config")
    base = {key: value for key, value in goal.model.config.items() if key not in dropped}
    if goal.target is None:
        base = _with_dtype(base, _CONFIG_DTYPES[goal.to])
    elif goal.hints.config_dtype:
        base = _with_dtype(base, goal.hints.config_dtype)
    matrices = [weight for weight in goal.model.weights if weight.has_matrix]
    dense = [weight.module for weight in matrices if weight.name not in goal.chosen]
    if goal.model.family.name != "encoder" and "lm_head" not in {weight.module for weight in matrices}:
        dense.append("lm_head")  # tied to the embeddings: no tensor, but a module that servers ask about
    quantized = tuple(weight.module for weight in matrices if weight.name in goal.chosen)
    ignore = tuple(sorted(dense, key=natural_key))
    return goal.layout.config(
        Written(base, quantized, ignore, bool(goal.scales), goal.kv_scales, __version__, goal.to, tuple(parts))
    )


def _with_dtype(config: dict[str, JSON], dtype: str) -> dict[str, JSON]:
    """The config saying `dtype`, also in the text_config of a multimodal one; under the key that it uses."""
    changed: dict[str, JSON] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changed[key] = dtype
        elif key == "text_config" and isinstance(value, dict):
            changed[key] = _with_dtype(value, dtype)
        else:
            changed[key] = value
    return changed


def _generated(config: Mapping[str, JSON], shards: Mapping[str, ShardLayout]) -> tuple[PlannedFile, ...]:
    contents = {name: _json_bytes(value) for name, value in config.items()}
    if len(shards) > 1:
        weight_map: dict[str, JSON] = {ref.name: file for file, shard in shards.items() for ref in shard.tensors}
        refs = [ref for shard in shards.values() for ref in shard.tensors]
        metadata: dict[str, JSON] = {"total_size": sum(ref.spec.nbytes for ref in refs)}
        index: dict[str, JSON] = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        contents["model.safetensors.index.json"] = _json_bytes(index)
    return tuple(PlannedFile(name, len(content), content) for name, content in contents.items())


def _json_bytes(value: JSON) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---- servers and warnings


def _artifact(goal: _Goal) -> Artifact:
    quantized = [weight for weight in goal.model.weights if weight.name in goal.chosen]
    return Artifact(
        format=goal.to,
        layout=goal.layout.name,
        family=goal.model.family.name if _is_ordinary(goal, quantized) else "unknown",
        input_scales=bool(goal.scales),
        k_multiple=gcd(*(weight.k for weight in quantized)),
        model_type=str(goal.model.config.get("model_type", "")),
        quantised=frozenset(weight.module.rpartition(".")[2] for weight in quantized),
        dense_experts=any(
            weight.role is Role.EXPERT and weight.has_matrix and weight.name not in goal.chosen
            for weight in goal.model.weights
        ),
    )


def _is_ordinary(goal: _Goal, quantized: Sequence[Weight]) -> bool:
    """Whether the rules read in servers' sources speak of this model: they know none of these oddities."""
    model_type = goal.model.config.get("model_type")
    if goal.layout.name != "openai-original" and (not model_type or model_type in IN_OUT_MODEL_TYPES):
        return False
    if goal.target is None:
        return True
    return not _opaque(goal.model) and not any(weight.role in EXCLUDED for weight in quantized)


def _opaque(model: Model) -> list[Weight]:
    """Matrices that no rule here can quantise: of more axes than is known, of another type, or bare parameters."""
    return [w for w in model.weights if w.has_matrix and not w.is_matrix and w.elements and w.role not in EXCLUDED]


def _check_server(servers: Sequence[Verdict], wanted: str | None) -> None:
    """`--for SERVER` is a promise: what is not known to load is refused like what is known not to."""
    for verdict in servers:
        if verdict.server != wanted or verdict.loads:
            continue
        able = ", ".join(v.server for v in servers if v.loads) or "none that is known"
        known = "is not known to load" if verdict.outcome == "unknown" else "would not load"
        if verdict.outcome == "silent-damage":
            known = "would load without an error, and compute something else from,"
        raise PlanError(
            f"{wanted} {verdict.version} {known} this result: {verdict.note}",
            hint=f"servers that load it: {able}. Another --to or --layout may suit {wanted}",
        )


def _notes(goal: _Goal, drafts: Sequence[Draft], rule_given: ScaleRule | None) -> list[str]:
    notes = []
    kept = [d for d in drafts if d.weight and d.target in (*DENSE_FORMATS, "f64") and d.target != goal.to]
    if goal.target is None and kept:
        notes.append(
            f"{len(kept)} tensors of another type than most stay as they are ({kept[0].key}: {kept[0].target})"
        )
    # NVFP4 and FP8 are encoded anew; MXFP4 to NVFP4 takes its scales from the closed form.
    coded = [draft.weight for draft in drafts if draft.action is Action.TRANSCODE and draft.weight]
    free = any(draft.action is Action.QUANTIZE for draft in drafts)
    free |= any(weight.format_name != MXFP4.name for weight in coded)
    if rule_given is not None and not free:
        notes.append(f"--scale-rule {rule_given.value} had nothing to choose: every scale follows from the source")
    cast_back = [draft for draft in drafts if goal.target is not None and draft.action is Action.CAST]
    if cast_back:
        notes.append(
            f"{len(cast_back)} dense tensors go back to the type that round-trip hints say they had "
            f"({cast_back[0].key}: {cast_back[0].target}); --no-hints keeps the one that they have"
        )
    again = [draft.key for draft in drafts if draft.action is Action.REQUANTIZE]
    if again:
        notes.append(
            f"{len(again)} weights that no adapter touches were requantised, since adapters change others of their "
            f"sets ({again[0]})"
        )
    if goal.target is not None and (opaque := _opaque(goal.model)):
        shown = f"{opaque[0].name}: {opaque[0].format_name} {list(opaque[0].shape)}"
        notes.append(f"{len(opaque)} matrices of a kind that fp4conv does not quantise stay as they are ({shown})")
    if goal.target is not None and (ahead := [w for w in goal.model.weights if w.role is Role.MTP and w.is_matrix]):
        notes.append(f"{len(ahead)} matrices were taken for multi-token prediction and stay dense ({ahead[0].name})")
    return notes
