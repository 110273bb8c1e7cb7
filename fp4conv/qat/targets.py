"""Which parameters of a loaded model are weights to quantise, and what they are called elsewhere.

Owns names: of a parameter whatever wraps its module (peft, FSDP, torch.compile), of the sets that servers run with one
scale, and of the tensors that a checkpoint makes of a parameter. Choosing follows `selection`, which does the same for
checkpoints; a ModelOpt recipe chooses by its own patterns (`recipes`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from fp4conv.errors import PlanError, UsageError
from fp4conv.families import EXCLUDED, SCOPES, Family, Role, family_of, module_of, role_of, shared_set_of
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.qat.backend import Recipe
from fp4conv.qat.recipes import Scheme, scheme_of

_WRAPPERS = re.compile(
    r"^(?:base_model\.model\.|module\.|_orig_mod\.)+|(?:_fsdp_wrapped_module|_orig_mod|base_layer)\."
)
_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED = "gate_up_proj"


@dataclass(frozen=True)
class Target:
    """A parameter `parameter` of `module`, called `weight` in the model: 'X.weight', '….experts.gate_up_proj'.

    `axis`: along which blocks run, -2 for gpt-oss's experts [E, K, N]. `each`: experts [E, N, K] that each have a
    tensor scale of their own, as checkpoints with a module an expert do; gpt-oss has one for all.
    """

    module: torch.nn.Module
    parameter: str
    weight: str
    axis: int = -1
    each: bool = False

    @property
    def name(self) -> str:
        """The module, or the bare parameter, that globs and sets name."""
        return module_of(self.weight)

    @property
    def value(self) -> torch.Tensor:
        """The master, beneath whatever an adapter adds."""
        value: torch.Tensor = self.module._parameters[self.parameter]
        return value

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.value)

    def quantizer(self, kind: str) -> str:
        """The attribute of `module` that holds its 'weight' or 'input' quantiser, named as ModelOpt names it."""
        return f"{kind}_quantizer" if self.parameter == "weight" else f"{self.parameter}_{kind}_quantizer"


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also of one that ZeRO-3 has cut up: it looks empty, and has its shape as `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def device_beside(parameter: torch.Tensor) -> torch.device:
    """Where what belongs to a parameter is kept: on the processor while the parameter itself is nowhere yet."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


def canonical(name: str) -> str:
    """A module's or parameter's name without what wraps modules."""
    return _WRAPPERS.sub("", name)


def choose(model: torch.nn.Module, recipe: Recipe) -> list[Target]:
    """The weights of `model` that `recipe` quantises, in the model's order.

    Raises UsageError for a glob that matches nothing; PlanError where nothing is found, where a weight's length is no
    multiple of the block, where a set that servers fuse would be quantised in part, and for the output head.
    """
    family = _family(model)
    candidates = all_targets(model)
    for option, globs in (("--include", recipe.include), ("--exclude", recipe.exclude)):
        for glob in globs:
            if not any(fnmatchcase(target.name, glob) for target in candidates):
                hint = f"globs match whole module names, such as {candidates[0].name}" if candidates else None
                raise UsageError(f"{option} {glob!r} matches no module that has a matrix", hint=hint)
    scheme = scheme_of(recipe)
    chosen = [target for target in candidates if _is_chosen(target.name, recipe, scheme, family)]
    if not chosen:
        raise PlanError(
            f"nothing to quantise was found in this model (family {family.name})",
            hint="name the modules with --include 'GLOB'",
        )
    block = BLOCK_FORMATS[recipe.format_name].block
    for target in chosen:
        shape, size = list(target.shape), target.shape[target.axis]
        if size % block:
            raise PlanError(
                f"its shape {shape} has {size} values along the axis of blocks, which is no multiple of {block}",
                where=target.weight,
                hint="leave it out with --exclude 'GLOB'",
            )
    check_sets(chosen, candidates)
    check_no_head(chosen)
    return chosen


def _family(model: torch.nn.Module) -> Family:
    return family_of([canonical(name) for name, _ in model.named_parameters()])


def all_targets(model: torch.nn.Module) -> list[Target]:
    """Every linear layer, and every 3-D parameter of experts, of `model`."""
    return list(_targets(model, _family(model).experts_kn))


def _targets(model: torch.nn.Module, experts_kn: bool) -> Iterator[Target]:
    for raw, module in model.named_modules():
        if "lora_" in raw:
            continue
        for parameter, value in module._parameters.items():
            weight = canonical(f"{raw}.{parameter}")
            if parameter == "weight" and isinstance(module, torch.nn.Linear):
                yield Target(module, parameter, weight)
            elif value is not None and len(shape_of(value)) == 3 and role_of(module_of(weight)) is Role.EXPERT:
                yield Target(module, parameter, weight, -2 if experts_kn else -1, each=not experts_kn)


def _is_chosen(name: str, recipe: Recipe, scheme: Scheme | None, family: Family) -> bool:
    if any(fnmatchcase(name, glob) for glob in recipe.exclude):
        return False
    if any(fnmatchcase(name, glob) for glob in recipe.include):
        return True
    role = role_of(name)
    if role in EXCLUDED:
        return False
    if scheme is not None:
        return scheme.takes(name)
    return role in SCOPES[recipe.scope or family.scope]


def fused_set_of(name: str) -> str | None:
    """The modules that a server stacks into one matrix: a set that shares a tensor scale, or a layer's experts."""
    if ".experts." in name:
        return name.partition(".experts.")[0] + ".experts"
    return shared_set_of(name)


def check_sets(chosen: Iterable[Target], candidates: Iterable[Target]) -> None:
    """PlanError where a set that servers fuse would be quantised in part."""
    taken = {target.name for target in chosen}
    for target in candidates:
        key = fused_set_of(target.name)
        others = [name for name in taken if key is not None and fused_set_of(name) == key]
        if others and target.name not in taken:
            raise PlanError(
                f"servers fuse {key}, so its members must be quantised all or none; {target.name} would stay dense",
                where=others[0],
                hint="widen or narrow --include/--exclude to the whole set",
            )


def check_no_head(chosen: Iterable[Target]) -> None:
    """PlanError where the output head would be quantised: trl's loss takes its weight past the head's forward pass."""
    for target in chosen:
        if role_of(target.name) is Role.HEAD:
            raise PlanError(
                "the loss multiplies by its weight itself, so that training would not see it quantised",
                where=target.weight,
                hint=f"leave it out of training: --exclude '{target.name}', or no --include that matches it",
            )


def weight_set_of(name: str) -> str:
    """What shares one tensor scale with the weight of module `name` in a served model; itself where nothing does."""
    return shared_set_of(name) or name


def input_set_of(name: str) -> str:
    """What runs on one input scale with module `name`: fused siblings, over all experts of a layer."""
    return _EXPERT.sub(".experts.*.", shared_set_of(name) or name)


def checkpoint_modules(target: Target) -> Iterator[str]:
    """The modules of a checkpoint that `target` becomes."""
    # What the tensors hold does not matter for their names.
    yield from (module_of(name) for name, _ in checkpoint_tensors(target.weight, target.value, each=target.each))


def checkpoint_tensors(weight: str, values: torch.Tensor, *, each: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint that the parameter `weight` with `values` becomes: name and view.

    A fused parameter of experts that have a scale `each` is saved as a module an expert, gate above up.
    """
    if not each:
        yield weight, values
        return
    stem, _, parameter = weight.rpartition(".")
    for expert, matrix in enumerate(values):
        if parameter == _FUSED:
            gate, up = matrix.chunk(2)
            yield f"{stem}.{expert}.gate_proj.weight", gate
            yield f"{stem}.{expert}.up_proj.weight", up
        else:
            yield f"{stem}.{expert}.{parameter}.weight", matrix
