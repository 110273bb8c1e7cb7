"""Merges against peft itself, for what has no golden: DoRA, biases, rank stabilisation, other dtypes, GPT-2."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import assert_merged_alike
from checkpoints import array_of, read_raw, write_shard

import fp4conv

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Case:
    """`config`: fields of LoraConfig. `adapter_dtype`: what the saved factors are cast to."""

    model: str = "llama"
    dtype: str = "bfloat16"
    adapter_dtype: str = "F32"
    config: dict[str, Any] = field(default_factory=dict)


LINEAR = ["q_proj", "v_proj", "down_proj"]
BOTH_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "dora": Case(config={"use_dora": True}),
    "dora on an F32 base": Case(dtype="float32", config={"use_dora": True}),
    "rank-stabilised": Case(config={"use_rslora": True}),
    "both patterns, rank-stabilised": Case(
        config={
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {r"layers\.0\.self_attn\..*": 24, "down_proj": 5},
        }
    ),
    "bias of lora_B": Case(config={"lora_bias": True}),
    "trained biases beneath the adapter": Case(config={"bias": "lora_only"}),
    "all biases trained": Case(config={"bias": "all"}),
    "BF16 factors": Case(adapter_dtype="BF16"),
    "F16 factors, F16 base": Case(dtype="float16", adapter_dtype="F16"),
    "F32 base": Case(dtype="float32"),
    "embedding": Case(config={"target_modules": ["embed_tokens", "q_proj"]}),
    "a parameter of two axes": Case(config={"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "saved modules": Case(config={"modules_to_save": ["lm_head", "norm"]}),
    "fan in, fan out": Case("gpt2", config={"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fan in, fan out, dora": Case(
        "gpt2", config={"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}
    ),
    "experts of gpt-oss": Case(
        "gpt-oss",
        config={
            "target_modules": ["q_proj"],
            "target_parameters": BOTH_PARAMETERS,
            "rank_pattern": {r"0\.mlp\.experts\.down_proj": 3},
        },
    ),
    "experts of Mixtral, whose checkpoint has other names": Case(
        "mixtral", config={"target_modules": ["o_proj"], "target_parameters": BOTH_PARAMETERS}
    ),
    "square experts of Qwen3-MoE": Case(
        "square", config={"target_modules": ["o_proj"], "target_parameters": BOTH_PARAMETERS}
    ),
    "square experts of Qwen3-MoE, down_proj alone": Case(
        "square", config={"target_modules": ["o_proj"], "target_parameters": BOTH_PARAMETERS[1:]}
    ),
    "square experts of gpt-oss": Case(
        "square-gpt-oss", config={"target_modules": ["o_proj"], "target_parameters": BOTH_PARAMETERS}
    ),
    "experts of Qwen3-MoE, one of two": Case(
        "qwen3-moe", config={"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    ),
}


def make_base(model: str, dtype: str, folder: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    experts = {**sizes, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
        ),
        "gpt-oss": lambda: transformers.GptOssConfig(**experts),
        "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**experts),
        "mixtral": lambda: transformers.MixtralConfig(**experts),
        "square": lambda: transformers.Qwen3MoeConfig(**{**experts, "moe_intermediate_size": 64}),
        "square-gpt-oss": lambda: transformers.GptOssConfig(**{**experts, "intermediate_size": 64}),
    }[model]()
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    made.save_pretrained(folder)


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def make_adapter(base: Path, case: Case, folder: Path, seed: int = 1) -> None:
    """An adapter with random values in everything that it trains, as peft saves it."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **case.config}
    model = peft.get_peft_model(load(base), peft.LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)
    model.save_pretrained(folder)
    if case.adapter_dtype != "F32":
        file = folder / "adapter_model.safetensors"
        kind = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}[case.adapter_dtype]
        write_shard(file, {name: array_of(raw).astype(kind) for name, raw in read_raw(folder).items()})


def merge_by_peft(base: Path, adapters: list[Path], folder: Path) -> None:
    model = load(base)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own, about models of this size and older names
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_peft_rounding_is_pefts(case: Case, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_base(case.model, case.dtype, base)
    make_adapter(base, case, adapter)
    merge_by_peft(base, [adapter], tmp_path / "theirs")
    to = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[case.dtype]
    fp4conv.convert(base, tmp_path / "out", to=to, lora=[adapter], merge_rounding="peft")
    ours, theirs = read_raw(tmp_path / "out"), read_raw(tmp_path / "theirs")
    if case.dtype == "bfloat16":
        assert sorted(ours) == sorted(theirs)
        assert_merged_alike(ours, theirs, read_raw(base))
        return
    for name, raw in theirs.items():  # finer dtypes show the order of F32 sums everywhere
        step = 2.0**-10 if case.dtype == "float16" else 2.0**-21
        found, expected = (array_of(one).astype(np.float64) for one in (ours[name], raw))
        assert np.allclose(found, expected, rtol=step, atol=step * float(abs(expected).max()) / 8), name


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_merged_in_order(tmp_path: Path) -> None:
    """DoRA's norms depend on what was merged before."""
    base = tmp_path / "base"
    make_base("llama", "bfloat16", base)
    first, second = tmp_path / "first", tmp_path / "second"
    make_adapter(base, Case(), first)
    make_adapter(base, Case(config={"use_dora": True}), second, seed=2)
    for name, adapters in (("ab", [first, second]), ("ba", [second, first])):
        merge_by_peft(base, adapters, tmp_path / f"theirs-{name}")
        fp4conv.convert(base, tmp_path / name, to="bf16", lora=adapters, merge_rounding="peft")
        assert_merged_alike(read_raw(tmp_path / name), read_raw(tmp_path / f"theirs-{name}"), read_raw(base))
    assert read_raw(tmp_path / "ab") != read_raw(tmp_path / "ba")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["dora", "experts of gpt-oss", "bias of lora_B"])
def test_rounding_once_is_the_exact_sum_rounded_to_the_target(case: str, tmp_path: Path) -> None:
    """Against peft in F64, which rounds nothing that shows."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_base(CASES[case].model, "bfloat16", base)
    make_adapter(base, CASES[case], adapter)
    model = load(base).double()
    merged = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
    expected = merged.merge_and_unload().state_dict()
    fp4conv.convert(base, tmp_path / "out", to="f32", lora=[adapter])
    ours = read_raw(tmp_path / "out")
    for name, value in expected.items():
        if name in ours:
            assert np.allclose(array_of(ours[name]).astype(np.float64), value.numpy(), rtol=1e-5, atol=1e-6), name
