"""`--backend modelopt`: the fake quantisers of ModelOpt, whose MXFP4 and NVFP4 are CUDA kernels.

What they freeze is written in fp4conv's own files (`training_state`), which need no pickle to be read. Their buffers
are kept out of the state_dict: transformers takes those of experts for experts, and cannot save them. No state of
ModelOpt's own stays on a model: its hooks would pickle it beside every checkpoint, and stop at a model with adapters,
through which they see the same state twice. ModelOpt's classes are met here and nowhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fp4conv.errors import PlanError, SourceError, UsageError
from fp4conv.formats import BLOCK_FORMATS, E4M3, NVFP4, BlockFormat
from fp4conv.model import FP8
from fp4conv.modelopt_state import Quantizer
from fp4conv.qat.amax import share
from fp4conv.qat.backend import Batch, QuantizedWeight, Recipe
from fp4conv.qat.modelopt_adapters import see_adapters
from fp4conv.qat.modelopt_ended import undo_where_ended
from fp4conv.qat.modelopt_recipes import SCALE_BITS, Config, entries_of
from fp4conv.qat.modelopt_trainer import trainer_class
from fp4conv.qat.placing import without_hooks
from fp4conv.qat.recipes import check_format
from fp4conv.qat.state import Amax, read_state, write_state
from fp4conv.qat.targets import (
    Target,
    all_targets,
    canonical,
    check_no_head,
    check_sets,
    choose,
    device_beside,
    input_set_of,
    weight_set_of,
)

_OFF: Config = {"quantizer_name": "*", "enable": False}
_ELSEWHERE = "train with --backend fp4conv, which has the same arithmetic and runs anywhere"


@dataclass
class _Held:
    """A TensorQuantizer as what `amax.share` works on. `file_name` is what it is called in files.

    `name` is the module's, or that of the quantiser where an expert has a tensor scale of its own.
    """

    name: str
    file_name: str
    quantizer: torch.nn.Module

    @property
    def amax(self) -> torch.Tensor | None:
        found = self.quantizer.amax
        return None if found is None else found.detach().to(torch.float32).reshape(())

    @amax.setter
    def amax(self, value: torch.Tensor) -> None:
        old = self.quantizer.amax
        dtype, shape = (torch.float32, ()) if old is None else (old.dtype, old.shape)
        rounded = value.to(dtype)
        assert bool(rounded.to(torch.float32) == value), "an amax of BF16 values is a BF16 value"
        self.quantizer.amax = rounded.reshape(shape)


class ModelOptBackend:
    name = "modelopt"

    def check(self, recipe: Recipe) -> None:
        check_format(recipe.format_name)
        if reason := missing_kernels():
            raise UsageError(f"--backend modelopt: {reason}", hint=_ELSEWHERE)
        if recipe.quant_cfg is not None:
            entries_of(recipe)

    def calibrates(self, recipe: Recipe) -> bool:
        return recipe.format_name == NVFP4.name

    def prepare(self, model: torch.nn.Module, recipe: Recipe) -> None:
        if recipe.quant_cfg is None:
            names = [name for target in choose(model, recipe) for name in _file_names(target, "weight")]
            entries = [_entry(name, recipe.format_name) for name in names]
        else:
            entries = entries_of(recipe)
        try:
            _quantize(model, entries)
        except RuntimeError as error:
            raise PlanError(
                f"nothing to quantise was found in this model: {(str(error).splitlines() or [''])[0]}",
                hint="choose another --quant-cfg, or leave it out",
            ) from error
        self._check_prepared(model, recipe)

    def _check_prepared(self, model: torch.nn.Module, recipe: Recipe) -> None:
        """Refuse quantisers that no export of fp4conv can repeat."""
        block = BLOCK_FORMATS[recipe.format_name]
        chosen = list(_held(model, "weight"))
        check_sets([target for target, _ in chosen], all_targets(model))
        check_no_head(target for target, _ in chosen)
        for name, quantizer in _kv_quantizers(model):
            if quantizer.num_bits != (4, 3) or quantizer.block_sizes:
                raise PlanError(
                    f"quantises the KV cache by {quantizer}; fp4conv exports FP8 with one scale",
                    where=name,
                    hint="choose a --quant-cfg without a KV cache, or with one in FP8",
                )
        for target, held in chosen:
            if _format_of(held.quantizer) is not block:
                raise PlanError(
                    f"its quantiser is {held.quantizer}, not {block.name} with dynamic blocks",
                    where=held.file_name,
                    hint="choose another --quant-cfg: fp4conv exports MXFP4 and NVFP4 by their largest magnitude",
                )
            size = target.shape[target.axis]
            if size % block.block:
                raise PlanError(
                    f"{size} values along the axis of blocks are no multiple of {block.block}",
                    where=target.weight,
                    hint="leave it out with --exclude 'GLOB'",
                )

    def calibrate(self, model: torch.nn.Module, batches: Iterable[Batch]) -> None:
        import modelopt.torch.quantization as mtq

        def forward(loop_model: torch.nn.Module) -> None:
            for batch in batches:
                loop_model(**batch)

        with torch.no_grad():
            mtq.calibrate(model, "max", forward)
        _forget_state(model)
        weights = [held for _, held in _held(model, "weight")]
        share((held for held in weights if _format_of(held.quantizer) is NVFP4), weight_set_of)
        inputs = [held for _, held in _held(model, "input")]
        share((held for held in inputs if _format_of(held.quantizer) is NVFP4), input_set_of, inputs=True)
        _hide_buffers(model)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        quantizers: list[Quantizer] = []
        amax: dict[str, Amax] = {}
        for kind in ("weight", "input"):
            for _, held in _held(model, kind):
                found = _format_of(held.quantizer)
                if found is None:
                    continue
                quantizers.append(Quantizer(held.file_name, True, found.name))
                if found is NVFP4 and held.amax is not None:
                    amax[f"{held.file_name}._amax"] = np.asarray(held.amax.cpu().numpy(), np.float32)
        for name, quantizer in _kv_quantizers(model):
            quantizers.append(Quantizer(name, True, FP8))
            # A recipe that casts takes E4M3's largest value for its amax: a scale of 1.
            largest = E4M3.max_value if quantizer._use_constant_amax else float(quantizer.amax)
            amax[f"{name}._amax"] = np.asarray(largest, np.float32)
        write_state(folder, self.name, quantizers, amax)

    def load(self, model: torch.nn.Module, folder: Path) -> None:
        quantizers, amax = read_state(folder)
        _quantize(model, [_entry(each.name, each.format_name) for each in quantizers.values() if each.enabled])
        unused = set(quantizers)
        modules = {canonical(name): module for name, module in model.named_modules()}
        for name, quantizer in _kv_quantizers(model):
            unused.discard(name)
            attention = modules[name.rpartition(".")[0]]
            value = float(amax[f"{name}._amax"].reshape(()))
            quantizer.amax = torch.tensor(value, device=device_beside(next(attention.parameters())))
        for kind in ("weight", "input"):
            for target, held in _held(model, kind):
                unused.discard(held.file_name)
                stored = amax.get(f"{held.file_name}._amax")
                if stored is not None:
                    held.amax = torch.tensor(float(stored.reshape(())), device=device_beside(target.value))
        _hide_buffers(model)
        if unused:
            raise SourceError(
                f"{len(unused)} quantisers of its state belong to no weight of this model ({min(unused)})",
                where=str(folder),
                hint="the state is of another model, or this release of transformers names its modules in another way",
            )

    def set_inputs(self, model: torch.nn.Module, enabled: bool) -> None:
        _switch((held.quantizer for _, held in _held(model, "input")), enabled)
        _switch((quantizer for _, quantizer in _kv_quantizers(model)), enabled)

    def set_weights(self, model: torch.nn.Module, enabled: bool) -> None:
        _switch((held.quantizer for _, held in _held(model, "weight")), enabled)

    def trainer(self) -> type:
        return trainer_class()

    def see_adapters(self, model: torch.nn.Module) -> None:
        see_adapters((target, held.quantizer) for target, held in _held(model, "weight") if not target.each)

    def names(self, model: torch.nn.Module) -> list[str]:
        held = _held(model, "weight")
        return list(dict.fromkeys(target.weight for target, each in held if _format_of(each.quantizer) is not None))

    def weights(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((weight.name, weight.values) for weight in self.quantized(model))

    def quantized(self, model: torch.nn.Module) -> Iterator[QuantizedWeight]:
        by_target: dict[str, tuple[Target, list[_Held]]] = {}
        for target, held in _held(model, "weight"):
            by_target.setdefault(target.weight, (target, []))[1].append(held)
        for target, members in by_target.values():
            found = _format_of(members[0].quantizer)
            if found is None:
                continue
            master = target.value.detach()
            amax = [held.amax for held in members if held.amax is not None and found is NVFP4]
            frozen = torch.stack(amax) if target.each and amax else amax[0] if amax else None
            with torch.no_grad(), torch.cuda.device_of(master):  # kernels are launched on the current GPU
                values = _forward_values(target, master, members)
            yield QuantizedWeight(target.weight, found.name, target.axis, target.each, frozen, master, values)


def missing_kernels() -> str | None:
    """Why ModelOpt's fake quantisers do not run here, or None."""
    if not torch.cuda.is_available():  # first, for ModelOpt itself warns at length where there is none
        return "its fake quantisers are CUDA kernels, and torch sees no GPU"
    try:
        importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:
        return f"{error}; install it with: pip install 'fp4conv[qat]'"
    return None


def _entry(quantizer: str, format_name: str) -> Config:
    """What turns one quantiser on."""
    facts: Config = {"num_bits": (4, 3), "axis": None}
    if format_name != FP8:
        sizes = {-1: BLOCK_FORMATS[format_name].block, "type": "dynamic", "scale_bits": SCALE_BITS[format_name]}
        facts = {"num_bits": (2, 1), "block_sizes": sizes}
    return {"quantizer_name": f"*{quantizer}", "cfg": facts}  # a wrapper's prefix may come before the name


def _quantize(model: torch.nn.Module, entries: list[Config]) -> None:
    import modelopt.torch.quantization as mtq

    with without_hooks(model):
        mtq.quantize(model, {"quant_cfg": [_OFF, *entries], "algorithm": None})
    _forget_state(model)
    undo_where_ended(model)


def _forget_state(model: torch.nn.Module) -> None:
    from modelopt.torch.opt import ModeloptStateManager

    ModeloptStateManager.remove_state(model)


def _hide_buffers(model: torch.nn.Module) -> None:
    from modelopt.torch.quantization.nn import TensorQuantizer

    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module._non_persistent_buffers_set.update(module._buffers)


def _file_names(target: Target, kind: str) -> Iterator[str]:
    stem = target.weight.rpartition(".")[0] + "." + target.quantizer(kind)
    if target.each and kind == "weight":
        yield from (f"{stem}s.{expert}" for expert in range(target.shape[0]))
    else:
        yield stem


def _held(model: torch.nn.Module, kind: str) -> Iterator[tuple[Target, _Held]]:
    """The enabled quantisers of `kind`, by the parameter that they belong to."""
    modules = _quantizers(model)
    for target in all_targets(model):
        for name in _file_names(target, kind):
            quantizer = modules.get(name)
            if quantizer is not None and quantizer.is_enabled:
                own_scale = target.each and kind == "weight"
                yield target, _Held(name if own_scale else target.name, name, quantizer)


def _quantizers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {canonical(name): module for name, module in model.named_modules() if "_quantizer" in name}


def _kv_quantizers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The enabled quantisers of the KV cache, by name."""
    for name, quantizer in _quantizers(model).items():
        if name.endswith(("k_bmm_quantizer", "v_bmm_quantizer")) and quantizer.is_enabled:
            yield name, quantizer


def _format_of(quantizer: torch.nn.Module) -> BlockFormat | None:
    sizes = quantizer.block_sizes
    if quantizer.num_bits != (2, 1) or not sizes or sizes.get("type") != "dynamic":
        return None
    scale_bits = tuple(sizes.get("scale_bits") or ())
    return next((BLOCK_FORMATS[name] for name, bits in SCALE_BITS.items() if bits == scale_bits), None)


def _switch(quantizers: Iterable[torch.nn.Module], enabled: bool) -> None:
    for quantizer in quantizers:
        if enabled:
            quantizer.enable_quant()
        else:
            quantizer.disable_quant()


def _forward_values(target: Target, master: torch.Tensor, members: list[_Held]) -> torch.Tensor:
    if target.each:
        return torch.stack([held.quantizer(matrix) for held, matrix in zip(members, master, strict=True)])
    if target.axis == -2:
        return members[0].quantizer(master.transpose(-1, -2).contiguous()).transpose(-1, -2)
    return members[0].quantizer(master)
