"""trl's SFTTrainer with ModelOpt's additions."""

from __future__ import annotations

import contextlib
import io


def trainer_class() -> type:
    from modelopt.torch.quantization.plugins.trl import QATSFTTrainer

    class Trainer(QATSFTTrainer):
        """Does not print which files ModelOpt writes and misses."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            with _unsaid():
                super().__init__(*args, **kwargs)

        def train(self, *args: object, **kwargs: object) -> object:
            with _unsaid():
                return super().train(*args, **kwargs)

        def save_model(self, *args: object, **kwargs: object) -> None:
            with _unsaid():
                super().save_model(*args, **kwargs)

    return Trainer


def _unsaid() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())
