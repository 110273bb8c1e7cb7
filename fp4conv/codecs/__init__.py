"""The bits of one weight. `codec_named` imports the compiled kernels, so planning never pays for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp4conv.codecs.base import Codec


def codec_named(format_name: str) -> Codec:
    """The codec of 'mxfp4' or 'nvfp4'."""
    from fp4conv.codecs.mxfp4 import Mxfp4
    from fp4conv.codecs.nvfp4 import Nvfp4

    return Mxfp4() if format_name == Mxfp4.format.name else Nvfp4()
