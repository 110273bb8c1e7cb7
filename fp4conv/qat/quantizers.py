"""Fake quantisers on the modules of a model: the module computes with four-bit values, its master keeps its own.

While the forward pass of a module runs, an attribute of the instance lies over its parameter and holds the
fake-quantised values. So every implementation of a layer sees them, the state_dict is that of the plain model, and
wrappers that gather the parameter first (FSDP, ZeRO-3) or change it (peft's adapters on expert parameters) are done
when it is read.

Owns one quantiser and how a module is made to use it. Which modules, with which scales, is the backend's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fp4conv.errors import PlanError
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.qat.fake_quant import fake_quantise
from fp4conv.qat.targets import Target

_TABLE = "_fp4conv_quantizers"  # of a quantised module: parameter -> (its quantiser, that of its inputs or None)

# What multiplies an input, its first argument, by a matrix of experts.
_PRODUCTS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch.nn.functional, ("linear", "grouped_mm")),
        (torch, ("matmul", "bmm", "mm", "_grouped_mm")),
        (torch.Tensor, ("matmul", "__matmul__", "bmm", "mm")),
    )
    for name in names
    if hasattr(owner, name)
)


class FakeQuantizer(torch.nn.Module):
    """One fake quantiser. `amax`: float32 [], or [E] for experts that each have a scale; None until calibration.

    `observing`: values pass through unchanged, and `amax` grows to their largest magnitude. The buffer belongs to no
    state_dict: what a run freezes lies in files of its own (`training_state`).
    """

    amax: torch.Tensor | None

    def __init__(self, name: str, format_name: str, axis: int = -1) -> None:
        super().__init__()
        self.name = name
        self.format_name = format_name
        self.axis = axis
        self.enabled = True
        self.observing = False
        self.register_buffer("amax", None, persistent=False)

    @property
    def takes_amax(self) -> bool:
        return BLOCK_FORMATS[self.format_name].tensor_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observing:
            self.observe(x)
            return x
        if not self.enabled:
            return x
        if self.takes_amax and self.amax is None:
            raise PlanError("nothing was calibrated for this quantiser", where=self.name)
        return fake_quantise(x, self.format_name, self.amax, self.axis)

    def observe(self, x: torch.Tensor) -> None:
        if self.takes_amax and x.numel():
            largest = x.detach().abs().amax().to(torch.float32)
            self.amax = largest if self.amax is None else torch.maximum(self.amax, largest)

    def extra_repr(self) -> str:
        return f"{self.format_name}, enabled={self.enabled}, amax={self.amax}"


@contextmanager
def observing(model: torch.nn.Module, quantizers: Iterable[FakeQuantizer]) -> Iterator[None]:
    """While it lasts, `model` runs unquantised and for evaluation, and `quantizers` note what they see, anew."""
    held = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    before = [(quantizer, quantizer.enabled) for quantizer in held]
    training = model.training
    model.eval()
    try:
        for quantizer in held:
            quantizer.enabled = False
        for quantizer in quantizers:
            quantizer.amax, quantizer.observing = None, True
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled, quantizer.observing = enabled, False
        model.train(training)


def attach(target: Target, weight: FakeQuantizer, inputs: FakeQuantizer | None) -> None:
    """Make the module of `target` quantise that parameter, and what is multiplied by it, in its forward pass.

    Raises PlanError where the instance has a forward of its own: it would be called in place of the quantised one.
    """
    module = target.module
    if "forward" in module.__dict__:
        raise PlanError(
            f"its forward is wrapped ({module.__dict__['forward']!r}), which would go past the fake quantisers",
            where=target.name,
            hint="quantise the model before anything wraps its modules, such as kernels or hooks",
        )
    table: dict[str, tuple[FakeQuantizer, FakeQuantizer | None]] = module.__dict__.setdefault(_TABLE, {})
    table[target.parameter] = (weight, inputs)
    module.add_module(target.quantizer("weight"), weight)
    if inputs is not None:
        module.add_module(target.quantizer("input"), inputs)
    if not isinstance(module, _Quantised):
        kind: type = type(module)
        module.__class__ = _quantised(kind)
    config = getattr(module, "config", None)
    if inputs is not None and config is not None and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # others copy the matrices of chosen experts, or fuse the product


def quantized_parameters(module: torch.nn.Module) -> Mapping[str, tuple[FakeQuantizer, FakeQuantizer | None]]:
    """Parameter of `module` -> (its quantiser, that of its inputs or None); empty where nothing is quantised."""
    table: Mapping[str, tuple[FakeQuantizer, FakeQuantizer | None]] = module.__dict__.get(_TABLE, {})
    return table


class _Quantised:
    """Mixed into the class of a module whose forward pass is quantised."""

    def forward(self, *args: object, **kwargs: object) -> object:
        module: torch.nn.Module = self
        table = quantized_parameters(module)
        quantizers = {parameter: weight for parameter, (weight, _) in table.items()}
        with weights_in_place(module, quantizers) as weights, _inputs_of(module, weights):
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # that of the module's own class


@cache
def _quantised(kind: type) -> type:
    return type(f"FakeQuantised{kind.__name__}", (_Quantised, kind), {"__module__": __name__})


@contextmanager
def weights_in_place(
    module: torch.nn.Module, quantizers: Mapping[str, torch.nn.Module]
) -> Iterator[Mapping[str, torch.Tensor]]:
    """While it lasts, reading a parameter of `module` that has one of `quantizers` gives what that makes of it.

    Where peft adds to the parameter around this call, that is quantised which peft makes. Yields the values.
    """
    with ExitStack() as stack:
        weights = {}
        for parameter, quantizer in quantizers.items():
            if parametrize.is_parametrized(module, parameter):  # peft, around this call: quantise what it makes
                stack.enter_context(parametrize.cached())
                chain = module.parametrizations[parameter]
                chain.append(quantizer)
                stack.callback(chain.pop, -1)
                weights[parameter] = getattr(module, parameter)
            else:
                weights[parameter] = quantizer(module._parameters[parameter])
                module.__dict__[parameter] = weights[parameter]
                stack.callback(module.__dict__.pop, parameter)
        yield weights


@contextmanager
def _inputs_of(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While it lasts, what is multiplied by one of `weights` goes through the quantiser of its inputs first."""
    inputs = {parameter: pair[1] for parameter, pair in module.__dict__[_TABLE].items() if pair[1] is not None}
    active = {parameter: each for parameter, each in inputs.items() if each.observing or each.enabled}
    if not active:
        yield
        return
    with _Products({_storage(weights[parameter]): quantizer for parameter, quantizer in active.items()}):
        yield


class _Products(TorchFunctionMode):
    """Quantises the first factor of products whose second lies in one of the given storages."""

    def __init__(self, quantizers: Mapping[int, FakeQuantizer]) -> None:
        super().__init__()
        self._quantizers = quantizers

    def __torch_function__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            quantizer = self._quantizers.get(_storage(args[1]))
            if quantizer is not None:
                args = (quantizer(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
