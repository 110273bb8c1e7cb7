"""Kernels that vLLM has for GPUs only, in plain torch, so that its CPU build can run what its own code has loaded.

vLLM's reading of configs, its choice of layer classes, its loading and its forward pass stay as they are. Replaced is
the product of one layer alone:

- NVFP4 linear layers, W4A4: vLLM's own emulation, which it registers for other platforms;
- NVFP4 linear layers, W4A16 (Marlin needs a GPU): its own decoding of NVFP4, then a product in 16 bits;
- MXFP4 linear layers (its emulation needs amd-quark): decoding, then a product in 16 bits, as Marlin computes;
- MXFP4 experts (its CPU kernel needs AMX): decoding, then its own CPU kernel for experts in 16 bits;
- NVFP4 experts: its own decoding, then the same kernel, with inputs in 16 bits as Marlin has them.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import mxfp4 as mxfp4_kernels
from vllm.model_executor.kernels.linear import nvfp4 as nvfp4_kernels
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization import modelopt as modelopt_layers
from vllm.model_executor.layers.quantization import mxfp4 as mxfp4_layers
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_mxfp4 as ct_mxfp4_layers,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as ct_nvfp4_layers,
)
from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils
from vllm.model_executor.utils import replace_parameter
from vllm.platforms.interface import PlatformEnum

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_mxfp4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """BF16 [..., K] of U8 codes [..., K/2] (two a byte, the even one low) and E8M0 scales [..., K/32]."""
    magnitudes = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float32)
    table = torch.cat([magnitudes, -magnitudes])
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    blocks = table[codes].unflatten(-1, (-1, 32))
    return torch.ldexp(blocks, scales.int().unsqueeze(-1) - 127).flatten(-2).to(torch.bfloat16)


class _AlwaysThere:
    """What vLLM asks a kernel class before it takes it."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: object) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """The weights stay as they were loaded."""


class PlainNvFp4W4A16(_AlwaysThere, nvfp4_kernels.NvFp4LinearKernel):
    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = nvfp4_emulation_utils.dequantize_to_dtype(
            layer.weight.data, layer.weight_scale.data, layer.weight_global_scale, x.dtype, swizzle=False
        )
        return torch.nn.functional.linear(x, weight, bias)


class PlainMxFp4(_AlwaysThere, mxfp4_kernels.MxFp4LinearKernel):
    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, decode_mxfp4(layer.weight, layer.weight_scale), bias)


class _DecodedExperts(CPUUnquantizedExperts):
    """vLLM's CPU kernel for 16-bit experts, which gets what the four-bit ones decode to."""

    @staticmethod
    def _supports_quant_scheme(weight_key: object, activation_key: object) -> bool:
        return True


class DecodedMxFp4Experts(_DecodedExperts):
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for name in ("w13_weight", "w2_weight"):
            packed, scales = getattr(layer, name), getattr(layer, f"{name}_scale")
            replace_parameter(layer, name, decode_mxfp4(packed, scales))
        super().process_weights_after_loading(layer)


class DecodedNvFp4Experts(_DecodedExperts):
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for name in ("w13_weight", "w2_weight"):
            packed, scales = getattr(layer, name), getattr(layer, f"{name}_scale")
            tensor_scales = getattr(layer, f"{name}_scale_2")
            values = nvfp4_emulation_utils.dequantize_to_dtype(
                packed.data, scales.data, tensor_scales.data, torch.bfloat16, swizzle=False
            )
            replace_parameter(layer, name, values)
        super().process_weights_after_loading(layer)


def register() -> None:
    linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    linear.register_linear_kernel(PlainMxFp4, PlatformEnum.CPU, "mxfp4")
    linear.MarlinNvFp4LinearKernel = PlainNvFp4W4A16
    mxfp4_layers.select_mxfp4_moe_backend = lambda *args, **kwargs: (Mxfp4MoeBackend.EMULATION, DecodedMxFp4Experts)
    ct_mxfp4_layers.MarlinExperts = DecodedMxFp4Experts
    ct_mxfp4_layers.prepare_moe_fp4_layer_for_marlin = lambda layer: None
    for layers in (modelopt_layers, ct_nvfp4_layers):
        layers.select_nvfp4_moe_backend = lambda *args, **kwargs: (NvFp4MoeBackend.EMULATION, DecodedNvFp4Experts)
