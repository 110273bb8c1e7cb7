"""W4A4: scales of activations, stored, constant or from a file, shared where servers share them; and KV scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from checkpoints import array_of, bf16, config_of, noise, read_raw, write_model, write_shard

import fp4conv
from fp4conv.errors import Fp4convError, PlanError, SourceError, UsageError

Reference = Callable[[str], Path]
LAYER = "model.layers.0"


def scales(folder: Path) -> dict[str, float]:
    """Module -> input scale."""
    return {
        name[: -len("input_scale") - 1]: float(array_of(raw).reshape(())[()])
        for name, raw in read_raw(folder).items()
        if name.endswith("input_scale")
    }


def algorithms(folder: Path) -> tuple[object, object, bool]:
    """(quant_algo of config.json, of hf_quant_config.json, whether input_activations are described)."""
    config, separate = (
        config_of(folder)["quantization_config"],
        config_of(folder, "hf_quant_config.json")["quantization"],
    )
    assert isinstance(config, dict)
    assert isinstance(separate, dict)
    return config["quant_algo"], separate["quant_algo"], "input_activations" in config["config_groups"]["group_0"]


def amax_file(path: Path, values: Mapping[str, float]) -> str:
    write_shard(path, {name: np.full((), value, np.float32) for name, value in values.items()})
    return str(path)


# ---- stored, none


def test_stored_scales_come_along_and_none_leaves_them_out(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-nvfp4-default")
    fp4conv.convert(source, tmp_path / "stored", to="nvfp4")
    assert scales(tmp_path / "stored") == scales(source) != {}
    assert algorithms(tmp_path / "stored") == ("NVFP4", "NVFP4", True)
    result = fp4conv.convert(source, tmp_path / "none", to="nvfp4", input_scales="none")
    assert scales(tmp_path / "none") == {}
    assert algorithms(tmp_path / "none") == ("W4A16_NVFP4", "W4A16_NVFP4", False)
    assert any("input scales" in warning for warning in result.warnings)


def test_other_targets_leave_them_out_and_say_so(reference: Reference, tmp_path: Path) -> None:
    for name, to in (
        ("llama-nvfp4-default", "bf16"),
        ("llama-nvfp4-default", "mxfp4"),
        ("gptoss-nvfp4-default", "mxfp4"),
    ):
        out = tmp_path / f"{name}-{to}"
        options = {"modules": "experts"} if name.startswith("gptoss") else {}
        if options:
            options["exclude"] = ["*self_attn*"]  # type: ignore[assignment]
        result = fp4conv.convert(reference(name), out, to=to, **options)  # type: ignore[arg-type]
        assert scales(out) == {}
        assert any("input scales" in warning for warning in result.warnings)


def test_without_stored_scales_activations_stay_unquantised(reference: Reference, tmp_path: Path) -> None:
    fp4conv.convert(reference("llama-bf16"), tmp_path / "out", to="nvfp4")
    assert scales(tmp_path / "out") == {}
    assert algorithms(tmp_path / "out") == ("W4A16_NVFP4", "W4A16_NVFP4", False)


def test_some_modules_without_a_stored_scale(reference: Reference, tmp_path: Path) -> None:
    """W4A4 in part would load as garbage: refused, with the ways out."""
    source = reference("llama-nvfp4-mlp-only")
    with pytest.raises(PlanError, match="--input-scales none"):
        fp4conv.convert(source, tmp_path / "out", to="nvfp4", modules="all")
    assert list(tmp_path.iterdir()) == []
    fp4conv.convert(source, tmp_path / "out", to="nvfp4", modules="all", input_scales="none")
    assert algorithms(tmp_path / "out")[0] == "W4A16_NVFP4"


# ---- constant


@pytest.mark.parametrize("name", ["llama-bf16", "gptoss-bf16", "gptoss-mxfp4", "qwen3moe-bf16", "llama-nvfp4-default"])
def test_constant(reference: Reference, tmp_path: Path, name: str) -> None:
    fp4conv.convert(reference(name), tmp_path / "out", to="nvfp4", input_scales="constant")
    raw = read_raw(tmp_path / "out")
    suffixes = ("_weight_scale", ".weight_scale")
    expected = {key.removesuffix(s) for s in suffixes for key in raw if key.endswith(s)}
    assert scales(tmp_path / "out") == dict.fromkeys(expected, 1.0)
    assert all(raw[key][:2] == ("F32", ()) for key in raw if key.endswith("input_scale"))
    assert algorithms(tmp_path / "out") == ("NVFP4", "NVFP4", True)


# ---- from a file


def test_file_shares_the_maximum_over_sets(reference: Reference, tmp_path: Path) -> None:
    leaves = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
    modules = [f"model.layers.{i}.{leaf}" for i in range(2) for leaf in leaves]
    amax = {module: 1.5 + number for number, module in enumerate(modules)}
    given = amax_file(tmp_path / "amax.safetensors", {f"{module}.input_amax": value for module, value in amax.items()})
    fp4conv.convert(reference("llama-bf16"), tmp_path / "out", to="nvfp4", input_scales=given)
    found = scales(tmp_path / "out")
    assert set(found) == set(modules)
    for i in range(2):
        layer = f"model.layers.{i}"
        for members in (
            [f"{layer}.self_attn.{leaf}_proj" for leaf in "qkv"],
            [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
        ):
            largest = np.float32(max(amax[member] for member in members)) / np.float32(2688)
            assert {found[member] for member in members} == {float(largest)}
        for alone in (f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj"):
            assert found[alone] == float(np.float32(amax[alone]) / np.float32(2688))
    assert algorithms(tmp_path / "out") == ("NVFP4", "NVFP4", True)


def test_file_shares_the_maximum_over_all_experts_of_a_layer(reference: Reference, tmp_path: Path) -> None:
    experts = sorted(
        f.name.removesuffix(".weight")
        for f in fp4conv.inspect(reference("qwen3moe-bf16")).tensors
        if f.role == "expert"
    )
    amax = {module: float(2 + number) for number, module in enumerate(experts)}
    given = amax_file(tmp_path / "amax.safetensors", {f"{module}.input_amax": value for module, value in amax.items()})
    fp4conv.convert(reference("qwen3moe-bf16"), tmp_path / "out", to="nvfp4", modules="experts", input_scales=given)
    found = scales(tmp_path / "out")
    assert set(found) == set(experts)
    for layer in {module.split(".mlp.")[0] for module in experts}:
        for leaves in (("gate_proj", "up_proj"), ("down_proj",)):
            members = [m for m in experts if m.startswith(f"{layer}.mlp.experts.") and m.endswith(leaves)]
            largest = np.float32(max(amax[member] for member in members)) / np.float32(2688)
            assert {found[member] for member in members} == {float(largest)}


def test_file_brings_kv_scales(reference: Reference, tmp_path: Path) -> None:
    source = reference("gptoss-bf16")
    names = {f"{LAYER}.mlp.experts.{leaf}.input_amax": 3.0 for leaf in ("gate_up_proj", "down_proj")}
    layers = config_of(source)["num_hidden_layers"]
    assert isinstance(layers, int)
    for i in range(layers):
        names |= {key.replace(LAYER, f"model.layers.{i}"): 3.0 for key in list(names)}
        names |= {f"model.layers.{i}.self_attn.k_proj.k_amax": 44.8, f"model.layers.{i}.self_attn.v_proj.v_amax": 89.6}
    fp4conv.convert(source, tmp_path / "out", to="nvfp4", input_scales=amax_file(tmp_path / "amax.safetensors", names))
    raw = read_raw(tmp_path / "out")
    assert array_of(raw[f"{LAYER}.self_attn.k_proj.k_scale"]) == np.float32(44.8) / np.float32(448)
    assert array_of(raw[f"{LAYER}.self_attn.v_proj.v_scale"]) == np.float32(89.6) / np.float32(448)
    config = config_of(tmp_path / "out")
    quantization, separate = (
        config["quantization_config"],
        config_of(tmp_path / "out", "hf_quant_config.json")["quantization"],
    )
    assert isinstance(quantization, dict)
    assert isinstance(separate, dict)
    assert quantization["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert separate["kv_cache_quant_algo"] == "FP8"


def test_a_file_of_kv_scales_alone_leaves_activations_as_they_are(reference: Reference, tmp_path: Path) -> None:
    """And a layout without a place for them says so."""
    source, names = reference("llama-bf16"), {f"{LAYER}.self_attn.{kind}_proj.{kind}_amax": 448.0 for kind in "kv"}
    file = amax_file(tmp_path / "amax.safetensors", names)
    fp4conv.convert(source, tmp_path / "out", to="nvfp4", input_scales=file)
    assert array_of(read_raw(tmp_path / "out")[f"{LAYER}.self_attn.v_proj.v_scale"]) == 1
    assert scales(tmp_path / "out") == {}
    assert algorithms(tmp_path / "out") == ("W4A16_NVFP4", "W4A16_NVFP4", False)
    result = fp4conv.convert(source, tmp_path / "other", to="nvfp4", layout="compressed-tensors", input_scales=file)
    assert any("2 FP8 KV-cache scales are left out: the compressed-tensors layout" in each for each in result.warnings)
    assert not any(name.endswith(("k_scale", "v_scale")) for name in read_raw(tmp_path / "other"))


ALL = {f"{LAYER}.mlp.down_proj.input_amax": 1.0}
BAD_FILES: dict[str, tuple[dict[str, object], type[Fp4convError], str]] = {
    "a module is missing": ({f"{LAYER}.mlp.other.input_amax": 1.0}, PlanError, "down_proj.input_amax"),
    "an unknown module": ({**ALL, "model.layers.7.mlp.down_proj.input_amax": 1.0}, PlanError, "model.layers.7"),
    "an unknown attention": ({**ALL, f"{LAYER}.self_attn.k_proj.k_amax": 1.0}, PlanError, "k_amax"),
    "another name": ({**ALL, "x.weight": 1.0}, SourceError, "x.weight"),
    "a zero": ({f"{LAYER}.mlp.down_proj.input_amax": 0.0}, SourceError, "down_proj.input_amax"),
    "a NaN": ({f"{LAYER}.mlp.down_proj.input_amax": np.nan}, SourceError, "down_proj.input_amax"),
    "a negative": ({f"{LAYER}.mlp.down_proj.input_amax": -1.0}, SourceError, "down_proj.input_amax"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    values, error, where = BAD_FILES[kind]
    source = write_model(tmp_path / "src", {f"{LAYER}.mlp.down_proj.weight": noise((8, 32))})
    given = amax_file(tmp_path / "amax.safetensors", values)  # type: ignore[arg-type]
    with pytest.raises(error, match=where):
        fp4conv.convert(source, tmp_path / "out", to="nvfp4", input_scales=given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amax.safetensors", "src"]


def test_files_of_another_kind(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", {f"{LAYER}.mlp.down_proj.weight": noise((8, 32))})
    (tmp_path / "text").write_text("1.0")
    write_shard(tmp_path / "vector.safetensors", {f"{LAYER}.mlp.down_proj.input_amax": np.ones(2, np.float32)})
    write_shard(tmp_path / "bf16.safetensors", {f"{LAYER}.mlp.down_proj.input_amax": bf16(np.ones(()))})
    for file in ("text", "vector.safetensors", "bf16.safetensors"):
        with pytest.raises(SourceError, match=file.split(".")[0]):
            fp4conv.convert(source, tmp_path / "out", to="nvfp4", input_scales=str(tmp_path / file))
    with pytest.raises(UsageError, match="nowhere"):
        fp4conv.convert(source, tmp_path / "out", to="nvfp4", input_scales=str(tmp_path / "nowhere"))
    for to in ("bf16", "mxfp4"):
        with pytest.raises(Fp4convError, match="only NVFP4 has input scales"):
            fp4conv.convert(source, tmp_path / "out", to=to, input_scales="constant")


def test_values_of_modules_that_stay_dense_are_told(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.mlp.down_proj.weight": noise((8, 32)), f"{LAYER}.self_attn.o_proj.weight": noise((8, 32))}
    source = write_model(tmp_path / "src", tensors)
    given = amax_file(tmp_path / "amax.safetensors", {**ALL, f"{LAYER}.self_attn.o_proj.input_amax": 2.0})
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4", modules="mlp", input_scales=given)
    assert any("self_attn.o_proj" in warning for warning in result.warnings)
    assert list(scales(tmp_path / "out")) == [f"{LAYER}.mlp.down_proj"]


# ---- companions


def test_companions(reference: Reference, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(reference("llama-bf16"), source)
    source.chmod(0o755)
    for name in ("config.json", "tokenizer_config.json"):
        (source / name).chmod(0o644)
    config = config_of(source)
    config["auto_map"] = {"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "org/repo--modeling_mine.Mine"}
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = config_of(source, "tokenizer_config.json")
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    bomb = "raise SystemExit('this ran')\n# \xe9\r\n".encode("latin-1")
    for name in ("configuration_mine.py", "modeling_mine.py", "tokenization_mine.py", "setup.py"):
        (source / name).write_bytes(bomb)
    never = (
        *("modelopt_state_train.pth", "training_args.bin", "optimizer.pt", "pytorch_model.bin", "trainer_state.json"),
        *("scheduler.pt", "rng_state_0.pth", "adapter_config.json", "setup.py", "model.gguf", ".hidden.json"),
    )
    for name in never:
        (source / name).write_bytes(b"\x80")
    kept = ("vocab.txt", "merges.txt", "tokenizer.model", "LICENSE", "README.md", "special_tokens_map.json")
    for name in kept:
        (source / name).write_bytes(b"{}")
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert not found & set(never)
    assert found >= {*kept, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for name in ("configuration_mine.py", "modeling_mine.py", "tokenization_mine.py"):
        assert (tmp_path / "out" / name).read_bytes() == bomb
    for name in found - {"config.json", "hf_quant_config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    left = next(warning for warning in result.warnings if warning.startswith("not copied"))
    assert "modelopt_state_train.pth" in left
    assert "setup.py" in left
    assert config_of(tmp_path / "out")["auto_map"] == config["auto_map"]


def test_a_configs_own_index_and_quant_config_are_never_copied(reference: Reference, tmp_path: Path) -> None:
    fp4conv.convert(reference("gptoss-nvfp4-default"), tmp_path / "out", to="bf16")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert "hf_quant_config.json" not in found
    assert "model.safetensors.index.json" not in found
