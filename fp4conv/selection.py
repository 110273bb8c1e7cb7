"""Which weights of a model are to be held in a block format: scope, globs, exclusions, and sets that go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fp4conv.errors import PlanError, UsageError
from fp4conv.families import EXCLUDED, IN_OUT_LEAVES, IN_OUT_MODEL_TYPES, SCOPES, Role, shared_set_of
from fp4conv.formats import BLOCK_FORMATS, BlockFormat
from fp4conv.layouts import Layout
from fp4conv.model import Decoded, Model, Weight


@dataclass(frozen=True)
class Selection:
    """`scope`: a key of families.SCOPES, or None for the default. Globs match module names."""

    scope: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def is_default(self) -> bool:
        return self == Selection()


def select(
    model: Model,
    target: BlockFormat,
    layout: Layout,
    selection: Selection,
    hinted: frozenset[str] = frozenset(),
) -> frozenset[str]:
    """Names of the weights that the result holds in `target`.

    Without a word from the user: what training quantised, else what the source holds in a block format already, or
    held (`hinted`), else the family's scope.
    Raises UsageError for a glob that matches no matrix, PlanError for what `layout` cannot hold and for a set
    that a server fuses and that would be quantised in part.
    """
    matrices = [weight for weight in model.weights if weight.is_matrix]
    _check_globs(selection, matrices)
    already = frozenset(weight.name for weight in matrices if isinstance(weight.base, Decoded))
    told = already or frozenset(name for name, how in model.trained.items() if how.format_name in BLOCK_FORMATS)
    told = told or hinted
    scope = SCOPES[selection.scope or model.family.scope]
    chosen = set()
    for weight in matrices:
        if _matches(weight.module, selection.exclude):
            continue
        if _matches(weight.module, selection.include):
            chosen.add(weight.name)
        elif told and selection.scope is None:
            if weight.name in told:
                chosen.add(weight.name)
        elif weight.role in scope and weight.role not in EXCLUDED:
            chosen.add(weight.name)
    if model.format_name == target.name:
        # The source's own format is only laid out anew: what it holds stays unless it was excluded by name.
        chosen |= {w.name for w in matrices if w.name in already and not _matches(w.module, selection.exclude)}
    _check_layout(model, layout, [weight for weight in matrices if weight.name in chosen])
    _check_sets([weight for weight in model.weights if weight.has_matrix], chosen, already | hinted)
    return frozenset(chosen)


def _matches(module: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(module, glob) for glob in globs)


def _check_globs(selection: Selection, matrices: Sequence[Weight]) -> None:
    for option, globs in (("--include", selection.include), ("--exclude", selection.exclude)):
        for glob in globs:
            if not any(fnmatchcase(weight.module, glob) for weight in matrices):
                example = f" (such as {matrices[0].module})" if matrices else ""
                raise UsageError(
                    f"{option} {glob!r} matches no module that has a matrix",
                    hint=f"globs match whole module names{example}; list them with: fp4conv inspect SRC --headers-only",
                )


def _check_layout(model: Model, layout: Layout, chosen: Sequence[Weight]) -> None:
    if not chosen:
        raise PlanError(
            f"nothing to quantise was found in {model.source.name} (family {model.family.name}, "
            f"{len(model.weights)} tensors)",
            hint="name the modules with --include 'GLOB'; list them with: fp4conv inspect SRC --headers-only",
        )
    for weight in chosen:
        if reason := layout.refusal(weight, model.family):
            raise PlanError(reason, where=weight.name)
    _check_orientation(model, chosen)


def _check_orientation(model: Model, chosen: Sequence[Weight]) -> None:
    """Refuse [in, out] matrices, such as GPT-2's Conv1D: their blocks would run along the wrong axis.

    Told by the bias, which has one value for each output, by an adapter (fan_in_fan_out), or by the model's type.
    """
    shapes = {weight.name: weight.shape for weight in model.weights}
    turned = next((weight for weight in model.weights if _is_turned(weight, shapes)), None)
    for weight in chosen:
        if len(weight.shape) == 2 and weight.kn:
            raise PlanError(
                f"its adapter says that {list(weight.shape)} is [in, out] (fan_in_fan_out): fp4conv does not quantise "
                "such matrices",
                where=weight.name,
                hint="leave them out with --exclude 'GLOB'",
            )
        if reason := _in_out_reason(model, weight, shapes, turned):
            raise PlanError(
                f"{reason}: fp4conv quantises matrices [out, in] only",
                where=weight.name,
                hint="leave them out with --exclude 'GLOB'",
            )


def _in_out_reason(
    model: Model, weight: Weight, shapes: Mapping[str, tuple[int, ...]], turned: Weight | None
) -> str | None:
    """Why `weight` is or may be stored [in, out], or None. `turned`: a matrix of the model that is so by its bias."""
    if len(weight.shape) == 3:
        bias = shapes.get(f"{weight.name}_bias")
        if bias is not None and bias != (weight.matrices, weight.n):
            return f"its shape {list(weight.shape)} and that of its bias {list(bias)} do not fit [E, in, out]"
        return None
    bias = shapes.get(f"{weight.module}.bias")
    if bias is not None and bias != (weight.n,):
        return f"its shape {list(weight.shape)} and that of its bias {list(bias)} say that it is [in, out]"
    if turned is not None and (bias is None or weight.n == weight.k):
        return f"{turned.name} is [in, out] by its bias, as in GPT-2's Conv1D, and of this one nothing tells"
    leaf = weight.module.rpartition(".")[2]
    if model.config.get("model_type") in IN_OUT_MODEL_TYPES and leaf in IN_OUT_LEAVES:
        return f"models of type {model.config['model_type']} store it [in, out]"
    return None


def _is_turned(weight: Weight, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    bias = shapes.get(f"{weight.module}.bias")
    return len(weight.shape) == 2 and weight.is_matrix and bias == (weight.k,) != (weight.n,)


def _fused_set_of(weight: Weight) -> str | None:
    """The modules that a server holds as one: a set that shares a tensor scale, or all the experts of a layer."""
    if weight.role is Role.EXPERT and ".experts." in weight.module:
        return weight.module.partition(".experts.")[0] + ".experts"
    return shared_set_of(weight.module)


def _check_sets(matrices: Sequence[Weight], chosen: set[str], already: frozenset[str]) -> None:
    """Servers stack the members of a set: some in four bits and some not, they refuse to load."""
    members: dict[str, list[Weight]] = {}
    for weight in matrices:
        if key := _fused_set_of(weight):
            members.setdefault(key, []).append(weight)
    for key, weights in members.items():
        inside = [w for w in weights if w.name in chosen]
        outside = [w for w in weights if w.name not in chosen]
        newly = any(w.name not in already for w in inside) or any(w.name in already for w in outside)
        if inside and outside and newly:
            parent = key.partition("{")[0]
            shown = ", ".join(w.module for w in outside[:3]) + (f" and {len(outside) - 3} more" if outside[3:] else "")
            raise PlanError(
                f"servers fuse {key}, so its members must be quantised all or none; {shown} would stay dense",
                where=inside[0].module,
                hint=f"widen or narrow --include/--exclude to the whole set, such as '{parent}*'",
            )
