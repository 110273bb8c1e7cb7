"""Conversion against checkpoints that other people's tools wrote: equal in every byte, or in every value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import (
    INDEX,
    Raw,
    array_of,
    assert_same_tensors,
    bf16,
    config_of,
    decode_experts_mxfp4,
    decode_experts_nvfp4,
    decode_mxfp4,
    decode_nvfp4,
    e4m3,
    noise,
    read_raw,
    turned,
    write_model,
)

import fp4conv
from fp4conv.report.facts import Inspected

Reference = Callable[[str], Path]
NVFP4_SUFFIXES = ("weight", "weight_scale", "weight_scale_2")


def stems(raw: Raw, suffix: str) -> list[str]:
    """Stems of the quantised weights whose part ends in `suffix`; there is at least one."""
    found = sorted(name.removesuffix(suffix) for name in raw if name.endswith(suffix))
    assert found
    return found


def assert_same_exclusions(found: Inspected, ours: list[str], theirs: list[str]) -> None:
    """Both lists name the same modules; ours in full and no quantised one, theirs perhaps by patterns."""
    modules = {
        f.name.removesuffix(".weight") for f in found.tensors if len(f.shape) == 2 and f.name.endswith(".weight")
    }
    modules.add("lm_head")
    assert set(ours) == {module for module in modules if any(fnmatchcase(module, pattern) for pattern in theirs)}
    assert not set(ours) & {f.name.removesuffix(".weight") for f in found.tensors if f.format == "nvfp4"}


# ---- byte for byte


def test_mxfp4_decodes_to_the_bytes_of_transformers(reference: Reference, tmp_path: Path) -> None:
    result = fp4conv.convert(reference("gptoss-mxfp4"), tmp_path / "out", to="bf16")
    assert_same_tensors(read_raw(tmp_path / "out"), read_raw(reference("gptoss-bf16-from-mxfp4")))
    assert result.sqnr_db is None
    assert "quantization_config" not in config_of(tmp_path / "out")


def test_mxfp4_encodes_as_modelopts_script_up_to_the_sign_of_zero(reference: Reference, tmp_path: Path) -> None:
    source = reference("gptoss-qat-fakequant-mxfp4")
    fp4conv.convert(source, tmp_path / "out", to="mxfp4", scale_rule="rceil", ties="down")
    ours, theirs = read_raw(tmp_path / "out"), read_raw(reference("gptoss-mxfp4"))
    assert sorted(ours) == sorted(theirs)
    for tensor, (dtype, shape, content) in theirs.items():
        assert ours[tensor][:2] == (dtype, shape)
        if not tensor.endswith("_blocks"):
            assert ours[tensor][2] == content, tensor
            continue
        left, right = (array_of(raw[tensor]).astype(np.uint8) for raw in (ours, theirs))
        for nibble in ((left & 15, right & 15), (left >> 4, right >> 4)):
            zero = (nibble[0] & 7 == 0) & (nibble[1] & 7 == 0)
            assert np.array_equal(nibble[0][~zero], nibble[1][~zero]), tensor


@pytest.mark.parametrize("rule", ["rceil", "mse"])
def test_values_that_were_mxfp4_once_are_held_exactly_again(reference: Reference, tmp_path: Path, rule: str) -> None:
    """Other bytes, though: a block whose largest code was 3 comes back with half the scale."""
    source = reference("gptoss-bf16-from-mxfp4")
    result = fp4conv.convert(source, tmp_path / "out", to="mxfp4", scale_rule=rule)
    assert result.sqnr_db is None
    before, after = read_raw(source), read_raw(tmp_path / "out")
    for stem in stems(after, "_blocks"):
        assert np.array_equal(decode_experts_mxfp4(after, stem), array_of(before[stem]).astype(np.float64))


@pytest.mark.parametrize("family", ["gptoss", "llama", "qwen3moe"])
@pytest.mark.parametrize(("modules", "export"), [("mlp", "mlp-only"), ("all", "default")])
def test_nvfp4_is_modelopts_export(
    reference: Reference, tmp_path: Path, family: str, modules: str, export: str
) -> None:
    source, theirs = reference(f"{family}-bf16"), reference(f"{family}-nvfp4-{export}")
    fp4conv.convert(source, tmp_path / "out", to="nvfp4", scale_rule="amax", modules=modules)
    assert_same_tensors(read_raw(tmp_path / "out"), read_raw(theirs), leaving_out=("input_scale",))


@pytest.mark.parametrize("family", ["gptoss", "llama", "qwen3moe"])
@pytest.mark.parametrize("export", ["mlp-only", "default"])
def test_configs_say_what_modelopts_say(reference: Reference, tmp_path: Path, family: str, export: str) -> None:
    """A W4A4 export laid out anew has the same algorithm, group size and exclusions, in both files."""
    theirs = reference(f"{family}-nvfp4-{export}")
    fp4conv.convert(theirs, tmp_path / "out", to="nvfp4")
    expected = config_of(theirs)["quantization_config"]
    found = config_of(tmp_path / "out")["quantization_config"]
    assert isinstance(expected, dict)
    assert isinstance(found, dict)
    assert_same_exclusions(fp4conv.inspect(theirs), found["ignore"], expected["ignore"])
    assert found["group_size"] == 16  # ModelOpt leaves it out at the top; TensorRT-LLM wants it there
    for key in ("quant_algo", "quant_method"):
        assert found[key] == expected[key]
    assert found["config_groups"] == expected["config_groups"]
    separate = config_of(tmp_path / "out", "hf_quant_config.json")["quantization"]
    expected_separate = config_of(theirs, "hf_quant_config.json")["quantization"]
    assert isinstance(separate, dict)
    assert isinstance(expected_separate, dict)
    assert separate["exclude_modules"] == found["ignore"]
    assert_same_exclusions(fp4conv.inspect(theirs), found["ignore"], expected_separate["exclude_modules"])
    for key in ("quant_algo", "kv_cache_quant_algo", "group_size"):
        assert separate[key] == expected_separate[key]


def test_the_own_format_is_passed_through_untouched(reference: Reference, tmp_path: Path) -> None:
    for name, to in (
        ("gptoss-mxfp4-native-like", "mxfp4"),
        ("gptoss-nvfp4-default", "nvfp4"),
        ("llama-nvfp4-mlp-only", "nvfp4"),
        ("qwen3moe-bf16", "bf16"),
    ):
        result = fp4conv.convert(reference(name), tmp_path / name, to=to)
        assert_same_tensors(read_raw(tmp_path / name), read_raw(reference(name)))
        assert (result.converted, result.sqnr_db, result.lossy_blocks) == (0, None, 0)


def test_kv_scales_come_along(full_reference: Reference, tmp_path: Path) -> None:
    source = full_reference("gptoss-nvfp4-default-kvfp8")
    fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    assert_same_tensors(read_raw(tmp_path / "out"), read_raw(source))
    found = config_of(tmp_path / "out")["quantization_config"]
    expected = config_of(source)["quantization_config"]
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    assert found["kv_cache_scheme"] == expected["kv_cache_scheme"]
    separate = config_of(tmp_path / "out", "hf_quant_config.json")["quantization"]
    assert isinstance(separate, dict)
    assert separate["kv_cache_quant_algo"] == "FP8"


# ---- F16, F32


@pytest.mark.parametrize("to", ["f16", "f32"])
def test_decoded_to_other_dense_types(reference: Reference, tmp_path: Path, to: str) -> None:
    """What transformers made BF16 of fits F32 and, in these checkpoints, is within F16's range: equal as numbers."""
    fp4conv.convert(reference("gptoss-mxfp4"), tmp_path / "out", to=to)
    expected = read_raw(reference("gptoss-bf16-from-mxfp4"))
    ours = read_raw(tmp_path / "out")
    dtype = {"f16": np.float16, "f32": np.float32}[to]
    for name, raw in expected.items():
        assert ours[name][0] == to.upper()
        assert array_of(ours[name]).tobytes() == array_of(raw).astype(np.float32).astype(dtype).tobytes(), name
    assert config_of(tmp_path / "out")["dtype"] == {"f16": "float16", "f32": "float32"}[to]


@pytest.mark.parametrize(("dtype", "target"), [("F32", "nvfp4"), ("F16", "nvfp4"), ("F32", "mxfp4"), ("F16", "mxfp4")])
def test_f32_and_f16_sources_are_quantised_from_their_own_values(tmp_path: Path, dtype: str, target: str) -> None:
    """Values that BF16 holds exactly give the codes of the BF16 checkpoint."""
    weight = bf16(noise((48, 128), 3).astype(np.float32).round(5))
    exact = weight.astype({"F32": np.float32, "F16": np.float16}[dtype])
    assert np.array_equal(exact.astype(np.float32), weight.astype(np.float32))
    name = "model.layers.0.mlp.down_proj.weight"
    write_model(tmp_path / "bf16", {name: weight})
    write_model(tmp_path / "other", {name: exact})
    for source in ("bf16", "other"):
        fp4conv.convert(tmp_path / source, tmp_path / f"{source}-out", to=target)
    assert read_raw(tmp_path / "bf16-out") == read_raw(tmp_path / "other-out")


def test_f32_masters_are_never_rounded_to_bf16_on_the_way(full_reference: Reference, tmp_path: Path) -> None:
    source = full_reference("gptoss-qat-fakequant-mxfp4-f32")
    fp4conv.convert(source, tmp_path / "out", to="mxfp4", scale_rule="rceil", ties="down")
    ours, theirs = read_raw(tmp_path / "out"), read_raw(full_reference("gptoss-mxfp4-from-f32"))
    differing = total = 0
    for stem in stems(theirs, "_blocks"):
        left, right = decode_experts_mxfp4(ours, stem), decode_experts_mxfp4(theirs, stem)
        differing += int(np.count_nonzero(left != right))
        total += left.size
    assert differing <= 32 * total // 10_000  # ModelOpt's float log2 is off by one just above 6 x 2^k


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
    return write_model(tmp_path / "src", tensors, {"model_type": "gpt_oss", "num_hidden_layers": 1}), stem


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


# ---- shards and sets


def test_members_of_a_set_in_different_shards_share_a_scale(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-bf16")
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    layer = "model.layers.1.self_attn"
    homes = {weight_map[f"{layer}.{leaf}_proj.weight"] for leaf in "qkv"}
    assert len(homes) > 1, "the reference has a set that is spread over shards"
    fp4conv.convert(source, tmp_path / "out", to="nvfp4", scale_rule="amax")
    after = read_raw(tmp_path / "out")
    raw = read_raw(source)
    amax = max(np.abs(array_of(raw[f"{layer}.{leaf}_proj.weight"]).astype(np.float32)).max() for leaf in "qkv")
    for leaf in "qkv":
        assert array_of(after[f"{layer}.{leaf}_proj.weight_scale_2"]) == np.float32(amax) / np.float32(2688)


@pytest.mark.parametrize("size", ["50KB", "200KB", 100_000])
def test_the_size_of_shards_changes_no_tensor(reference: Reference, tmp_path: Path, size: str | int) -> None:
    source = reference("qwen3moe-bf16")
    fp4conv.convert(source, tmp_path / "one", to="nvfp4")
    fp4conv.convert(source, tmp_path / "many", to="nvfp4", max_shard_size=size)
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "many")
    assert (tmp_path / "one" / "model.safetensors").exists()
    assert not (tmp_path / "one" / INDEX).exists()
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(len(raw[2]) for raw in read_raw(tmp_path / "many").values())
    for stem in stems(read_raw(tmp_path / "many"), ".weight_scale_2"):
        assert len({index["weight_map"][f"{stem}.{suffix}"] for suffix in NVFP4_SUFFIXES}) == 1


def test_a_weight_larger_than_a_shard_has_one_of_its_own(reference: Reference, tmp_path: Path) -> None:
    fp4conv.convert(reference("gptoss-bf16"), tmp_path / "out", to="mxfp4", max_shard_size=1)
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    for stem in stems(read_raw(tmp_path / "out"), "_blocks"):
        assert weight_map[f"{stem}_blocks"] == weight_map[f"{stem}_scales"]
        assert list(weight_map.values()).count(weight_map[f"{stem}_blocks"]) == 2


# ---- SQNR


@pytest.mark.parametrize(
    ("name", "to", "rule"),
    [
        ("llama-bf16", "nvfp4", "amax"),
        ("llama-bf16", "mxfp4", "even"),
        ("gptoss-bf16", "mxfp4", "mse"),
        ("gptoss-bf16", "nvfp4", "mse"),
    ],
)
def test_sqnr_is_that_of_the_decoded_values(
    reference: Reference, tmp_path: Path, name: str, to: str, rule: str
) -> None:
    result = fp4conv.convert(reference(name), tmp_path / "out", to=to, scale_rule=rule)
    before, after = read_raw(reference(name)), read_raw(tmp_path / "out")
    total_signal = total_noise = 0.0
    assert result.per_tensor
    for tensor, reported in result.per_tensor.items():
        original = array_of(before[tensor]).astype(np.float64)
        stem = tensor.removesuffix(".weight")
        if name.startswith("gptoss"):
            decoded = (decode_experts_nvfp4 if to == "nvfp4" else decode_experts_mxfp4)(after, stem)
        elif to == "nvfp4":
            parts = [array_of(after[f"{stem}.{suffix}"]) for suffix in NVFP4_SUFFIXES]
            decoded = decode_nvfp4(*parts).astype(np.float32).astype(np.float64)
        else:
            decoded = decode_mxfp4(array_of(after[f"{stem}.weight_packed"]), array_of(after[f"{stem}.weight_scale"]))
        signal, lost = float((original**2).sum()), float(((original - decoded) ** 2).sum())
        assert reported == pytest.approx(10 * np.log10(signal / lost), rel=1e-9 if to == "mxfp4" else 1e-7)
        total_signal, total_noise = total_signal + signal, total_noise + lost
    assert result.sqnr_db == pytest.approx(10 * np.log10(total_signal / total_noise), rel=1e-7)
