"""Merges into bases that are quantised already: NVFP4 sets touched in part, FP8 tiles, OpenAI's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapters import factors, write_adapter
from checkpoints import Array, array_of, config_of, e4m3, noise, read_raw, write_model

import fp4conv
from fp4conv.errors import Fp4convError, ValuesError

Reference = Callable[[str], Path]
LAYER = "model.layers.0"
SET = ("q_proj", "k_proj", "v_proj")


def attention(rows: int = 64) -> dict[str, Array]:
    return {f"{LAYER}.self_attn.{name}.weight": noise((rows, 64), seed) for seed, name in enumerate(SET)}


def q_adapter(folder: Path, scale: float) -> Path:
    return write_adapter(folder, factors(f"{LAYER}.self_attn.q_proj", 64, 64, scale=scale))


def values(folder: Path, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    with fp4conv.open(folder) as checkpoint:
        return checkpoint.read(f"{LAYER}.self_attn.{name}.weight").astype(np.float64)


def merged_exactly(base: Path, adapter: Path, folder: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    fp4conv.convert(base, folder, to="f32", lora=[adapter])
    return values(folder, "q_proj")


@pytest.fixture(params=["modelopt", "compressed-tensors"])
def nvfp4(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """q/k/v under one tensor scale, stored plainly or as a reciprocal."""
    source = write_model(tmp_path / "source", attention())
    fp4conv.convert(source, tmp_path / "nvfp4", to="nvfp4", layout=request.param)
    return tmp_path / "nvfp4"


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_a_set_touched_in_part_keeps_its_tensor_scale(nvfp4: Path, tmp_path: Path, layout: str) -> None:
    adapter = q_adapter(tmp_path / "adapter", 0.01)
    result = fp4conv.merge_lora(nvfp4, adapter, tmp_path / "out", layout=layout)
    assert set(result.merged) == {f"{LAYER}.self_attn.q_proj.weight"}
    for name in SET[1:]:
        assert np.allclose(values(tmp_path / "out", name), values(nvfp4, name), rtol=1e-6, atol=0)  # reciprocals round
    fp4conv.convert(nvfp4, tmp_path / "again", to="nvfp4", layout=layout)
    ours, untouched = read_raw(tmp_path / "out"), read_raw(tmp_path / "again")
    differing = {tensor for tensor in untouched if ours[tensor] != untouched[tensor]}
    assert differing
    assert all("q_proj" in tensor and not tensor.endswith(("scale_2", "global_scale")) for tensor in differing)
    expected = merged_exactly(nvfp4, adapter, tmp_path / "f32")
    found = values(tmp_path / "out", "q_proj")
    assert ((found - expected) ** 2).sum() < 0.02 * (expected**2).sum()


def test_what_no_adapter_touches_keeps_its_bytes_and_its_names(nvfp4: Path, tmp_path: Path) -> None:
    """In another layout the tensor scales would be reciprocals, which round."""
    adapter = q_adapter(tmp_path / "adapter", 0.01)
    fp4conv.merge_lora(nvfp4, adapter, tmp_path / "out")
    before, after = read_raw(nvfp4), read_raw(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all("q_proj" in name and not name.endswith(("scale_2", "global_scale")) for name in changed)
    assert config_of(tmp_path / "out").keys() == config_of(nvfp4).keys()
    assert fp4conv.merge_lora(nvfp4, adapter, tmp_path / "served", for_server="vllm").layout == "modelopt"
    fp4conv.merge_lora(nvfp4, adapter, tmp_path / "named", to="nvfp4")
    assert read_raw(tmp_path / "named") == after


def test_another_format_has_its_own_layout(nvfp4: Path, tmp_path: Path) -> None:
    adapter = q_adapter(tmp_path / "adapter", 0.01)
    assert fp4conv.merge_lora(nvfp4, adapter, tmp_path / "bf16", to="bf16").layout == "hf"
    assert fp4conv.merge_lora(nvfp4, adapter, tmp_path / "mxfp4", to="mxfp4").layout == "compressed-tensors"


def test_a_value_too_large_for_the_kept_scale_is_an_error_and_repair_the_way_out(nvfp4: Path, tmp_path: Path) -> None:
    adapter = q_adapter(tmp_path / "adapter", 1.0)
    with pytest.raises(
        ValuesError, match=r"shares with weights that the adapter leaves alone(.|\n)*--repair"
    ) as caught:
        fp4conv.merge_lora(nvfp4, adapter, tmp_path / "out")
    assert caught.value.where == f"{LAYER}.self_attn.q_proj.weight"
    result = fp4conv.merge_lora(nvfp4, adapter, tmp_path / "repaired", repair=True, layout="modelopt")
    assert any("2 weights that no adapter touches were requantised" in warning for warning in result.warnings)
    raw = read_raw(tmp_path / "repaired")
    assert len({raw[f"{LAYER}.self_attn.{name}.weight_scale_2"][2] for name in SET}) == 1
    for name in SET[1:]:
        before = values(nvfp4, name)
        assert ((values(tmp_path / "repaired", name) - before) ** 2).sum() < 0.02 * (before**2).sum()
    expected = merged_exactly(nvfp4, adapter, tmp_path / "f32")
    found = values(tmp_path / "repaired", "q_proj")
    assert ((found - expected) ** 2).sum() < 0.02 * (expected**2).sum()


def test_a_set_touched_whole_gets_a_new_scale(nvfp4: Path, tmp_path: Path) -> None:
    tensors: dict[str, Array] = {}
    for seed, name in enumerate(SET):
        tensors |= factors(f"{LAYER}.self_attn.{name}", 64, 64, seed=seed, scale=1.0)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    fp4conv.merge_lora(nvfp4, adapter, tmp_path / "out", layout="modelopt", scale_rule="amax")
    fp4conv.convert(nvfp4, tmp_path / "f32", to="f32", lora=[adapter])
    largest = max(abs(values(tmp_path / "f32", name)).max() for name in SET)
    raw = read_raw(tmp_path / "out")
    for name in SET:
        scale = array_of(raw[f"{LAYER}.self_attn.{name}.weight_scale_2"]).astype(np.float32)
        assert scale == np.float32(largest) / np.float32(2688)


def fp8_base(folder: Path) -> tuple[Path, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """One linear layer in tiles of 128 x 128, and its values."""
    codes = e4m3(np.random.default_rng(1).standard_normal((256, 256)) * 100)
    scales = np.array([[0.001, 0.002], [0.004, 0.0005]], np.float32)
    tensors = {
        f"{LAYER}.self_attn.q_proj.weight": codes,
        f"{LAYER}.self_attn.q_proj.weight_scale_inv": scales,
        "model.norm.weight": noise((256,)),
    }
    config = {
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    wide = np.kron(scales, np.ones((128, 128), np.float32))
    return write_model(folder, tensors, config), (codes.astype(np.float32) * wide).astype(np.float64)


@pytest.mark.parametrize("rounding", ["once", "peft", "training"])
@pytest.mark.parametrize("to", ["bf16", "mxfp4", "nvfp4"])
def test_an_fp8_base(tmp_path: Path, to: str, rounding: str) -> None:
    base, before = fp8_base(tmp_path / "base")
    tensors = factors(f"{LAYER}.self_attn.q_proj", 256, 256)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    result = fp4conv.convert(base, tmp_path / "out", to=to, lora=[adapter], merge_rounding=rounding)
    b, a = (tensors[f"{LAYER}.self_attn.q_proj.lora_{side}.weight"].astype(np.float64) for side in "BA")
    expected = before + 2 * b @ a
    found = values(tmp_path / "out", "q_proj")
    assert ((found - expected) ** 2).sum() < (1e-4 if to == "bf16" else 0.02) * (expected**2).sum()
    size = result.merged[f"{LAYER}.self_attn.q_proj.weight"]
    assert size == pytest.approx(np.linalg.norm(2 * b @ a) / np.linalg.norm(before), rel=1e-2)
    with pytest.raises(Fp4convError, match="not a format to write"):
        fp4conv.merge_lora(base, adapter, tmp_path / "own")


def test_a_base_in_openais_own_layout(reference: Reference, tmp_path: Path) -> None:
    """The same adapter, into the same model under other names: the same bytes."""
    base, adapter = reference("gptoss-mxfp4"), reference("gptoss-lora-qat")
    fp4conv.convert(base, tmp_path / "original", to="mxfp4", layout="openai-original")
    fp4conv.merge_lora(tmp_path / "original", adapter, tmp_path / "ours", layout="openai")
    fp4conv.merge_lora(base, adapter, tmp_path / "direct")
    assert read_raw(tmp_path / "ours") == read_raw(tmp_path / "direct")
    fp4conv.merge_lora(base, adapter, tmp_path / "there", layout="openai-original")
    fp4conv.merge_lora(tmp_path / "original", adapter, tmp_path / "served")
    assert read_raw(tmp_path / "served") == read_raw(tmp_path / "direct"), "that which servers load"
    fp4conv.convert(tmp_path / "there", tmp_path / "back", to="mxfp4", layout="openai")
    assert read_raw(tmp_path / "back") == read_raw(tmp_path / "direct")
