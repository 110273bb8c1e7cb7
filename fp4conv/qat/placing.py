"""A model over several devices of one process: for evaluation, calibration and the checks of `--gpus N`.

Training shares a model in another way (`launch`). Here every layer lies whole on one GPU, by accelerate's device map,
and what comes in is moved there. Nothing is ever left on the processor or a disk: what does not fit is an error, known
from the config before a weight is read.

Owns which layer lies where, and that accelerate's hooks neither pass by fake quantisers nor lead kernels astray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from fp4conv.errors import PlanError
from fp4conv.sizes import format_size

if TYPE_CHECKING:
    import transformers

DeviceMap = dict[str, int]


def room(gpus: int, *, free: bool) -> dict[int, int]:
    """Bytes of each of the first `gpus` GPUs. `free`: those free now, which torch takes some memory to ask for."""
    if free:
        return {index: int(torch.cuda.mem_get_info(index)[0]) for index in range(gpus)}
    return {index: int(torch.cuda.get_device_properties(index).total_memory) for index in range(gpus)}


def device_map(model: transformers.PreTrainedModel, dtype: torch.dtype, have: Mapping[int, int]) -> DeviceMap:
    """Module -> GPU, in the order of the layers and as even as `have`, bytes of each, allows; `model` may be on meta.

    On each GPU the bytes of one layer more stay free: while a layer runs, its fake-quantised values lie beside it.
    Raises PlanError where the model does not fit.
    """
    from accelerate.utils import compute_module_sizes, get_balanced_memory, infer_auto_device_map

    whole = set(model._no_split_modules or ())
    sizes = compute_module_sizes(model, dtype=dtype)
    layers = [sizes[name] for name, module in model.named_modules() if type(module).__name__ in whole]
    budget = {index: max(0, size - max(layers, default=0)) for index, size in have.items()}
    for limits in (get_balanced_memory(model, dict(budget), list(whole), dtype=dtype), budget):
        found: dict[str, int | str] = infer_auto_device_map(model, limits, list(whole), dtype=dtype)
        if not {"cpu", "disk"} & set(found.values()):
            return {name: int(place) for name, place in found.items()}
    raise PlanError(
        f"evaluation takes {format_size(sizes[''])} of weights and a layer of {format_size(max(layers, default=0))} "
        f"beside them on each GPU; the GPUs have {', '.join(map(format_size, have.values()))}",
        hint="give more GPUs (--gpus N), or leave evaluation and its checks out",
    )


@contextmanager
def without_hooks(model: torch.nn.Module) -> Iterator[None]:
    """Take accelerate's hooks off `model` while its modules change, and put them on what the modules have become.

    A hook keeps the forward pass that it found; on a module that is quantised after, it would run that one still.
    """
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not hooked:
        yield
        return
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for module in model.modules():
        left = module.__dict__.get("forward")  # what the hook had found, now of the instance: it would hide a new class
        if left is not None and getattr(left, "__func__", None) is type(module).forward:
            del module.forward
    try:
        yield
    finally:
        skipped = getattr(model, "_skip_keys_device_placement", None)
        dispatch_model(model, dict(model.hf_device_map), skip_keys=skipped, force_hooks=True)


def run_where_they_lie(model: torch.nn.Module, places: Mapping[str, int]) -> None:
    """Make each GPU the current one while its modules run: kernels that ask for no device are launched there."""
    for name, place in places.items():
        _Current(place).around(model.get_submodule(name))


class _Current:
    """Makes a GPU the current one around the forward pass of a module."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._before: list[int] = []

    def around(self, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: object) -> None:
        self._before.append(torch.cuda.current_device())
        torch.cuda.set_device(self._place)

    def _leave(self, *_: object) -> None:
        torch.cuda.set_device(self._before.pop())
