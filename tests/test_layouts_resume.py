"""Conversions between layouts go on after a stop, with the bytes of a run that was not stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Array, array_of, config_of, e4m3, noise, read_raw, tree, write_model

import fp4conv

Reference = Callable[[str], Path]
CASES = {
    "to OpenAI's layout": ("gptoss-bf16", {"to": "mxfp4", "layout": "openai-original"}),
    "to compressed-tensors": ("llama-nvfp4-default", {"to": "nvfp4", "layout": "compressed-tensors"}),
    "repaired": ("apart", {"to": "nvfp4", "repair": True}),
    "from FP8": ("fp8", {"to": "nvfp4"}),
}


class Stopped(Exception):
    """What the test raises in the middle."""


def fp8(folder: Path) -> Path:
    tensors: dict[str, Array] = {}
    for layer in range(4):
        for leaf in ("gate_proj", "up_proj"):
            stem = f"model.layers.{layer}.mlp.{leaf}"
            tensors[f"{stem}.weight"] = e4m3(noise((256, 128), layer).astype(np.float32) * 64)
            tensors[f"{stem}.weight_scale_inv"] = np.full((2, 1), 0.01, np.float32)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return write_model(folder, tensors, {"model_type": "llama", "quantization_config": quantization})


def apart(source: Path, folder: Path) -> Path:
    tensors = {name: array_of(value) for name, value in read_raw(source).items()}
    for name in [name for name in tensors if name.endswith("v_proj.weight_scale_2")]:
        tensors[name] = np.asarray(tensors[name].astype(np.float32) * np.float32(0.5), np.float32)
    return write_model(folder, tensors, config_of(source))


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed(reference: Reference, tmp_path: Path, case: str) -> None:
    name, options = CASES[case]
    if name == "fp8":
        source = fp8(tmp_path / "src")
    elif name == "apart":
        source = apart(reference("llama-nvfp4-default"), tmp_path / "src")
    else:
        source = reference(name)
    fp4conv.convert(source, tmp_path / "whole", **options)  # type: ignore[arg-type]
    for stops_after in (1, 4, 9):
        calls = 0

        def stop(_: int, limit: int = stops_after) -> None:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Stopped

        with pytest.raises(Stopped):
            fp4conv.convert(source, tmp_path / "again", on_bytes=stop, workers=1, **options)  # type: ignore[arg-type]
    assert (tmp_path / "again.partial").exists()
    fp4conv.convert(source, tmp_path / "again", **options)  # type: ignore[arg-type]
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")
