"""What ModelOpt's wrappers of experts leave behind when a forward pass ends by raising is put back.

For the time of a call they put functions of their own in the place of torch's (linear, bmm, matmul), and note on the
module how far it has come; they undo both only where nothing is raised. Gradient checkpointing raises: it ends a
layer's recomputation so, once it has what backward needs, which is inside the experts. What then stayed in torch's
place quantised the products of other modules, and Qwen3-MoE's routers chose other experts in the next recomputation.
"""

from __future__ import annotations

import torch

_REPLACED = ((torch.nn.functional, "linear"), (torch, "bmm"), (torch.Tensor, "__matmul__"))


def undo_where_ended(model: torch.nn.Module) -> None:
    """Make each such wrapper of `model` leave itself and torch as it found them where its forward pass raises."""
    from modelopt.torch.quantization.plugins.custom import _QuantFunctionalMixin

    for module in model.modules():
        if isinstance(module, _QuantFunctionalMixin):
            before = _Before()
            module.register_forward_pre_hook(before.note, prepend=True)
            module.register_forward_hook(before.put_back, always_call=True)


class _Before:
    """How a module and torch's functions were when its forward pass began."""

    def __init__(self) -> None:
        self._flags: dict[str, object] = {}
        self._functions: list[tuple[object, str, object]] = []

    def note(self, module: torch.nn.Module, *_: object) -> None:
        self._flags = {name: value for name, value in vars(module).items() if isinstance(value, bool)}
        self._functions = [(owner, name, getattr(owner, name)) for owner, name in _REPLACED]

    def put_back(self, module: torch.nn.Module, _: object, output: object) -> None:
        if output is not None:  # None: it raised
            return
        vars(module).update(self._flags)
        for owner, name, function in self._functions:
            if getattr(owner, name) is not function:
                setattr(owner, name, function)
