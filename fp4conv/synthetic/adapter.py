"""A random LoRA adapter for a synthetic gpt-oss checkpoint: attention, and all experts by peft's rank packing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fp4conv.synthetic.shapes import Geometry, Tensor, attention, weight

PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapter_tensors(geometry: Geometry, rank: int) -> list[Tensor]:
    """BF16 factors of every attention projection and expert parameter, under peft's names."""
    assert geometry.family == "gpt-oss", "experts packed in one parameter are what gpt-oss has"
    tensors: list[Tensor] = []
    for layer in range(geometry.layers):
        prefix = f"base_model.model.model.layers.{layer}."
        for tensor in attention(geometry, prefix + "self_attn."):
            if tensor.name.endswith(".weight"):
                rows, columns = tensor.spec.shape
                tensors += pair(tensor.name.removesuffix(".weight"), rows, columns, rank)
        packed, hidden, inner = rank * geometry.experts, geometry.hidden, geometry.intermediate
        # The outer wrapper is down_proj's, the inner one gate_up_proj's.
        tensors += pair(f"{prefix}mlp.experts.base_layer", 2 * inner, hidden, packed)
        tensors += pair(f"{prefix}mlp.experts", hidden, inner, packed)
    return tensors


def pair(module: str, rows: int, columns: int, rank: int) -> Iterator[Tensor]:
    yield weight(f"{module}.lora_A.weight", rank, columns)
    yield weight(f"{module}.lora_B.weight", rows, rank)


def write_config(out: Path, rank: int) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(MODULES),
        "target_parameters": list(PARAMETERS),
        "peft_version": "0.21.2",
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
