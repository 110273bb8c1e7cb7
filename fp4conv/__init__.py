"""fp4conv: language-model checkpoints between BF16, MXFP4 and NVFP4, without loading the model.

`convert`, `merge_lora`, `inspect`, `verify`, `diff`, `push`, `qat` and `calibrate` are the commands as functions, and
`open` reads single tensors. They are imported when first asked for, so that `import fp4conv` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fp4conv.version import __version__

if TYPE_CHECKING:
    from fp4conv.commands.calibrate import calibrate
    from fp4conv.commands.convert import convert
    from fp4conv.commands.diff import diff
    from fp4conv.commands.inspect import inspect
    from fp4conv.commands.merge_lora import merge_lora
    from fp4conv.commands.open import Checkpoint, open
    from fp4conv.commands.push import push
    from fp4conv.commands.qat import qat
    from fp4conv.commands.verify import verify
    from fp4conv.errors import Fp4convError
    from fp4conv.report.converted import ConvertResult
    from fp4conv.report.verified import Verified

__all__ = [
    "Checkpoint",
    "ConvertResult",
    "Fp4convError",
    "Verified",
    "__version__",
    "calibrate",
    "convert",
    "diff",
    "inspect",
    "merge_lora",
    "open",
    "push",
    "qat",
    "verify",
]

_HOMES = {
    "calibrate": "fp4conv.commands.calibrate",
    "convert": "fp4conv.commands.convert",
    "diff": "fp4conv.commands.diff",
    "inspect": "fp4conv.commands.inspect",
    "merge_lora": "fp4conv.commands.merge_lora",
    "open": "fp4conv.commands.open",
    "push": "fp4conv.commands.push",
    "qat": "fp4conv.commands.qat",
    "verify": "fp4conv.commands.verify",
    "Checkpoint": "fp4conv.commands.open",
    "ConvertResult": "fp4conv.report.converted",
    "Verified": "fp4conv.report.verified",
    "Fp4convError": "fp4conv.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fp4conv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
