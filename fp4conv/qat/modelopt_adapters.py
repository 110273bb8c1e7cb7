"""ModelOpt's fake quantisers under peft's adapters: what they quantise is the weight with what adapters add to it.

ModelOpt wraps linear layers and gpt-oss's experts so that reading the weight gives quantised values. To add to a
weight, peft takes it out of its module for the time of the call, and that wrapping goes with it: the call, and every
later one, would run on a weight that nothing quantises, without a word. So such modules are made to read what
ModelOpt's quantiser makes of the sum, as those of `quantizers` do. Fused experts of other models need nothing: ModelOpt
quantises there what reaches the product.

ModelOpt's way, adapters first, is not taken: its wrappers of peft's layers round the sum more than once, and those of
layers that are not quantised compute another product than peft does, so no merge would repeat the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

from fp4conv.qat.quantizers import weights_in_place
from fp4conv.qat.targets import Target

_TABLE = "_fp4conv_modelopt"  # of a module: parameter -> what quantises it


def see_adapters(quantized: Iterable[tuple[Target, torch.nn.Module]]) -> None:
    """Make modules quantise what peft makes of a weight; `quantized`: (the weight, ModelOpt's quantiser of it)."""
    for target, quantizer in quantized:
        module = target.module
        table: dict[str, torch.nn.Module] = module.__dict__.setdefault(_TABLE, {})
        table[target.parameter] = _Transposed(quantizer) if target.axis == -2 else quantizer
        if not isinstance(module, _Adapted):
            kind: type = type(module)
            module.__class__ = _adapted(kind)


class _Transposed(torch.nn.Module):
    """Quantises experts [E, K, N], for ModelOpt's blocks run along the last axis."""

    def __init__(self, quantizer: torch.nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = _StraightThrough.apply(weight, self.quantizer)
        return values


class _StraightThrough(torch.autograd.Function):
    """The gradient goes through as it lies, unclipped: ModelOpt's of such experts does."""

    @staticmethod
    def forward(ctx: object, weight: torch.Tensor, quantizer: torch.nn.Module) -> torch.Tensor:
        values: torch.Tensor = quantizer(weight.transpose(-1, -2).contiguous()).transpose(-1, -2)
        return values

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Adapted:
    """Mixed into the class of a module that ModelOpt has wrapped."""

    def forward(self, *args: object, **kwargs: object) -> object:
        module: torch.nn.Module = self
        with weights_in_place(module, module.__dict__[_TABLE]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # that of ModelOpt's class


@cache
def _adapted(kind: type) -> type:
    return type(f"Adapted{kind.__name__}", (_Adapted, kind), {"__module__": __name__})
