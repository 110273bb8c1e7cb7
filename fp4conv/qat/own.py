"""`--backend fp4conv`: fake quantisers on fp4conv's own arithmetic, on any device that torch has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fp4conv import training_state
from fp4conv.errors import SourceError
from fp4conv.formats import NVFP4
from fp4conv.modelopt_state import Quantizer
from fp4conv.qat.amax import share
from fp4conv.qat.backend import Batch, QuantizedWeight, Recipe
from fp4conv.qat.placing import without_hooks
from fp4conv.qat.quantizers import FakeQuantizer, attach, observing, quantized_parameters
from fp4conv.qat.recipes import scheme_of
from fp4conv.qat.state import Amax, read_state, write_state
from fp4conv.qat.targets import Target, all_targets, choose, device_beside, input_set_of, weight_set_of


@dataclass(frozen=True)
class _Pair:
    target: Target
    weight: FakeQuantizer
    inputs: FakeQuantizer | None


class Fp4convBackend:
    name = "fp4conv"

    def check(self, recipe: Recipe) -> None:
        scheme_of(recipe)

    def calibrates(self, recipe: Recipe) -> bool:
        return recipe.format_name == NVFP4.name

    def prepare(self, model: torch.nn.Module, recipe: Recipe) -> None:
        scheme = scheme_of(recipe)
        inputs = scheme is not None and scheme.inputs
        with without_hooks(model):
            for target in choose(model, recipe):
                _attach(target, recipe.format_name, inputs=inputs)

    def calibrate(self, model: torch.nn.Module, batches: Iterable[Batch]) -> None:
        pairs = list(_pairs(model))
        inputs = [pair.inputs for pair in pairs if pair.inputs is not None and pair.inputs.takes_amax]
        if inputs:
            with observing(model, inputs), torch.no_grad():
                for batch in batches:
                    model(**batch)
        for pair in pairs:
            if pair.weight.takes_amax:
                pair.weight.amax = _weight_amax(pair.target)
        share((pair.weight for pair in pairs if pair.weight.takes_amax), weight_set_of)
        share(inputs, input_set_of, inputs=True)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        quantizers: list[Quantizer] = []
        amax: dict[str, Amax] = {}
        for pair in _pairs(model):
            for kind, quantizer in (("weight", pair.weight), ("input", pair.inputs)):
                if quantizer is None:
                    continue
                for name, value in _saved(pair.target, kind, quantizer):
                    quantizers.append(Quantizer(name, True, quantizer.format_name))
                    if value is not None:
                        amax[f"{name}._amax"] = value
        write_state(folder, self.name, quantizers, amax)

    def load(self, model: torch.nn.Module, folder: Path) -> None:
        quantizers, amax = read_state(folder)
        unused = set(quantizers)
        with without_hooks(model):
            for target in all_targets(model):
                weight_names, input_names = list(_names(target, "weight")), list(_names(target, "input"))
                if weight_names[0] not in quantizers:
                    continue
                pair = _attach(target, quantizers[weight_names[0]].format_name, inputs=input_names[0] in quantizers)
                _restore(pair.weight, weight_names, amax, target)
                unused.difference_update(weight_names)
                if pair.inputs is not None:
                    _restore(pair.inputs, input_names, amax, target)
                    unused.difference_update(input_names)
        if unused:
            raise SourceError(
                f"{len(unused)} quantisers of {training_state.STATE} belong to no weight of this model ({min(unused)})",
                where=str(folder),
                hint="the state is of another model, or this release of transformers names its modules in another way",
            )

    def see_adapters(self, model: torch.nn.Module) -> None:
        """They do: `quantizers` looks at each call."""

    def set_inputs(self, model: torch.nn.Module, enabled: bool) -> None:
        for pair in _pairs(model):
            if pair.inputs is not None:
                pair.inputs.enabled = enabled

    def set_weights(self, model: torch.nn.Module, enabled: bool) -> None:
        for pair in _pairs(model):
            pair.weight.enabled = enabled

    def trainer(self) -> type:
        from trl import SFTTrainer

        trainer: type = SFTTrainer
        return trainer

    def names(self, model: torch.nn.Module) -> list[str]:
        return [pair.target.weight for pair in _pairs(model)]

    def weights(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((weight.name, weight.values) for weight in self.quantized(model))

    def quantized(self, model: torch.nn.Module) -> Iterator[QuantizedWeight]:
        for pair in _pairs(model):
            with torch.no_grad():
                master = pair.target.value.detach()
                values = pair.weight(master) if pair.weight.enabled else master
            target, quantizer = pair.target, pair.weight
            yield QuantizedWeight(
                target.weight, quantizer.format_name, target.axis, target.each, quantizer.amax, master, values
            )


def _attach(target: Target, format_name: str, *, inputs: bool) -> _Pair:
    weight = FakeQuantizer(target.name, format_name, target.axis)
    of_inputs = FakeQuantizer(target.name, format_name) if inputs else None
    attach(target, weight, of_inputs)
    return _Pair(target, weight, of_inputs)


def _pairs(model: torch.nn.Module) -> Iterator[_Pair]:
    for target in all_targets(model):
        found = quantized_parameters(target.module).get(target.parameter)
        if found is not None:
            yield _Pair(target, *found)


def _weight_amax(target: Target) -> torch.Tensor:
    """float32 [], or [E] for experts that each have a scale."""
    magnitudes = target.value.detach().abs()
    return (magnitudes.flatten(1).amax(1) if target.each else magnitudes.amax()).to(torch.float32)


def _restore(quantizer: FakeQuantizer, names: list[str], amax: Mapping[str, Amax], target: Target) -> None:
    if not quantizer.takes_amax:
        return
    missing = [name for name in names if f"{name}._amax" not in amax]
    if missing:
        raise SourceError(f"has no {missing[0]}._amax", where=training_state.AMAX, hint="calibrate this model again")
    stored = [float(amax[f"{name}._amax"].reshape(())) for name in names]
    own = stored if target.each and len(names) > 1 else stored[0]
    quantizer.amax = torch.tensor(own, device=device_beside(target.value))


def _is_each(target: Target, kind: str) -> bool:
    return target.each and kind == "weight"


def _names(target: Target, kind: str) -> Iterator[str]:
    """What the quantisers of `target` are called in files: '….weight_quantizer', '….P_weight_quantizers.E'."""
    stem = target.weight.rpartition(".")[0] + "." + target.quantizer(kind)
    if _is_each(target, kind):
        yield from (f"{stem}s.{expert}" for expert in range(target.shape[0]))
    else:
        yield stem


def _saved(target: Target, kind: str, quantizer: FakeQuantizer) -> Iterator[tuple[str, Amax | None]]:
    values = None if quantizer.amax is None else quantizer.amax.detach().cpu().numpy()
    for number, name in enumerate(_names(target, kind)):
        own = values[number] if values is not None and values.ndim else values
        yield name, None if own is None else np.asarray(own, np.float32)
