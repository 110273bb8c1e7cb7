"""Adapters on quantised layers: what the quantiser sees in training is what merging makes, value by value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft")

import torch
from transformers import AutoModelForCausalLM

import fp4conv
from fp4conv.qat.adapters import with_adapters
from fp4conv.qat.backend import Recipe, open_backend
from fp4conv.qat.made import Task, write_model
from fp4conv.qat.quantizers import FakeQuantizer
from fp4conv.qat.settings import settings_from

TASK = Task(rules=2, prime=11)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "bfloat16"), ("llama", "float32"), ("qwen3-moe", "bfloat16"), ("gpt-oss", "bfloat16")],
)
def test_the_quantiser_sees_the_merged_weight(tmp_path: Path, family: str, dtype: str) -> None:
    """With masters in float32 also under autocast, as a GPU trains them."""
    write_model(tmp_path / "made", TASK, family=family)
    to = "bf16" if dtype == "bfloat16" else "f32"
    fp4conv.convert(tmp_path / "made", tmp_path / "base", to=to)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    backend = open_backend("fp4conv")
    backend.prepare(model, Recipe("mxfp4"))
    quantized = [name for name, _ in backend.weights(model)]
    adapted = with_adapters(model, settings_from({"lora": True}), quantized)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype)
    seen: dict[str, torch.Tensor] = {}
    for module in adapted.modules():
        if isinstance(module, FakeQuantizer):
            module.register_forward_hook(lambda each, args, _: seen.update({each.name: args[0].detach()}))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
        loss = adapted(torch.arange(10)[None] + 4, labels=torch.arange(10)[None] + 4).loss
    loss.backward()
    passed = dict(seen)  # `quantized`, below, goes through the quantisers too
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    adapted.save_pretrained(tmp_path / "adapter")
    fp4conv.convert(
        tmp_path / "base", tmp_path / "merged", to=to, lora=[tmp_path / "adapter"], merge_rounding="training"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=getattr(torch, dtype))
    assert len(passed) == len(quantized)
    masters = {weight.name: weight.master for weight in backend.quantized(adapted)}
    for name in quantized:
        value = passed[name.removesuffix(".weight")]
        assert value.dtype == getattr(torch, dtype)
        different = value != merged.get_parameter(name)
        if ".experts." in name:  # peft multiplies BF16: another order of additions, another last place in 10^5
            assert different.float().mean() < 1e-4
            assert torch.allclose(value.float(), merged.get_parameter(name).float(), rtol=2**-7, atol=0)
        else:
            assert not different.any(), name
        assert not torch.equal(value, masters[name])


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    """Against float64: within half a last place of BF16, and no more than float32's own rounding beyond it."""
    write_model(tmp_path / "made", TASK, family="llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    backend = open_backend("fp4conv")
    backend.prepare(model, Recipe("mxfp4"))
    name = "model.layers.0.mlp.up_proj"
    adapted = with_adapters(model, settings_from({"lora": True}), [f"{name}.weight"])
    wrapper = adapted.get_submodule(f"base_model.model.{name}")
    a, b = (getattr(wrapper, f"lora_{letter}")["default"].weight for letter in "AB")
    b.data = torch.randn(b.shape, generator=torch.Generator().manual_seed(1)).mul(0.1).to(torch.bfloat16)
    master = wrapper.get_base_layer().weight
    exact = master.detach().double() + 2 * b.detach().double() @ a.detach().double()
    seen: list[torch.Tensor] = []
    quantizer = next(each for each in adapted.modules() if isinstance(each, FakeQuantizer) and each.name == name)
    quantizer.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    adapted(torch.arange(10)[None] + 4)
    step = np.exp2(np.floor(np.log2(np.abs(exact.numpy()))) - 7)
    assert (np.abs(seen[0].double().numpy() - exact.numpy()) <= step * (0.5 + 2**-12)).all()
