"""Checkpoints that look right and are not: each with one thing in it that no server would stumble over by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import Array, bf16
from faults import Tensors, config, edit_json, edit_tensors, replaced

import fp4conv
from fp4conv.errors import PlanError, SourceError
from fp4conv.report.verified import Verified

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
Reference = Callable[[str], Path]
_DOWN = "model.layers.0.mlp.down_proj.weight"
_EXPERTS = "model.layers.1.mlp.experts."


def planted(tmp_path: Path, base: str, plant: Callable[[Path], object]) -> Path:
    folder = tmp_path / "src"
    shutil.copytree(FIXTURES / base, folder)
    plant(folder)
    return folder


def severities(found: Verified) -> dict[str, str]:
    return {problem.kind: problem.severity.value for problem in found.problems}


def added(name: str, held: Array) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: held}))


def quantization(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """A change of config.json's quantization_config."""

    def edit(model: dict[str, object]) -> None:
        held = model["quantization_config"]
        assert isinstance(held, dict)
        change(held)

    return config(edit)


def group_says(key: str, value: object) -> Callable[[Path], None]:
    def change(held: dict[str, object]) -> None:
        groups = held["config_groups"]
        assert isinstance(groups, dict)
        groups["group_0"]["weights"][key] = value

    return quantization(change)


def dense_experts(folder: Path) -> None:
    """A second layer of gpt-oss whose experts are in BF16."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            tensors[name.replace("layers.0.", "layers.1.")] = tensors[name]
        for name in ("gate_up_proj", "down_proj"):
            codes = tensors.pop(f"{_EXPERTS}{name}_blocks")
            tensors.pop(f"{_EXPERTS}{name}_scales")
            experts, n, blocks, half = codes.shape
            tensors[_EXPERTS + name] = bf16(np.ones((experts, 2 * blocks * half, n)))

    edit_tensors(folder, change)
    edit_json(folder, "config.json", lambda model: model.update(num_hidden_layers=2))


def half_dense_experts(folder: Path) -> None:
    """Experts of gpt-oss whose gate_up_proj is in BF16, and whose down_proj is not."""

    def change(tensors: Tensors) -> None:
        codes = tensors.pop("model.layers.0.mlp.experts.gate_up_proj_blocks")
        tensors.pop("model.layers.0.mlp.experts.gate_up_proj_scales")
        experts, n, blocks, half = codes.shape
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = bf16(np.ones((experts, 2 * blocks * half, n)))

    edit_tensors(folder, change)


def all_of(name: str, value: int) -> Callable[[Path], None]:
    """Every byte of a tensor is `value`."""

    def change(held: Array) -> Array:
        return np.full_like(held.view(np.uint8), value).view(held.dtype)

    return replaced(name, change)


def more_layers(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            tensors[name.replace("layers.0.", "layers.7.")] = tensors[name]

    edit_tensors(folder, change)


def claims_kv_cache(folder: Path) -> None:
    quantization(lambda held: held.update(kv_cache_scheme={"num_bits": 8, "type": "float"}))(folder)
    edit_json(folder, "hf_quant_config.json", lambda said: said["quantization"].update(kv_cache_quant_algo="FP8"))  # type: ignore[attr-defined]


LLAMA, GPT_OSS = "llama-nvfp4-default", "gptoss-mxfp4"
_TINY = np.float32(1e-42)


@pytest.mark.parametrize(
    ("base", "plant", "kind", "severity"),
    [
        (GPT_OSS, added("model.layers.0.mlp.experts.down_proj", bf16(np.ones((4, 96, 128)))), "stored-twice", "error"),
        (GPT_OSS, dense_experts, "dense-experts", "error"),
        (GPT_OSS, dense_experts, "dense-but-not-ignored", "error"),
        (GPT_OSS, half_dense_experts, "set-in-part", "error"),
        (
            GPT_OSS,
            quantization(lambda held: held["modules_to_not_convert"].append("model.layers.*.mlp.experts")),  # type: ignore[attr-defined]
            "quantised-but-ignored",
            "error",
        ),
        (GPT_OSS, config(lambda model: model.update(num_hidden_layers="3")), "bad-config", "error"),
        (GPT_OSS, config(lambda model: model.update(hidden_size=128.0)), "bad-config", "error"),
        (GPT_OSS, all_of("model.layers.0.mlp.experts.down_proj_scales", 0), "all-zero", "warning"),
        (LLAMA, all_of("lm_head.weight", 0), "all-zero", "warning"),
        (LLAMA, replaced("model.norm.weight", lambda held: held.astype(np.int64)), "wrong-dtype", "error"),
        (
            LLAMA,
            replaced("model.embed_tokens.weight", lambda held: held.astype(ml_dtypes.float8_e4m3fn)),
            "wrong-dtype",
            "error",
        ),
        (LLAMA, more_layers, "unknown-tensor", "warning"),
        (LLAMA, replaced(_DOWN + "_scale_2", lambda held: np.full_like(held, _TINY)), "subnormal-scale", "warning"),
        (
            LLAMA,
            replaced("model.layers.0.mlp.down_proj.input_scale", lambda held: np.full_like(held, _TINY)),
            "subnormal-scale",
            "warning",
        ),
        (LLAMA, group_says("num_bits", 8), "wrong-algorithm", "error"),
        (LLAMA, group_says("type", "int"), "wrong-algorithm", "error"),
        (LLAMA, claims_kv_cache, "missing-kv-scale", "warning"),
        (LLAMA, added("model.layers.0.self_attn.k_proj.k_scale", np.zeros((), np.float32)), "bad-kv-scale", "warning"),
    ],
)
def test_it_is_told(tmp_path: Path, base: str, plant: Callable[[Path], object], kind: str, severity: str) -> None:
    assert kind not in severities(fp4conv.verify(FIXTURES / base))
    assert severities(fp4conv.verify(planted(tmp_path, base, plant))).get(kind) == severity


@pytest.mark.parametrize(
    ("server", "says"),
    [("vllm", "RuntimeError"), ("sglang", "stay as memory was"), ("transformers", "random values")],
)
def test_what_servers_make_of_experts_that_are_dense_in_part(tmp_path: Path, server: str, says: str) -> None:
    """What vLLM and SGLang do was run; and `convert --for` promises no other than `verify --for` finds."""
    for plant in (dense_experts, half_dense_experts):
        folder = planted(tmp_path / plant.__name__, GPT_OSS, plant)
        told = fp4conv.verify(folder, for_server=server).problems
        assert any(says in problem.consequence for problem in told if problem.severity.value == "error")
    if server != "transformers":
        with pytest.raises(PlanError, match=f"{server} .* would (not load|load without an error)"):
            fp4conv.convert(folder, tmp_path / "out", to="mxfp4", for_server=server)


def test_quantising_the_dense_experts_is_the_remedy(tmp_path: Path) -> None:
    folder = planted(tmp_path, GPT_OSS, dense_experts)
    remedy = next(p.remedy for p in fp4conv.verify(folder).problems if p.kind == "dense-experts")
    assert "--to mxfp4 --modules experts" in remedy
    fp4conv.convert(folder, tmp_path / "out", to="mxfp4", modules="experts", for_server="vllm")
    assert not fp4conv.verify(tmp_path / "out", for_server="vllm").problems


def test_experts_that_a_list_of_mxfp4_names_concern_transformers_alone(tmp_path: Path) -> None:
    """vLLM and SGLang take experts for MXFP4 whatever the list says."""
    ignoring = quantization(lambda held: held.update(modules_to_not_convert=["model.layers.*.mlp.experts"]))
    folder = planted(tmp_path, GPT_OSS, ignoring)
    assert fp4conv.verify(folder, for_server="vllm").ok
    assert fp4conv.verify(folder, for_server="sglang").ok
    assert not fp4conv.verify(folder, for_server="transformers").ok


def test_blocks_whose_values_f32_does_not_hold(tmp_path: Path) -> None:
    """Counts against NumPy: half the smallest code too small for F32, or the largest code that is there too large."""
    folder = planted(tmp_path, LLAMA, lambda folder: None)
    rng = np.random.default_rng(11)
    kept: dict[str, npt.NDArray[np.uint8]] = {}

    def change(tensors: Tensors, scale: float) -> None:
        shape = tensors[_DOWN + "_scale"].shape
        kept["scales"] = rng.integers(0, 127, shape).astype(np.uint8)
        kept["codes"] = rng.integers(0, 256, tensors[_DOWN].shape).astype(np.uint8)
        kept["codes"][:, ::3] &= 0x99  # smaller largest codes, and zeros
        tensors[_DOWN], tensors[_DOWN + "_scale"] = kept["codes"], kept["scales"].view(ml_dtypes.float8_e4m3fn)
        tensors[_DOWN + "_scale_2"] = np.full_like(tensors[_DOWN + "_scale_2"], scale)

    codes_of = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for scale, kind in ((2.0**-143, "vanishing-block"), (2.0**118, "overflowing-block")):
        edit_tensors(folder, lambda tensors, scale=scale: change(tensors, scale))  # type: ignore[misc]
        codes = np.stack([kept["codes"] & 7, (kept["codes"] >> 4) & 7], axis=-1).reshape(*kept["scales"].shape, 16)
        values = codes_of[codes].astype(np.float64)
        factor = kept["scales"].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
        with np.errstate(over="ignore"):
            decoded = (values.astype(np.float32) * factor[..., None]).astype(np.float32)
        zero_scale = (kept["scales"] == 0)[..., None]
        lost = (decoded == 0) & (values != 0) & ~zero_scale if kind == "vanishing-block" else np.isinf(decoded)
        expected = int(lost.any(axis=-1).sum())
        assert 0 < expected < kept["scales"].size
        found = fp4conv.verify(folder)
        told = next(problem.found for problem in found.problems if problem.kind == kind)
        assert told.startswith(f"{expected:,} of ")


def test_a_weight_that_is_there_twice_is_not_converted(tmp_path: Path) -> None:
    """Which of the two is meant, nobody can tell; figures of one would stand at the other."""
    held = bf16(np.ones((4, 96, 128)))
    folder = planted(tmp_path, GPT_OSS, added("model.layers.0.mlp.experts.down_proj", held))
    with pytest.raises(SourceError, match="it is there twice: as model"):
        fp4conv.inspect(folder)


def test_a_type_that_is_no_word_is_no_traceback(tmp_path: Path) -> None:
    folder = planted(tmp_path, GPT_OSS, config(lambda model: model.update(model_type=["gpt_oss"])))
    assert json.dumps(fp4conv.verify(folder).to_json())


def test_experts_that_are_dense_in_part_come_back_as_they_were(tmp_path: Path) -> None:
    """By way of BF16 and its hints: no fault of the conversion, and still one of the checkpoint."""
    source = planted(tmp_path, GPT_OSS, half_dense_experts)
    fp4conv.convert(source, tmp_path / "dense", to="bf16")
    fp4conv.convert(tmp_path / "dense", tmp_path / "back", to="mxfp4")
    assert severities(fp4conv.verify(tmp_path / "back"))["set-in-part"] == "error"
