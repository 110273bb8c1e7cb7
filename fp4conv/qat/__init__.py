"""Quantisation-aware training. The only room that imports torch, transformers, trl, peft, accelerate and modelopt.

Nothing imports it but the commands `qat` and `calibrate`, which do so when they run. Then Python puts the room where
`fp4conv.qat` was the command, so the room can be called, and is that command.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _Room(ModuleType):
    def __call__(self, *model: object, **options: object) -> object:
        from fp4conv.commands.qat import qat  # when called: the command imports this room

        return qat(*model, **options)  # type: ignore[arg-type]


sys.modules[__name__].__class__ = _Room
