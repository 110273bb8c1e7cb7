"""LoRA: which layers and parameters get adapters.

peft adds a linear layer's product beside its output, and adds factors of a parameter to the parameter itself. A layer
whose weight is fake-quantised is adapted in the second way, as experts are: then what the quantiser sees is the
merged weight, and the export has the values that were trained. Beside a quantised weight, it could not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import parametrize

from fp4conv.errors import UsageError
from fp4conv.families import Role, role_of
from fp4conv.qat.targets import shape_of

if TYPE_CHECKING:
    import peft

    from fp4conv.qat.settings import Settings

ALL_LINEAR, NONE = "all-linear", "none"  # of linear layers; experts have a setting of their own
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Targets:
    """Full names of linear layers that get adapters beside them, and of parameters that factors are added to."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def targets_of(model: torch.nn.Module, settings: Settings, quantized: Collection[str]) -> Targets:
    """What to adapt, given the names of the `quantized` parameters. UsageError where nothing is left."""
    modules: list[str] = []
    parameters: list[str] = []
    leaves: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or role_of(name) is Role.HEAD:
            continue
        leaf = name.rpartition(".")[2]
        leaves.add(leaf)
        if not _in_layers(name, settings) or not {ALL_LINEAR, leaf} & set(settings.lora_modules):
            continue
        if f"{name}.weight" in quantized:
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    if settings.lora_experts:
        parameters += [
            name
            for name, parameter in model.named_parameters()
            if len(shape_of(parameter)) == 3 and role_of(name) is Role.EXPERT and _in_layers(name, settings)
        ]
    _check_used(model, settings, leaves)
    if not modules and not parameters:
        raise UsageError(
            f"no layer matches lora_modules {', '.join(settings.lora_modules)} and lora_layers "
            f"{', '.join(map(str, settings.lora_layers)) or '(all)'}",
            where=str(settings.model),
            hint=f"choose among {', '.join(sorted(leaves))}, or {ALL_LINEAR}",
        )
    return Targets(tuple(modules), tuple(parameters))


def _check_used(model: torch.nn.Module, settings: Settings, leaves: Collection[str]) -> None:
    """UsageError for a name of a layer, or a number of one, that the model has not: a slip of the pen."""
    numbers = {int(found[1]) for name, _ in model.named_modules() if (found := _LAYER.search(f".{name}."))}
    for wanted, have, what in (
        (set(settings.lora_modules) - {ALL_LINEAR, NONE}, set(leaves), "lora_modules"),
        (set(settings.lora_layers), numbers, "lora_layers"),
    ):
        if missing := sorted(map(str, wanted - have)):
            raise UsageError(
                f"{what} names {', '.join(missing)}, and there is none in this model",
                where=str(settings.model),
                hint=f"it has {', '.join(map(str, sorted(have)))}",
            )


def with_adapters(model: torch.nn.Module, settings: Settings, quantized: Collection[str]) -> peft.PeftModel:
    """`model` with fresh adapters of its own dtype, so that merging them repeats the forward pass."""
    from peft import LoraConfig, get_peft_model

    targets = targets_of(model, settings, quantized)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0 if targets.parameters else settings.lora_dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    # By this the trainer goes on from a checkpoint, with factors in F32 were it not told.
    adapted.load_adapter = partial(adapted.load_adapter, autocast_adapter_dtype=False)
    fold_matrices(adapted)
    return adapted


def fold_matrices(adapted: torch.nn.Module) -> None:
    """Make peft add the factors of a matrix as it adds those of experts: in one rounding, as merging does.

    peft rounds B A to the dtype of a lone matrix, and then its sum with W: a quarter of the values in BF16 would be
    others than the merged model has.
    """
    from peft.tuners.lora.layer import ParamWrapper

    for module in adapted.modules():
        if isinstance(module, ParamWrapper) and module.get_param().ndim == 2:
            module.__class__ = _folding(ParamWrapper)


@cache
def _folding(wrapper: type) -> type:
    class Folding(wrapper):
        @contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            adapters = [name for name in active_adapters if name in self.lora_A]
            if not adapters:
                yield
                return
            base, parameter = self.get_base_layer(), self.parameter_name
            (adapter,) = adapters
            factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            trained = self.get_param().requires_grad
            parametrize.register_parametrization(base, parameter, _Fold(*factors, self.scaling[adapter]))
            base.parametrizations[parameter].original.requires_grad_(trained)  # which a parametrisation does not keep
            try:
                with parametrize.cached():
                    yield
            finally:
                parametrize.remove_parametrizations(base, parameter, leave_parametrized=False)

    return Folding


class _Fold(torch.nn.Module):
    """W -> W + scaling x B A, in float32 and with one rounding. `a`: [R, K], `b`: [N, R], W: [N, K].

    As factors are merged: of the dtype of W. Matrix units that take BF16 would add up the product in their own way.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self._factors = (a, b)  # no parameters of this module: they are the adapter's
        self._scaling = scaling

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = (factor.to(weight.dtype).to(torch.float32) for factor in self._factors)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight.to(torch.float32), b, a, alpha=self._scaling).to(weight.dtype)


def _in_layers(name: str, settings: Settings) -> bool:
    found = _LAYER.search(f".{name}")
    return not settings.lora_layers or (found is not None and int(found[1]) in settings.lora_layers)
