"""Steps of a run by themselves: what calibration looks at, and what training's forward pass goes through."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fp4conv.qat import steps
from fp4conv.qat.made import Task, tokenizer_for, write_model
from fp4conv.qat.settings import settings_from

TASK = Task(rules=2, prime=5)
SETTINGS: Mapping[str, object] = {
    "backend": "fp4conv",
    "format": "nvfp4",
    "quant_cfg": "NVFP4_DEFAULT_CFG",
    "dtype": "float32",
}


def test_calibration_sees_no_padding(tmp_path: Path) -> None:
    """Amax of inputs by torch's hooks, text by text; padding is made to stand out, and texts are of all lengths."""
    write_model(tmp_path / "model", TASK, family="llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
        model.model.embed_tokens.weight[0, 7] = 1  # after the norm no input can be larger
    model.save_pretrained(tmp_path / "model")
    texts = [" ".join(map(str, range(1, 2 + i % 4))) for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = settings_from(SETTINGS, {"model": str(tmp_path / "model"), "dataset": str(tmp_path / "d.jsonl")})
    places = steps.Places(tmp_path / "out")
    steps.calibrate(tmp_path / "model", places, settings)
    found = load_file(places.quantizers / "fp4conv/training.safetensors")

    seen: list[float] = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    tokenizer = tokenizer_for(TASK.words())
    with torch.no_grad():
        for text in set(texts):
            model(torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]))
    assert float(found["model.layers.0.self_attn.q_proj.input_quantizer._amax"]) == pytest.approx(max(seen))
