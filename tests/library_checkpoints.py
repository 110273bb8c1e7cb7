"""Checkpoints that other people's libraries write while a test runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def made_by_compressed_tensors(source: Path, out: Path, scheme: str) -> Path:
    """Have the library quantise and write `source` by one of its presets; scales of inputs differ from set to set."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    sets: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            parent, _, leaf = name.rpartition(".")
            sets.setdefault(f"{parent}.{FUSED.get(leaf, leaf)}", []).append(module)
    for number, members in enumerate(sets.values()):
        largest = max(module.weight.data.abs().max() for module in members)
        for module in members:
            values = module.quantization_scheme.weights
            blocks = module.weight.data.reshape(module.weight.shape[0], -1, values.group_size)
            whole = None
            if hasattr(module, "weight_global_scale"):
                whole = module.weight_global_scale.data = generate_gparam(-largest, largest)
            if hasattr(module, "input_global_scale"):
                module.input_global_scale.data = torch.tensor([100.0 + number / 7])
            least, most = blocks.amin(-1), blocks.amax(-1)
            scale, _ = calculate_qparams(least, most, values, global_scale=whole)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out, state_dict=model.state_dict())
    compressor.update_config(out)
    return out
