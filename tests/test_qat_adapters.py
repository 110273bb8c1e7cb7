"""Adapters on quantised layers: what the quantiser sees in training is what merging makes, value by value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft")

import torch
from transformers import AutoModelForCausalLM

import fp4conv
from fp4conv.qat.adapters import targets_of, with_adapters
from fp4conv.qat.backend import Recipe, open_backend
from fp4conv.qat.made import Task, write_model
from fp4conv.qat.models import empty_model
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


ATTENTION = [f"self_attn.{letter}_proj" for letter in "qkvo"]
FEED_FORWARD = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
EXPERTS = [f"mlp.experts.{name}_proj" for name in ("gate_up", "down")]


@pytest.mark.parametrize(
    ("family", "options", "layers", "leaves"),
    [
        ("llama", {}, (0, 1), [*ATTENTION, *FEED_FORWARD]),
        ("llama", {"lora_layers": (1,)}, (1,), [*ATTENTION, *FEED_FORWARD]),
        ("llama", {"lora_modules": ("up_proj", "q_proj")}, (0, 1), [ATTENTION[0], FEED_FORWARD[1]]),
        ("gpt-oss", {}, (0, 1), [*ATTENTION, *EXPERTS]),
        ("gpt-oss", {"lora_layers": (0,), "lora_modules": "none"}, (0,), EXPERTS),
        ("qwen3-moe", {"lora_experts": False}, (0, 1), ATTENTION),
        ("qwen3-moe", {}, (0, 1), [*ATTENTION, *EXPERTS]),
    ],
    ids=str,
)
def test_every_layer_asked_for_gets_an_adapter_and_no_other(
    tmp_path: Path, family: str, options: dict[str, object], layers: list[int], leaves: list[str]
) -> None:
    """Beside a linear layer; where that is quantised, and for experts, added to the weight."""
    write_model(tmp_path, TASK, family=family)
    settings = settings_from({"lora": True, **options})
    model = empty_model(tmp_path, settings)
    names = [f"model.layers.{layer}.{leaf}" for layer in layers for leaf in leaves]
    linear, experts = ([name for name in names if (".experts." in name) == expert] for expert in (False, True))
    found = targets_of(model, settings, ())
    assert sorted(found.modules) == sorted(linear)
    assert sorted(found.parameters) == sorted(experts)
    quantised = targets_of(model, settings, [name for name, _ in model.named_parameters()])
    assert quantised.modules == ()
    assert sorted(quantised.parameters) == sorted([*(f"{name}.weight" for name in linear), *experts])


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
