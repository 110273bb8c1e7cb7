"""Conversion against checkpoints that other people's tools wrote: equal in every byte, or in every value."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    INDEX,
    NVFP4_SUFFIXES,
    array_of,
    assert_same_tensors,
    bf16,
    config_of,
    decode_experts_mxfp4,
    decode_experts_nvfp4,
    decode_mxfp4,
    decode_nvfp4,
    noise,
    read_raw,
    stems,
    write_model,
)

import fp4conv
from fp4conv.report.facts import Inspected

Reference = Callable[[str], Path]


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
