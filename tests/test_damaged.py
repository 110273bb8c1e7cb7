"""Checkpoints that other programs damaged or lost parts of: mended by name, or refused; nothing is made up."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Array, array_of, bf16, config_of, noise, read_raw, tree, write_model

import fp4conv
from fp4conv.errors import Fp4convError

Reference = Callable[[str], Path]
EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")


def copy_with(source: Path, folder: Path, change: Callable[[dict[str, Array]], object]) -> Path:
    """The checkpoint in one file with its tensors changed."""
    tensors = {name: array_of(value) for name, value in read_raw(source).items()}
    change(tensors)
    return write_model(folder, tensors, config_of(source))


def lose(*patterns: str) -> Callable[[dict[str, Array]], object]:
    def change(tensors: dict[str, Array]) -> None:
        lost = [name for name in tensors if any(re.search(pattern, name) for pattern in patterns)]
        assert lost
        for name in lost:
            del tensors[name]

    return change


def misname(tensors: dict[str, Array]) -> None:
    for name in [name for name in tensors if EXPERTS.search(name)]:
        tensors[f"{name}_blocks"] = tensors.pop(name)


def refused(source: Path, tmp_path: Path, *says: str, to: Iterable[str] = ("bf16", "mxfp4", "nvfp4")) -> None:
    before = tree(tmp_path)
    for target in to:
        with pytest.raises(Fp4convError) as caught:
            fp4conv.convert(source, tmp_path / "out", to=target)
        for words in says:
            assert words in str(caught.value)
        assert tree(tmp_path) == before


# ---- dense experts under the names of codes


def test_misnamed_experts_are_mended_with_a_warning(reference: Reference, tmp_path: Path) -> None:
    """As transformers 5.23 saves a dequantised model. The same values in every target as from a healthy one."""
    healthy = reference("gptoss-bf16-from-mxfp4")
    source = copy_with(healthy, tmp_path / "src", misname)
    for to in ("bf16", "mxfp4", "nvfp4"):
        result = fp4conv.convert(source, tmp_path / f"mended-{to}", to=to)
        assert any("_proj_blocks" in warning and "true names" in warning for warning in result.warnings)
        fp4conv.convert(healthy, tmp_path / f"healthy-{to}", to=to)
        assert read_raw(tmp_path / f"mended-{to}") == read_raw(tmp_path / f"healthy-{to}")
    with fp4conv.open(source) as checkpoint:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert checkpoint.read(name).tobytes() == read_raw(healthy)[name][2]


def test_the_one_that_transformers_saved(full_reference: Reference, tmp_path: Path) -> None:
    result = fp4conv.convert(full_reference("gptoss-bf16-from-mxfp4-hf523-blocks-names"), tmp_path / "out", to="bf16")
    assert any("6 expert tensors" in warning for warning in result.warnings)
    assert read_raw(tmp_path / "out") == read_raw(full_reference("gptoss-bf16-from-mxfp4"))


def test_the_one_that_training_saved(full_reference: Reference, tmp_path: Path) -> None:
    """Its ModelOpt state names the experts rightly: it exports by the rule of training's forward pass."""
    source = full_reference("gptoss-qat-fakequant-mxfp4-from-mxfp4base")
    result = fp4conv.convert(source, tmp_path / "out", to="mxfp4")
    assert result.source_format == "bf16 trained for mxfp4"
    plain = tmp_path / "plain"
    shutil.copytree(source, plain, ignore=shutil.ignore_patterns("*.pth"))
    fp4conv.convert(plain, tmp_path / "expected", to="mxfp4", scale_rule="rceil")
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "expected")
    assert sum(name.endswith("_blocks") for name in read_raw(tmp_path / "out")) == 6


def test_misnamed_and_turned_is_not_mended(reference: Reference, tmp_path: Path) -> None:
    """By the config they should be [E, in, out]; renaming alone would give another model."""

    def change(tensors: dict[str, Array]) -> None:
        misname(tensors)
        for name in [name for name in tensors if name.endswith("_blocks")]:
            tensors[name] = np.ascontiguousarray(np.swapaxes(tensors[name], 1, 2))

    refused(copy_with(reference("gptoss-bf16"), tmp_path / "src", change), tmp_path, "_blocks", "renaming")


def test_misnamed_in_part_is_no_such_case(reference: Reference, tmp_path: Path) -> None:
    """Codes of one parameter and dense values of another under such names: no program writes that."""

    def change(tensors: dict[str, Array]) -> None:
        name = "model.layers.0.mlp.experts.down_proj"
        del tensors[f"{name}_scales"]
        tensors[f"{name}_blocks"] = noise((4, 96, 128))

    refused(copy_with(reference("gptoss-mxfp4"), tmp_path / "src", change), tmp_path, "down_proj_blocks", "BF16")


# ---- lost experts


def test_one_tensor_for_all_experts_is_refused(reference: Reference, tmp_path: Path) -> None:
    """As transformers 5.8 to 5.20 save a dequantised model."""

    def change(tensors: dict[str, Array]) -> None:
        for leaf in ("gate_up_proj", "down_proj"):
            held = [tensors.pop(name) for name in list(tensors) if name.endswith(f".experts.{leaf}")]
            tensors[f"model.layers.0.mlp.experts.{leaf}$"] = held[-1]

    refused(copy_with(reference("gptoss-bf16"), tmp_path / "src", change), tmp_path, "proj$", "lost")


@pytest.mark.parametrize("name", ["gptoss-bf16", "gptoss-mxfp4", "gptoss-nvfp4-default"])
@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_a_layer_without_experts_is_refused(reference: Reference, tmp_path: Path, name: str, leaf: str) -> None:
    lost = rf"layers\.0\.mlp\.experts\.{leaf}(_blocks|_scales|_weight\w*|_input\w*)?$"
    source = copy_with(reference(name), tmp_path / "src", lose(lost))
    refused(source, tmp_path, f"model.layers.0.mlp.experts.{leaf}", "lost")


def test_a_model_without_any_experts_is_refused(reference: Reference, tmp_path: Path) -> None:
    source = copy_with(reference("gptoss-bf16"), tmp_path / "src", lose(r"\.experts\.\w+_proj$"))
    refused(source, tmp_path, "experts", "lost")


def test_more_layers_in_the_config_than_there_are(reference: Reference, tmp_path: Path) -> None:
    source = copy_with(reference("gptoss-bf16"), tmp_path / "src", lambda tensors: None)
    config = {**config_of(source), "num_hidden_layers": 5}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path, "mlp.experts.gate_up_proj: is not there", "lost")


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        (r"layers\.1\.mlp\.experts\.2\.up_proj\.weight$", "model.layers.1.mlp.experts.2.up_proj.weight"),
        (r"layers\.1\.mlp\.experts\.3\.", "model.layers.1.mlp.experts.3."),
        (r"layers\.1\.mlp\.experts\.0\.", "model.layers.1.mlp.experts.0."),
    ],
)
@pytest.mark.parametrize("name", ["qwen3moe-bf16", "qwen3moe-nvfp4-mlp-only"])
def test_an_expert_module_that_is_lost(reference: Reference, tmp_path: Path, name: str, lost: str, says: str) -> None:
    """The last one too: the config says how many there are."""
    if name != "qwen3moe-bf16":
        lost = lost.replace(r"\.weight$", "")
    refused(copy_with(reference(name), tmp_path / "src", lose(lost)), tmp_path, says)


def test_a_router_without_experts(full_reference: Reference, tmp_path: Path) -> None:
    source = copy_with(full_reference("qwen3moe-bf16"), tmp_path / "src", lose(r"layers\.2\.mlp\.experts\."))
    refused(source, tmp_path, "model.layers.2.mlp.gate.weight", "router without experts")


# ---- lost tensors of other kinds: told


def test_a_layer_that_lacks_a_tensor_is_named(reference: Reference, tmp_path: Path) -> None:
    lost = "layers.1.self_attn.o_proj.weight"
    source = copy_with(reference("llama-bf16"), tmp_path / "src", lose(re.escape(lost)))
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    [warning] = [warning for warning in result.warnings if "lacks" in warning]
    assert "model.layers.1 lacks 1 tensors" in warning
    assert "self_attn.o_proj.weight" in warning


def test_whole_layers_that_are_missing_are_named(reference: Reference, tmp_path: Path) -> None:
    source = copy_with(reference("llama-bf16"), tmp_path / "src", lose(r"layers\.0\."))
    found = fp4conv.inspect(source)
    assert any("2 layers" in warning and "has none numbered 0" in warning for warning in found.warnings)


def layer(kind: str, number: int) -> dict[str, Array]:
    names = {
        "dense": ["input_layernorm", "self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
        "moe": ["input_layernorm", "self_attn.q_proj", "mlp.gate", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj"],
        "linear": ["input_layernorm", "linear_attn.in_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    }[kind]
    return {f"model.layers.{number}.{name}.weight": bf16(np.ones((16, 16))) for name in names}


@pytest.mark.parametrize("kinds", [["dense", "moe", "moe"], ["linear", "dense", "linear"], ["dense"]])
def test_layers_of_other_kinds_lack_nothing(tmp_path: Path, kinds: list[str]) -> None:
    """Dense layers before expert layers, linear attention beside full: each has what the other has not."""
    tensors = {name: value for number, kind in enumerate(kinds) for name, value in layer(kind, number).items()}
    source = write_model(tmp_path / "src", tensors, {"model_type": "test", "num_hidden_layers": len(kinds)})
    assert fp4conv.inspect(source).warnings == ()


def test_prediction_layers_past_the_last_are_no_layers(tmp_path: Path) -> None:
    """DeepSeek's MTP layer has tensors of its own and, here, none of the experts."""
    tensors = {**layer("moe", 0), **layer("moe", 1), "model.layers.2.mlp.gate.weight": bf16(np.ones((16, 16)))}
    source = write_model(tmp_path / "src", tensors, {"model_type": "test", "num_hidden_layers": 2})
    assert fp4conv.inspect(source).warnings == ()


@pytest.mark.parametrize(
    "name", ["gptoss-bf16", "gptoss-mxfp4", "llama-nvfp4-default", "qwen3moe-bf16", "qwen3moe-nvfp4-default"]
)
def test_whole_checkpoints_are_told_nothing(reference: Reference, name: str) -> None:
    assert fp4conv.inspect(reference(name)).warnings == ()


def test_many_layers_take_little_time(tmp_path: Path) -> None:
    """60 layers of 256 experts, as DeepSeek-V3 has them: checked in a moment."""
    from time import process_time

    from fp4conv.families import Role
    from fp4conv.layouts.completeness import check_complete
    from fp4conv.model import Stored, Weight
    from fp4conv.safetensors_io import TensorRef, TensorSpec

    value = Stored(TensorRef("f", "n", TensorSpec("BF16", (1, 1)), 0))
    names = [
        f"model.layers.{n}.mlp.experts.{e}.{leaf}_proj.weight"
        for n in range(60)
        for e in range(256)
        for leaf in ("gate", "up", "down")
    ]
    weights = [Weight(name, name, Role.EXPERT, (1, 1), value) for name in names]
    started = process_time()
    assert check_complete(weights, {"num_hidden_layers": 60, "n_routed_experts": 256}) == ()
    assert process_time() - started < 2
