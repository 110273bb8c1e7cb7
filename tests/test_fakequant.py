"""Checkpoints of quantisation-aware training: the export holds the values that the forward pass used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import (
    Array,
    array_of,
    assert_same_tensors,
    bf16,
    config_of,
    decode_experts_mxfp4,
    decode_mxfp4,
    noise,
    read_raw,
    turned,
    unpack,
    write_model,
)

import fp4conv
from fp4conv.errors import Fp4convError, SourceError
from fp4conv.modelopt_state import STATE_FILE

Reference = Callable[[str], Path]
Values = npt.NDArray[np.float64]


def mxfp4_forward(weight: Values) -> Values:
    """ModelOpt's MXFP4 fake quantisation: scale 2^ceil(log2(amax / 6)) for 32 values of the last axis, half to even."""
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    mantissa, exponent = np.frexp(amax / 6)  # amax / 6 = mantissa x 2^exponent, mantissa in [1/2, 1)
    power = np.where(mantissa == 0.5, exponent - 1, exponent)
    scale = np.ldexp(1.0, np.where(amax == 0, 0, power))
    codes = (blocks / scale).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return (codes * scale).reshape(weight.shape)


def nvfp4_forward(weight: Values, amax: float) -> Values:
    """NVFP4 fake quantisation with the frozen `amax` of the tensor, in float32 as the kernel computes it."""
    tensor_scale = np.float32(amax) / np.float32(2688)
    blocks = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, 16)
    ratio = np.abs(blocks).max(axis=-1, keepdims=True) / (np.float32(6) * tensor_scale)
    block_scale = np.clip(np.where(ratio == 0, 1, ratio), 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
    scale = block_scale.astype(np.float32) * tensor_scale
    codes = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (codes * scale).reshape(weight.shape).astype(np.float64)


def nvfp4_values(packed: Array, block_scale: Array, tensor_scale: Array) -> Values:
    """What a server computes: codes times the float32 product of both scales."""
    scale = block_scale.astype(np.float32) * tensor_scale.astype(np.float32)
    return (unpack(packed) * np.repeat(scale, 16, axis=-1)).astype(np.float64)


# ---- MXFP4


@pytest.mark.parametrize("name", ["gptoss-qat-fakequant-mxfp4", "gptoss-qat-fakequant-mxfp4-f32"])
def test_mxfp4_export_of_gpt_oss_equals_the_forward_pass(reference: Reference, tmp_path: Path, name: str) -> None:
    source = reference(name)
    result = fp4conv.convert(source, tmp_path / "out", to="mxfp4")
    ours, masters = read_raw(tmp_path / "out"), read_raw(source)
    stems = [key.removesuffix("_blocks") for key in ours if key.endswith("_blocks")]
    assert len(stems) == 2 * int(str(config_of(source)["num_hidden_layers"]))
    for stem in stems:
        forward = turned(mxfp4_forward(turned(array_of(masters[stem]).astype(np.float64))))
        np.testing.assert_array_equal(decode_experts_mxfp4(ours, stem), forward)
    assert not [w for w in result.warnings if "trained" in w]
    assert result.layout == "openai"


@pytest.mark.parametrize("name", ["llama-qat-fakequant-mxfp4", "qwen3moe-qat-fakequant-mxfp4"])
def test_mxfp4_export_of_linear_layers_equals_the_forward_pass(
    full_reference: Reference, tmp_path: Path, name: str
) -> None:
    source = full_reference(name)
    result = fp4conv.convert(source, tmp_path / "out", to="mxfp4")
    ours, masters = read_raw(tmp_path / "out"), read_raw(source)
    stems = [key.removesuffix("_packed") for key in ours if key.endswith(".weight_packed")]
    assert sorted(stems) == sorted(result.per_tensor)
    assert all(".mlp." in stem for stem in stems)  # the recipe was MLP only: the state says so, no option does
    for stem in stems:
        forward = mxfp4_forward(array_of(masters[stem]).astype(np.float64))
        decoded = decode_mxfp4(array_of(ours[stem + "_packed"]), array_of(ours[stem + "_scale"]))
        np.testing.assert_array_equal(decoded, forward)


def test_how_many_values_the_converter_script_gets_different(reference: Reference) -> None:
    """docs/converting.md has it: ModelOpt's converter rounds ties down, the forward pass half to even."""
    masters, theirs = read_raw(reference("gptoss-qat-fakequant-mxfp4")), read_raw(reference("gptoss-mxfp4"))
    differing = total = 0
    for stem in [key.removesuffix("_blocks") for key in theirs if key.endswith("_blocks")]:
        forward = turned(mxfp4_forward(turned(array_of(masters[stem]).astype(np.float64))))
        differing += int(np.count_nonzero(decode_experts_mxfp4(theirs, stem) != forward))
        total += forward.size
    assert 0.002 < differing / total < 0.005


# ---- NVFP4


@pytest.mark.parametrize("family", ["llama", "qwen3moe", "gptoss"])
def test_nvfp4_export_equals_modelopts_byte_for_byte(reference: Reference, tmp_path: Path, family: str) -> None:
    """Weights, block scales, tensor scales (the maximum over q/k/v and gate/up) and input scales."""
    fp4conv.convert(reference(f"{family}-qat-fakequant-nvfp4-default"), tmp_path / "out", to="nvfp4")
    golden = reference(f"{family}-nvfp4-from-qat-default")
    assert_same_tensors(read_raw(tmp_path / "out"), read_raw(golden))
    ours, theirs = (config_of(folder, "hf_quant_config.json")["quantization"] for folder in (tmp_path / "out", golden))
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    assert (ours["quant_algo"], ours["group_size"]) == (theirs["quant_algo"], theirs["group_size"])


def test_sets_calibrated_apart_are_counted_against_the_forward_pass(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-qat-fakequant-nvfp4-default")
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    ours, masters = read_raw(tmp_path / "out"), read_raw(source)
    differing = total = tensors = 0
    signal = noise_sum = 0.0
    for name in result.per_tensor:
        stem = name.removesuffix(".weight")
        amax = float(array_of(masters[f"{stem}.weight_quantizer._amax"]).astype(np.float32).reshape(()))
        scale = array_of(ours[f"{stem}.weight_scale_2"])
        decoded = nvfp4_values(array_of(ours[name]), array_of(ours[f"{stem}.weight_scale"]), scale)
        forward = nvfp4_forward(array_of(masters[name]).astype(np.float64), amax)
        if np.float32(amax) / np.float32(2688) == scale:
            np.testing.assert_array_equal(decoded, forward)
            continue
        tensors += 1
        total += forward.size
        differing += int(np.count_nonzero(decoded != forward))
        signal += float(np.square(forward).sum())
        noise_sum += float(np.square(decoded - forward).sum())
    found = result.forward_difference
    assert found is not None
    assert (found.tensors, found.values, found.of) == (tensors, differing, total)
    assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise_sum), rel=1e-9)
    assert any("calibrated apart" in warning for warning in result.warnings)


def test_weight_only_nvfp4_of_gpt_oss_equals_the_forward_pass(full_reference: Reference, tmp_path: Path) -> None:
    """Its recipe says blocks of 32, its kernel rounds blocks of 16: what was trained is in blocks of 16."""
    source = full_reference("gptoss-qat-fakequant-nvfp4-weight-only")
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    ours, masters = read_raw(tmp_path / "out"), read_raw(source)
    assert not [name for name in ours if name.endswith("input_scale")]
    assert len(result.per_tensor) == 6
    for name in result.per_tensor:
        amax = float(array_of(masters[f"{name}_weight_quantizer._amax"]).astype(np.float32).reshape(()))
        forward = nvfp4_forward(turned(array_of(masters[name]).astype(np.float64)), amax)
        parts = (turned(array_of(ours[name])), turned(array_of(ours[f"{name}_weight_scale"])))
        np.testing.assert_array_equal(nvfp4_values(*parts, array_of(ours[f"{name}_weight_scale_2"])), forward)


@pytest.mark.parametrize(
    "name", ["gptoss-nvfp4-from-qat-weight-only", "gptoss-nvfp4-weight-only", "qwen3moe-nvfp4-weight-only"]
)
def test_exports_in_blocks_of_32_are_read_and_written_in_blocks_of_16(
    full_reference: Reference, tmp_path: Path, name: str
) -> None:
    """Twice each block scale, along K; everything else as it is."""
    source = full_reference(name)
    fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    ours, theirs = read_raw(tmp_path / "out"), read_raw(source)
    assert sorted(ours) == sorted(theirs)
    scales = [key for key in theirs if key.endswith("weight_scale")]
    assert scales
    for key in theirs:
        if key in scales:
            doubled = np.repeat(array_of(theirs[key]), 2, axis=1)
            np.testing.assert_array_equal(array_of(ours[key]).view(np.uint8), doubled.view(np.uint8))
        else:
            assert ours[key] == theirs[key], key


# ---- departures and claims


def test_another_target_than_trained_is_done_and_said(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-qat-fakequant-nvfp4-default")
    result = fp4conv.convert(source, tmp_path / "mxfp4", to="mxfp4")
    assert any("trained for nvfp4, not for mxfp4" in w and "amax" in w for w in result.warnings)
    result = fp4conv.convert(source, tmp_path / "bf16", to="bf16")
    assert any("master weights" in w and "amax" in w for w in result.warnings)
    masters = {name: raw for name, raw in read_raw(source).items() if "_quantizer" not in name}
    assert_same_tensors(read_raw(tmp_path / "bf16"), masters)


def test_another_rule_than_trained_is_said(reference: Reference, tmp_path: Path) -> None:
    result = fp4conv.convert(
        reference("gptoss-qat-fakequant-mxfp4"), tmp_path / "o", to="mxfp4", scale_rule="floor", ties="down"
    )
    assert any("--scale-rule floor" in warning and "rceil" in warning for warning in result.warnings)
    assert any("--ties down" in warning for warning in result.warnings)


def stray_amax(folder: Path, amax: float = 3.0) -> Path:
    """A plain save of a quantised model: amax tensors, no state file."""
    tensors = {
        f"model.layers.0.mlp.{leaf}_proj.weight": noise((64, 64), seed) for seed, leaf in enumerate(("gate", "up"))
    }
    tensors |= {f"model.layers.0.mlp.{leaf}_proj.weight_quantizer._amax": bf16(amax) for leaf in ("gate", "up")}
    tensors["model.layers.0.self_attn.o_proj.weight"] = noise((64, 64), 7)
    write_model(folder, tensors, {"model_type": "llama", "num_hidden_layers": 1})
    return folder


def test_amax_without_a_state_is_used_for_nvfp4_alone(tmp_path: Path) -> None:
    source = stray_amax(tmp_path / "source")
    result = fp4conv.convert(source, tmp_path / "nvfp4", to="nvfp4")
    assert any(f"no {STATE_FILE}" in warning for warning in result.warnings)
    assert sorted(result.per_tensor) == [f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("gate", "up")]
    scale = array_of(read_raw(tmp_path / "nvfp4")["model.layers.0.mlp.up_proj.weight_scale_2"])
    assert scale == np.float32(3.0) / np.float32(2688)
    dropped = fp4conv.convert(source, tmp_path / "mxfp4", to="mxfp4")
    assert any("amax of 2 weights is left out" in warning for warning in dropped.warnings)
    assert not [name for name in read_raw(tmp_path / "mxfp4") if "_quantizer" in name]


def test_dense_weights_under_a_config_that_claims_nvfp4_are_read_as_dense(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.down_proj.weight": noise((32, 32))}
    claim = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    write_model(tmp_path / "source", tensors, {"model_type": "llama", "quantization_config": claim})
    result = fp4conv.convert(tmp_path / "source", tmp_path / "out", to="bf16")
    assert any("no tensor has scales" in " ".join(warning.split()) for warning in result.warnings)
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert_same_tensors(read_raw(tmp_path / "out"), read_raw(tmp_path / "source"))


def test_plain_weights_are_said_to_be_taken_as_plain(reference: Reference, tmp_path: Path) -> None:
    plain = fp4conv.convert(reference("llama-bf16"), tmp_path / "plain", to="nvfp4", scale_rule="amax")
    trained = fp4conv.convert(reference("llama-qat-fakequant-nvfp4-default"), tmp_path / "trained", to="nvfp4")
    assert plain.source_format == "plain bf16"
    assert trained.source_format == "bf16 trained for nvfp4"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.0.mlp.up_proj.input_quantizer._pre_quant_scale", bf16(np.ones(64)), "_pre_quant_scale"),
        ("model.layers.0.mlp.up_proj.weight_quantizer._amax", bf16(np.ones(64)), "NVFP4 has one"),
    ],
)
def test_quantisers_that_cannot_be_repeated_are_refused(
    tmp_path: Path, name: str, value: npt.NDArray[np.generic], words: str
) -> None:
    source = stray_amax(tmp_path / "source")
    tensors = {key: array_of(raw) for key, raw in read_raw(source).items()} | {name: value}
    shutil.rmtree(source)
    write_model(source, tensors, {"model_type": "llama", "num_hidden_layers": 1})
    with pytest.raises(SourceError, match=words) as error:
        fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    assert name in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("amax", [0.0, float("nan"), float("inf"), -1.0])
def test_an_amax_that_means_nothing_is_refused(tmp_path: Path, amax: float) -> None:
    with pytest.raises(Fp4convError, match=r"stored amax of .*\n?.*_amax|_amax.*stored amax"):
        fp4conv.convert(stray_amax(tmp_path / "source", amax), tmp_path / "out", to="nvfp4")


def test_a_state_of_another_checkpoint_is_refused(reference: Reference, tmp_path: Path) -> None:
    source = stray_amax(tmp_path / "source")
    shutil.copy(reference("gptoss-qat-fakequant-mxfp4") / STATE_FILE, source)
    with pytest.raises(SourceError, match="no tensor of that name"):
        fp4conv.convert(source, tmp_path / "out", to="mxfp4")


def test_what_trainers_leave_in_the_folder_stays_behind(reference: Reference, tmp_path: Path) -> None:
    """The folder as sft.py, trl and LLaMA-Factory leave it converts as it is; nothing of the trainer comes along."""
    source = tmp_path / "source"
    shutil.copytree(reference("llama-qat-fakequant-nvfp4-default"), source)
    trainer = [
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_log.jsonl",
        "training_loss.png",
    ]
    for name in trainer:
        (source / name).write_bytes(b"\x80\x04not to be opened")
    for name in ("trainer_state.json", "all_results.json", "train_results.json"):
        (source / name).write_text(json.dumps({"loss": 1.0}))
    (source / "checkpoint-10").mkdir()
    (source / "checkpoint-10" / "model.safetensors").write_bytes(b"half a file")
    fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not written & {*trainer, STATE_FILE, "trainer_state.json", "all_results.json", "checkpoint-10"}
    assert {"tokenizer.json", "chat_template.jinja", "config.json", "hf_quant_config.json"} <= written
