"""What the runner asks of a fake quantiser, whoever provides it (`modelopt` on CUDA, `fp4conv` anywhere).

A backend works on a loaded transformers model, in place. Its masters keep their names, shapes and dtypes: the
state_dict of a prepared model has those of the plain model, and at most buffers of quantisers beside them. A weight
is named as the model's own parameters are ('model.layers.0.mlp.experts.gate_up_proj'), whatever a checkpoint calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fp4conv.errors import UsageError
from fp4conv.qat.settings import BACKENDS

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """What is fake-quantised, and how. `format_name`: 'mxfp4' or 'nvfp4'.

    `quant_cfg`: a ModelOpt constant or recipe, which then says what is quantised, inputs too. None: weights only, those
    that `scope` ('experts', 'mlp', 'all'; None: the family's own) and the globs name, as `fp4conv convert` selects.
    """

    format_name: str
    quant_cfg: str | None = None
    scope: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizedWeight:
    """A master, and what the forward pass makes of it. Blocks run along `axis` (-1 or -2).

    `amax`: float32 [], or [E] where `each` of the experts [E, N, K] has a tensor scale of its own; None for MXFP4.
    """

    name: str
    format_name: str
    axis: int
    each: bool
    amax: torch.Tensor | None
    master: torch.Tensor
    values: torch.Tensor


class Backend(Protocol):
    """One provider of fake quantisers. Each method raises the errors of fp4conv.errors."""

    @property
    def name(self) -> str:
        """One of BACKENDS."""

    def check(self, recipe: Recipe) -> None:
        """Refuse, before a model is loaded, what this backend cannot do here: an unknown recipe, no GPU, no package."""

    def calibrates(self, recipe: Recipe) -> bool:
        """Whether `recipe` needs `calibrate` before training (NVFP4: tensor scales), rather than nothing (MXFP4)."""

    def prepare(self, model: torch.nn.Module, recipe: Recipe) -> None:
        """Put fake quantisers on `model`. Adapters go on later, and then `see_adapters` is called."""

    def calibrate(self, model: torch.nn.Module, batches: Iterable[Batch]) -> None:
        """Set the amax of weights, and of inputs from forward passes over `batches`; share it in sets; freeze it."""

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write into `folder` what `load` needs, and what `convert` reads beside the masters to repeat the forward."""

    def load(self, model: torch.nn.Module, folder: Path) -> None:
        """Put on a plain `model` the quantisers that `save` wrote, amax and all: in place of prepare and calibrate."""

    def see_adapters(self, model: torch.nn.Module) -> None:
        """Have `model`, which got adapters after its quantisers, quantise a weight with what adapters add to it."""

    def set_inputs(self, model: torch.nn.Module, enabled: bool) -> None:
        """Switch the quantisers of inputs and of the KV cache of `model` off or on again; weights stay quantised."""

    def set_weights(self, model: torch.nn.Module, enabled: bool) -> None:
        """Switch the weight quantisers of `model` off or on again; inputs stay as they are.

        So a model whose weights were decoded from an export can run under the input quantisers of its training.
        """

    def trainer(self) -> type:
        """The class of trl's SFTTrainer, or one of its descendants, that trains a prepared model."""

    def names(self, model: torch.nn.Module) -> list[str]:
        """The names of the quantised weights, which takes no value of them: they may be elsewhere."""

    def weights(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Each quantised weight: the master's name, and the values that the forward pass uses, in its dtype."""

    def quantized(self, model: torch.nn.Module) -> Iterator[QuantizedWeight]:
        """The same with all that decides the values: what `checks` compares with the codec and with an export."""


def open_backend(name: str) -> Backend:
    """The backend `name`; UsageError for another name or where its packages are missing."""
    if name not in BACKENDS:
        raise UsageError(f"--backend: there is no backend {name!r}", hint=f"choose {' or '.join(BACKENDS)}")
    if name == "fp4conv":
        from fp4conv.qat.own import Fp4convBackend

        return Fp4convBackend()
    from fp4conv.qat.modelopt import ModelOptBackend

    return ModelOptBackend()
