"""ModelOpt without a GPU: its one CUDA kernel of fake quantisation by fp4conv's arithmetic, all else its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fp4conv.qat.fake_quant import fake_quantise


def put_kernel(put: Callable[[object, str, object], object]) -> None:
    """Put it in place by `put`: setattr, or that of a monkeypatch."""
    from modelopt.torch.quantization import tensor_quant

    from fp4conv.qat import modelopt

    put(tensor_quant, "dynamic_block_quantize_op", _kernel)
    put(modelopt, "missing_kernels", lambda: None)


def _kernel(x: torch.Tensor, block: int, amax: torch.Tensor | None, *_: int) -> torch.Tensor:
    if amax is None:
        return fake_quantise(x, "mxfp4")
    return fake_quantise(x, "nvfp4", amax.float().reshape(()))
