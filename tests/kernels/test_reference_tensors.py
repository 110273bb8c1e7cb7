"""The compiled kernels against tensors that ModelOpt and transformers wrote (see fixtures/PROVENANCE.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_cases import encode
from safetensors import safe_open

from fp4conv.formats import MXFP4, NVFP4, NVFP4_AMAX_DIVISOR, ScaleRule, Ties
from fp4conv.kernels import compiled
from fp4conv.kernels.window import choose_window, new_window_counts

Tensors = dict[str, torch.Tensor]
Find = Callable[[str], Path]
SETS = re.compile(r"\b([qkv]|gate|up)_proj\.weight$")  # q/k/v and gate/up of one module share a tensor scale
EXPERTS = ["gate_up_proj", "down_proj"]


def load(folder: Path) -> Tensors:
    found: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            found.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    return found


def raw(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A tensor of bytes: codes, or scales of either kind."""
    found: npt.NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return found


def bf16(tensor: torch.Tensor) -> npt.NDArray[np.uint16]:
    assert tensor.dtype == torch.bfloat16
    found: npt.NDArray[np.uint16] = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return found


def amax_scale(tensors: list[torch.Tensor]) -> float:
    amax = max(compiled.amax(bf16(t))[0] for t in tensors)
    return float(np.float32(amax) / np.float32(NVFP4_AMAX_DIVISOR))


@pytest.mark.parametrize("model", ["llama", "qwen3moe", "gptoss"])
def test_nvfp4_of_linear_layers_equals_the_export(reference: Find, model: str) -> None:
    """Byte for byte, tensor scales included: the maximum over q/k/v and over gate/up."""
    source, export = load(reference(f"{model}-bf16")), load(reference(f"{model}-nvfp4-default"))
    names = [name for name in export if f"{name}_scale" in export]
    assert names
    for name in names:
        members = [name]
        if kind := SETS.search(name):
            siblings = ["q", "k", "v"] if kind[1] in "qkv" else ["gate", "up"]
            members = [f"{name[: kind.start()]}{s}_proj.weight" for s in siblings]
        scale = amax_scale([source[m] for m in members])
        assert scale == export[f"{name}_scale_2"].item(), name
        found = encode(compiled, NVFP4, bf16(source[name]), ScaleRule.AMAX, tensor_scale=scale)
        assert found.position == -1
        assert np.array_equal(found.packed, raw(export[name])), name
        assert np.array_equal(found.scales, raw(export[f"{name}_scale"])), name


@pytest.mark.parametrize("weight", EXPERTS)
def test_nvfp4_of_experts_equals_the_export(reference: Find, weight: str) -> None:
    """[E, K, N] in, packed along K without turning: K-major in and out."""
    source, export = load(reference("gptoss-bf16")), load(reference("gptoss-nvfp4-mlp-only"))
    name = f"model.layers.0.mlp.experts.{weight}"
    scale = amax_scale([source[name]])
    assert scale == export[f"{name}_weight_scale_2"].item()
    for expert in range(source[name].shape[0]):
        x = bf16(source[name][expert])
        found = encode(compiled, NVFP4, x, ScaleRule.AMAX, tensor_scale=scale, x_kn=True, out_kn=True)
        assert np.array_equal(found.packed, raw(export[name][expert]))
        assert np.array_equal(found.scales, raw(export[f"{name}_weight_scale"][expert]))


@pytest.mark.parametrize("weight", EXPERTS)
def test_mxfp4_of_experts_equals_the_converter(reference: Find, weight: str) -> None:
    """RCEIL with ties down from K-major BF16: scales byte for byte, codes up to the sign of zero."""
    source, export = load(reference("gptoss-qat-fakequant-mxfp4")), load(reference("gptoss-mxfp4"))
    name = f"model.layers.0.mlp.experts.{weight}"
    for expert in range(source[name].shape[0]):
        found = encode(compiled, MXFP4, bf16(source[name][expert]), ScaleRule.RCEIL, Ties.DOWN, x_kn=True)
        scales, packed = raw(export[f"{name}_scales"][expert]), raw(export[f"{name}_blocks"][expert])
        packed = packed.reshape(found.packed.shape)
        assert np.array_equal(found.scales, scales)
        theirs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(found.codes.shape)
        assert ((found.codes == theirs) | ((found.codes | theirs) & 7 == 0)).all()


@pytest.mark.parametrize("weight", EXPERTS)
def test_bf16_of_mxfp4_equals_transformers(reference: Find, weight: str) -> None:
    source, export = load(reference("gptoss-mxfp4")), load(reference("gptoss-bf16-from-mxfp4"))
    name = f"model.layers.0.mlp.experts.{weight}"
    for expert in range(export[name].shape[0]):
        expected = bf16(export[name][expert])  # [K, N]
        packed = raw(source[f"{name}_blocks"][expert]).reshape(expected.shape[1], -1)
        out = np.empty(expected.shape, dtype=np.uint16)
        assert compiled.decode_mxfp4(packed, raw(source[f"{name}_scales"][expert]), False, out, out_kn=True) == -1
        assert np.array_equal(out, expected)


@pytest.mark.parametrize("weight", EXPERTS)
def test_transcode_has_the_values_of_modelopts_cast(reference: Find, weight: str) -> None:
    """Equal values in float32 wherever nothing is lost; ModelOpt's tensor scale is the same power of two."""
    source, cast = load(reference("gptoss-mxfp4-native-like")), load(reference("gptoss-nvfp4-cast-from-mxfp4"))
    name = f"model.layers.0.mlp.experts.{weight}"
    blocks, scales = raw(source[f"{name}_blocks"]), raw(source[f"{name}_scales"])
    experts, n = blocks.shape[:2]
    starts, ends = new_window_counts()
    assert compiled.window_counts(blocks, scales, starts, ends) == -1
    m, lossy_halves = choose_window(starts, ends)
    lost = 0
    for expert in range(experts):
        packed = np.ascontiguousarray(blocks[expert].reshape(n, -1))
        k = packed.shape[1] * 2
        new_packed, new_scales = np.empty((k // 2, n), dtype=np.uint8), np.empty((k // 16, n), dtype=np.uint8)
        signal, noise = np.empty(n), np.empty(n)
        mx_scales = np.ascontiguousarray(scales[expert])
        lost += compiled.transcode_mxfp4_nvfp4(packed, mx_scales, m, new_packed, new_scales, signal, noise, True)
        exact, ours, theirs = (np.empty((n, k), dtype=np.float32) for _ in range(3))
        compiled.decode_mxfp4(packed, mx_scales, False, exact)
        compiled.decode_nvfp4(new_packed, new_scales, True, 2.0**m, ours)
        scale_2 = cast[f"{name}_weight_scale_2"].item()
        theirs_packed, theirs_scales = raw(cast[name][expert]), raw(cast[f"{name}_weight_scale"][expert])
        compiled.decode_nvfp4(theirs_packed, theirs_scales, True, scale_2, theirs)
        held = (ours == exact).reshape(n, -1, 16).all(axis=2)
        assert held.size - held.sum() <= lossy_halves
        agree = (theirs == exact).reshape(n, -1, 16).all(axis=2)
        assert held[agree].all(), "whatever ModelOpt's cast holds, so do we"
        assert noise[held.all(axis=1)].max(initial=0) == 0
    assert lost == lossy_halves
