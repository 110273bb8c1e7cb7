"""trl's SFTTrainer with ModelOpt's additions, and what a run on ModelOpt's wrappers needs beside them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

_REPLACED = ((torch.nn.functional, "linear"), (torch, "bmm"), (torch.Tensor, "__matmul__"))


def trainer_class() -> type:
    from modelopt.torch.quantization.plugins.trl import QATSFTTrainer

    class Trainer(QATSFTTrainer):
        """Recomputes layers to their end, and does not print which files ModelOpt writes and misses.

        ModelOpt's wrappers of experts put their own functions in the place of torch's (linear, bmm, matmul) for the
        time of a call, and put those back only where nothing is raised. Gradient checkpointing raises: it ends a
        layer's recomputation so, once it has what backward needs, which is inside the experts. What then stays in
        torch's place quantises the products of other modules: Qwen3-MoE's routers chose other experts in the next
        recomputation. What an error leaves there is put back, for who trains again in the same process.
        """

        def __init__(self, *args: object, **kwargs: object) -> None:
            with _unsaid():
                super().__init__(*args, **kwargs)

        def train(self, *args: object, **kwargs: object) -> object:
            with _unsaid(), _put_back(), set_checkpoint_early_stop(False):
                return super().train(*args, **kwargs)

        def save_model(self, *args: object, **kwargs: object) -> None:
            with _unsaid():
                super().save_model(*args, **kwargs)

    return Trainer


def _unsaid() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """What ModelOpt replaces is afterwards what it was before."""
    own = [(owner, name, getattr(owner, name)) for owner, name in _REPLACED]
    try:
        yield
    finally:
        for owner, name, function in own:
            if getattr(owner, name) is not function:
                setattr(owner, name, function)
