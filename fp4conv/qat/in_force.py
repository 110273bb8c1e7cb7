"""Whether a forward pass uses the quantised values, all of them and nothing else.

A quantiser can be right and yet be passed by: where a model reads a weight outside of the module that holds it, as
fused kernels do, training would see the master. So the logits of the fake-quantised model are compared with those of
the same model with the quantised values put in place of its masters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fp4conv.errors import PlanError, ValuesError
from fp4conv.qat.backend import Backend, Batch


def bake(model: torch.nn.Module, backend: Backend) -> None:
    """Put the values of the forward pass in place of the masters, and switch the weight quantisers off."""
    with torch.no_grad():
        for name, values in backend.weights(model):
            model.get_parameter(name).copy_(values)
    backend.set_weights(model, False)


def check_in_force(model: torch.nn.Module, backend: Backend, batch: Batch) -> None:
    """PlanError where some path of the forward pass over `batch` goes past a weight's quantiser. `model` is baked.

    ValuesError where its logits have a NaN, of which nothing could be told.

    A device may add in another order each time, which is asked not to; what two passes over the same values differ by
    nevertheless is let pass.
    """
    with _repeatable():
        with _idle(model) as idle:
            first = _logits(model, batch)
        noise = _largest(first, _logits(model, batch))
        bake(model, backend)
        found = _largest(first, _logits(model, batch))
    if math.isnan(found):
        raise ValuesError(
            "its logits for the first training example are no numbers, with fake quantisers on",
            where=type(model).__name__,
            hint="look at its weights with fp4conv inspect; values beyond BF16 want --dtype float32",
        )
    if found > 2 * noise:
        named = f", such as {min(idle)}" if idle else ""
        raise PlanError(
            f"its logits change by {found:.3g} when quantised weights take the masters' place: the forward pass reads "
            f"a weight past its quantiser{named}, and training would too",
            where=type(model).__name__,
            hint="leave that module out with --exclude 'GLOB', or choose another --attn-implementation",
        )


def _logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits.float()
    return found


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; NaN where one has a NaN. An output that is masked with -inf in both is no difference."""
    return float(torch.where(one == other, 0.0, one - other).abs().max())


@contextmanager
def _repeatable() -> Iterator[None]:
    """While it lasts torch takes algorithms that repeat themselves, where it has any."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of each operation that has none
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _idle(model: torch.nn.Module) -> Iterator[set[str]]:
    """The weight quantisers of `model` that have not run since it began."""
    idle = {name for name, _ in model.named_modules() if "weight_quantizer" in name.rpartition(".")[2]}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: idle.discard(name)) for name in idle
    ]
    try:
        yield idle
    finally:
        for handle in handles:
            handle.remove()
