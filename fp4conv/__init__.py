"""fp4conv: language-model checkpoints between BF16, MXFP4 and NVFP4, without loading the model."""

from __future__ import annotations

from fp4conv.version import __version__

__all__ = ["__version__"]
