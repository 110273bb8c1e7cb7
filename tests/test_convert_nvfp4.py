"""MXFP4 -> NVFP4 without loss, and NVFP4 in other people's dialects: group 32, one config, lists of patterns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import (
    NVFP4_SUFFIXES,
    array_of,
    config_of,
    decode_experts_mxfp4,
    decode_experts_nvfp4,
    decode_mxfp4,
    decode_nvfp4,
    e4m3,
    noise,
    read_raw,
    stems,
    turned,
    write_model,
)

import fp4conv

Reference = Callable[[str], Path]


# ---- MXFP4 -> NVFP4


def test_mxfp4_to_nvfp4_loses_nothing(reference: Reference, tmp_path: Path) -> None:
    source = reference("gptoss-mxfp4")
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    before, after = read_raw(source), read_raw(tmp_path / "out")
    assert (result.lossy_blocks, result.sqnr_db) == (0, None)
    assert set(result.per_tensor.values()) == {None}
    for stem in stems(before, "_blocks"):
        left, right = decode_experts_mxfp4(before, stem), decode_experts_nvfp4(after, stem)
        assert left.tobytes() == right.tobytes(), stem  # the signs of zeros too


def held_exactly(block: npt.NDArray[np.float64], exponent: int) -> bool:
    """Whether some E4M3 scale times 2^exponent times codes gives every value of the 16: by trying all of them."""
    scales = np.arange(1, 0x7F, dtype=np.uint8).view(e4m3(0).dtype).astype(np.float64) * 2.0**exponent
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    quotients = np.abs(block)[None, :] / scales[:, None]
    return bool(np.isin(quotients, magnitudes).all(axis=1).any())


def test_mxfp4_to_nvfp4_has_the_values_of_the_cast_wherever_a_block_can_be_held(
    reference: Reference, tmp_path: Path
) -> None:
    source, theirs = reference("gptoss-mxfp4-native-like"), read_raw(reference("gptoss-nvfp4-cast-from-mxfp4"))
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    before, after = read_raw(source), read_raw(tmp_path / "out")
    assert sorted(after) == sorted(name for name in theirs if not name.endswith("input_scale"))
    lost = 0
    for stem in stems(before, "_blocks"):
        exact = turned(decode_experts_mxfp4(before, stem)).reshape(-1, 16)
        ours = turned(decode_experts_nvfp4(after, stem)).reshape(-1, 16)
        cast = turned(decode_experts_nvfp4(theirs, stem)).reshape(-1, 16)
        exponent = int(np.log2(array_of(after[f"{stem}_weight_scale_2"]).astype(np.float64)))
        for values, mine, their in zip(exact, ours, cast, strict=True):
            if held_exactly(values, exponent):
                assert np.array_equal(mine, values)
                assert np.array_equal(np.signbit(mine), np.signbit(values))
            else:
                lost += 1
            if np.array_equal(their, values):  # what the cast holds, we hold
                assert np.array_equal(mine, values)
    assert result.lossy_blocks == lost
    assert (result.sqnr_db is None) == (lost == 0)


def constructed(tmp_path: Path, exponents: list[int], codes: list[list[int]]) -> tuple[Path, str]:
    """A gpt-oss-like MXFP4 checkpoint: one expert, one row, a block of 32 for each exponent and its codes, repeated."""
    stem = "model.layers.0.mlp.experts.down_proj"
    rows = np.array([np.resize(np.array(block, np.uint8), 32) for block in codes])
    packed = (rows[:, 0::2] | rows[:, 1::2] << 4).reshape(1, 1, len(codes), 16)
    scales = np.array(exponents, np.int64) + 127
    tensors = {
        f"{stem}_blocks": packed.astype(np.uint8),
        f"{stem}_scales": scales.astype(np.uint8).reshape(1, 1, -1),
        "model.layers.0.self_attn.sinks": noise((4,)),
    }
    return write_model(tmp_path / "src", tensors, {"model_type": "half of gpt_oss", "num_hidden_layers": 1}), stem


@pytest.mark.parametrize("base", [0, 20, -90])
def test_code_shifts_save_blocks_at_both_ends_of_the_window(tmp_path: Path, base: int) -> None:
    """The window is 2^0..2^17 above the least scale: a block past each end is held by halving or doubling."""
    exponents = [base + 19, base + 17, base, base - 2]
    codes = [
        [1, 2, 9, 10],  # .5, 1: held by codes 2, 4 and a scale 2^2 smaller
        [7, 15, 5, 0],
        [7, 1, 2, 3],
        [4, 6, 12, 14],  # 2, 4: held by codes .5, 1 and a scale 2^2 larger
    ]
    source, stem = constructed(tmp_path, exponents, codes)
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    assert (result.lossy_blocks, result.sqnr_db) == (0, None)
    before, after = read_raw(source), read_raw(tmp_path / "out")
    assert decode_experts_mxfp4(before, stem).tobytes() == decode_experts_nvfp4(after, stem).tobytes()
    packed = array_of(after[stem]).reshape(-1)
    assert packed[0] & 15 == 4  # .5 was shifted to 2
    assert packed[-1] >> 4 == 8 + 2  # -4 was shifted to -1


def test_blocks_that_no_shift_saves_are_counted_and_rounded(tmp_path: Path) -> None:
    codes = [[7, 5, 3, 1], [7, 5, 3, 1], [7, 5, 3, 1]]
    source, stem = constructed(tmp_path, [30, 30, 0], codes)
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    assert result.lossy_blocks == 2  # both halves of the last block; the tensor scale serves the many
    before = decode_experts_mxfp4(read_raw(source), stem)
    after = decode_experts_nvfp4(read_raw(tmp_path / "out"), stem)
    assert np.array_equal(before[:, :64], after[:, :64])
    assert result.sqnr_db is not None
    signal, lost = float((before**2).sum()), float(((before - after) ** 2).sum())
    assert result.sqnr_db == pytest.approx(10 * np.log10(signal / lost), rel=1e-9)


def test_all_zero_mxfp4_keeps_its_signs(tmp_path: Path) -> None:
    source, stem = constructed(tmp_path, [-127, 5], [[0, 8], [8, 8, 0]])
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    after = read_raw(tmp_path / "out")
    assert decode_experts_mxfp4(read_raw(source), stem).tobytes() == decode_experts_nvfp4(after, stem).tobytes()
    assert result.lossy_blocks == 0


def test_nvfp4_to_mxfp4_goes_through_exact_values(reference: Reference, tmp_path: Path) -> None:
    """MXFP4 -> NVFP4 -> MXFP4 under RCEIL: what a power-of-two tensor scale holds comes back as the same values."""
    fp4conv.convert(reference("gptoss-mxfp4"), tmp_path / "nv", to="nvfp4")
    result = fp4conv.convert(tmp_path / "nv", tmp_path / "mx", to="mxfp4", scale_rule="rceil")
    assert result.sqnr_db is None
    before, after = read_raw(reference("gptoss-mxfp4")), read_raw(tmp_path / "mx")
    for stem in stems(before, "_blocks"):
        assert np.array_equal(decode_experts_mxfp4(before, stem), decode_experts_mxfp4(after, stem))


def test_mxfp4_of_a_dense_model_to_nvfp4_shares_a_scale_over_each_set(reference: Reference, tmp_path: Path) -> None:
    fp4conv.convert(reference("llama-bf16"), tmp_path / "mx", to="mxfp4")
    result = fp4conv.convert(tmp_path / "mx", tmp_path / "nv", to="nvfp4")
    before, after = read_raw(tmp_path / "mx"), read_raw(tmp_path / "nv")
    lost = 0
    for stem in stems(before, ".weight_packed"):
        exact = decode_mxfp4(array_of(before[f"{stem}.weight_packed"]), array_of(before[f"{stem}.weight_scale"]))
        parts = [array_of(after[f"{stem}.{suffix}"]) for suffix in NVFP4_SUFFIXES]
        exponent = int(np.log2(parts[2].astype(np.float64)))
        for values, mine in zip(exact.reshape(-1, 16), decode_nvfp4(*parts).reshape(-1, 16), strict=True):
            if held_exactly(values, exponent):
                assert mine.tobytes() == values.tobytes()
            else:
                lost += 1
    assert result.lossy_blocks == lost
    assert len({after[f"model.layers.0.self_attn.{p}_proj.weight_scale_2"][2] for p in "qkv"}) == 1
    assert len({after[f"model.layers.0.mlp.{p}_proj.weight_scale_2"][2] for p in ("gate", "up")}) == 1


# ---- NVFP4 in other people's dialects


@pytest.mark.parametrize("name", ["gptoss-nvfp4-weight-only", "llama-nvfp4-weight-only"])
def test_group_32_is_read_and_16_is_written(reference: Reference, tmp_path: Path, name: str) -> None:
    source = reference(name)
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    assert result.sqnr_db is None
    before, after = read_raw(source), read_raw(tmp_path / "out")
    assert sorted(before) == sorted(after)
    fused = name.startswith("gptoss")
    suffix = "_weight_scale" if fused else ".weight_scale"
    for stem in stems(before, suffix):
        if fused:
            assert decode_experts_nvfp4(before, stem).tobytes() == decode_experts_nvfp4(after, stem).tobytes()
            assert after[stem + suffix][1][1] == 2 * before[stem + suffix][1][1]
            continue
        left, right = ([array_of(raw[f"{stem}.{part}"]) for part in NVFP4_SUFFIXES] for raw in (before, after))
        assert right[1].shape[1] == 2 * left[1].shape[1] == right[0].shape[1] // 8
        assert decode_nvfp4(*left).tobytes() == decode_nvfp4(*right).tobytes()
    config = config_of(tmp_path / "out")["quantization_config"]
    assert isinstance(config, dict)
    assert config["group_size"] == config["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert config["quant_algo"] == "W4A16_NVFP4"


@pytest.mark.parametrize("excluded", [["lm_head", "model.embed_tokens"], ["lm_head*", "*embed*"], ["lm*"], []])
def test_nvfp4_is_read_from_hf_quant_config_alone(reference: Reference, tmp_path: Path, excluded: list[str]) -> None:
    """As ModelOpt 0.37 wrote it: nothing in config.json, wildcards and prefixes in the list of exclusions."""
    source = tmp_path / "src"
    shutil.copytree(reference("llama-nvfp4-default"), source)
    config = config_of(source)
    config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    separate = config_of(source, "hf_quant_config.json")
    quantization = separate["quantization"]
    assert isinstance(quantization, dict)
    quantization["exclude_modules"] = excluded
    (source / "hf_quant_config.json").write_text(json.dumps(separate))
    found = fp4conv.inspect(source)
    assert (found.format, found.layout, found.warnings) == ("nvfp4", "modelopt", ())
    fp4conv.convert(source, tmp_path / "out", to="bf16")
    fp4conv.convert(reference("llama-nvfp4-default"), tmp_path / "expected", to="bf16")
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "expected")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    fp4conv.convert(source, tmp_path / "again", to="nvfp4")
    again = config_of(tmp_path / "again")["quantization_config"]
    assert isinstance(again, dict)
    assert set(again["ignore"]) == {"lm_head", "model.embed_tokens"}  # in full, whatever the source wrote


def test_a_wrong_list_of_exclusions_is_told_and_not_believed(reference: Reference, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(reference("llama-nvfp4-default"), source)
    config = config_of(source)
    quantization = config["quantization_config"]
    assert isinstance(quantization, dict)
    quantization["ignore"] = ["model.layers.1"]
    (source / "config.json").write_text(json.dumps(config))
    found = fp4conv.inspect(source)
    assert any("model.layers.1." in warning for warning in found.warnings)
    assert all(facts.format == "nvfp4" for facts in found.tensors if facts.name.endswith("_proj.weight"))
