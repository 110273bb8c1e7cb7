"""FP8 checkpoints with a scale a tile, against plain torch and transformers' own dequantisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Array, array_of, bf16, config_of, e4m3, noise, read_raw, tree, write_model

import fp4conv
from fp4conv.errors import Fp4convError

torch = pytest.importorskip("torch")

LAYER = "model.layers.0"
BLOCK = (128, 128)
# Whole tiles, tiles cut short either way, and fewer rows than one tile.
SHAPES = {"self_attn.q_proj": (256, 256), "mlp.down_proj": (320, 192), "mlp.gate_proj": (96, 320)}
SHAPES["mlp.up_proj"] = SHAPES["mlp.gate_proj"]


def quantised(shape: tuple[int, int], block: tuple[int, int], seed: int) -> tuple[Array, Array]:
    """E4M3 codes and F32 scales as DeepSeek makes them: a tile's largest magnitude becomes 448."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))).astype(np.float32)
    values[0, :16], values[1, 3] = 0.0, -0.0
    down, across = (-(-size // tile) for size, tile in zip(shape, block, strict=True))
    scales = np.empty((down, across), np.float32)
    for i in range(down):
        for j in range(across):
            tile = values[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(tile).max() / np.float32(448)
            tile /= scales[i, j]
    return e4m3(values), scales


def deepseek(
    folder: Path,
    *,
    block: tuple[int, int] = BLOCK,
    scale_dtype: Any = np.float32,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": noise((64, 192), 9),
        f"{LAYER}.input_layernorm.weight": bf16(np.ones(192)),
        f"{LAYER}.mlp.gate.e_score_correction_bias": np.ones(4, np.float32),
    }
    for seed, (module, shape) in enumerate(SHAPES.items()):
        codes, scales = quantised(shape, block, seed)
        tensors[f"{LAYER}.{module}.weight"] = codes
        tensors[f"{LAYER}.{module}.weight_scale_inv"] = bf16(scales) if scale_dtype is bf16 else scales
    tensors |= changes or {}
    config = {
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
        },
    }
    return write_model(folder, {name: value for name, value in tensors.items() if value is not None}, config)


def as_torch(array: Array) -> Any:
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def dequantised(folder: Path, module: str, block: tuple[int, int]) -> Any:
    """F32 values by torch: the code times its tile's scale."""
    raw = read_raw(folder)
    codes = as_torch(array_of(raw[f"{module}.weight"])).to(torch.float32)
    scales = as_torch(array_of(raw[f"{module}.weight_scale_inv"])).to(torch.float32)
    n, k = codes.shape
    return codes * scales.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]


@pytest.mark.parametrize("scale_dtype", [np.float32, bf16])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128)])
def test_values_are_torchs(tmp_path: Path, block: tuple[int, int], scale_dtype: Any) -> None:
    source = deepseek(tmp_path / "src", block=block, scale_dtype=scale_dtype)
    fp4conv.convert(source, tmp_path / "bf16", to="bf16", max_memory="320MB", workers=3)
    fp4conv.convert(source, tmp_path / "f32", to="f32")
    half, whole = read_raw(tmp_path / "bf16"), read_raw(tmp_path / "f32")
    with fp4conv.open(source) as checkpoint:
        for module in SHAPES:
            name, expected = f"{LAYER}.{module}.weight", dequantised(source, f"{LAYER}.{module}", block)
            assert half[name][2] == expected.to(torch.bfloat16).view(torch.uint16).numpy().tobytes()
            assert whole[name][2] == expected.numpy().tobytes()
            assert checkpoint.read(name).tobytes() == expected.numpy().tobytes()
            assert checkpoint.read(name, rows=slice(70, 90)).tobytes() == expected.numpy()[70:90].tobytes()
    assert not any(name.endswith("scale_inv") for name in half)
    assert "quantization_config" not in config_of(tmp_path / "bf16")
    assert half[f"{LAYER}.mlp.gate.e_score_correction_bias"][0] == "F32"  # put so on purpose


def test_values_are_those_of_transformers(tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    source = deepseek(tmp_path / "src")
    fp4conv.convert(source, tmp_path / "out", to="bf16")
    module = f"{LAYER}.self_attn.q_proj"  # the library takes whole tiles only
    raw = read_raw(source)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(
        as_torch(array_of(raw[f"{module}.weight"])),
        as_torch(array_of(raw[f"{module}.weight_scale_inv"])),
        torch.bfloat16,
    )
    assert read_raw(tmp_path / "out")[f"{module}.weight"][2] == theirs.view(torch.uint16).numpy().tobytes()


@pytest.mark.parametrize(("to", "rule"), [("nvfp4", "amax"), ("mxfp4", "rceil"), ("nvfp4", "mse")])
def test_four_bits_come_straight_from_f32(tmp_path: Path, to: str, rule: str) -> None:
    """As from an F32 checkpoint of the same values, never by way of BF16; sets share a tensor scale."""
    source = deepseek(tmp_path / "src")
    fp4conv.convert(source, tmp_path / "f32", to="f32")
    modules = [f"*{module}" for module in SHAPES]
    for folder in ("src", "f32"):
        out = tmp_path / f"{folder}-{to}"
        result = fp4conv.convert(tmp_path / folder, out, to=to, scale_rule=rule, include=modules)
        assert result.warnings == ()
    direct, through = (read_raw(tmp_path / f"{folder}-{to}") for folder in ("src", "f32"))
    packed = [name for name in direct if direct[name][0] in {"U8", "F8_E4M3"} or name.endswith("_scale_2")]
    assert len(packed) >= 8
    assert [name for name in packed if direct[name] != through[name]] == []


def test_what_is_quantised_by_default(tmp_path: Path) -> None:
    """As of a dense model: FP8 does not say what goes into four bits. kv_b_proj, which servers split, stays dense."""
    codes, scales = quantised((128, 128), BLOCK, 5)
    absorbed = f"{LAYER}.self_attn.kv_b_proj"
    source = deepseek(tmp_path / "src", changes={f"{absorbed}.weight": codes, f"{absorbed}.weight_scale_inv": scales})
    found = fp4conv.inspect(source)
    assert (found.format, found.layout) == ("fp8", "fp8")
    assert {facts.format for facts in found.tensors} == {"fp8", "bf16", "f32"}
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    assert result.source_format == "fp8"
    assert result.per_tensor.keys() == {f"{LAYER}.{module}.weight" for module in SHAPES}
    assert read_raw(tmp_path / "out")[f"{absorbed}.weight"][0] == "BF16"


def test_workers_and_memory_change_no_byte(tmp_path: Path) -> None:
    source = deepseek(tmp_path / "src", block=(8, 32))
    for number, (workers, memory) in enumerate([(1, "1GB"), (4, "320MB")]):
        fp4conv.convert(source, tmp_path / str(number), to="nvfp4", workers=workers, max_memory=memory)
    assert read_raw(tmp_path / "0") == read_raw(tmp_path / "1")


def test_scales_of_inputs_are_named_and_left_out(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.down_proj.input_scale"
    source = deepseek(tmp_path / "src", changes={name: np.ones((), np.float32)})
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    assert any(name in warning for warning in result.warnings)
    assert name not in read_raw(tmp_path / "out")


# ---- bad input

DOWN = f"{LAYER}.mlp.down_proj"
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no weight": ({f"{DOWN}.weight": None}, f"{DOWN}.weight_scale_inv"),
    "no scales": ({f"{DOWN}.weight_scale_inv": None}, f"{DOWN}.weight"),
    "a BF16 weight": ({f"{DOWN}.weight": noise((320, 192))}, f"{DOWN}.weight"),
    "scales of another shape": ({f"{DOWN}.weight_scale_inv": np.ones((2, 2), np.float32)}, f"{DOWN}.weight_scale_inv"),
    "scales turned": ({f"{DOWN}.weight_scale_inv": np.ones((2, 3), np.float32)}, f"{DOWN}.weight_scale_inv"),
    "scales in F64": ({f"{DOWN}.weight_scale_inv": np.ones((3, 2), np.int64)}, f"{DOWN}.weight_scale_inv"),
    "another FP8 weight": ({"model.layers.0.self_attn.o_proj.weight": e4m3(np.ones((4, 4)))}, "o_proj.weight"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("to", ["bf16", "nvfp4"])
def test_damaged_ones_are_refused_by_name(tmp_path: Path, kind: str, to: str) -> None:
    changes, where = BROKEN[kind]
    source = deepseek(tmp_path / "src", changes=changes)
    before = tree(tmp_path)
    with pytest.raises(Fp4convError, match=where):
        fp4conv.convert(source, tmp_path / "out", to=to)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stated", [None, [128], [0, 128], "128x128"])
def test_no_tile_size_no_reading(tmp_path: Path, stated: object) -> None:
    source = deepseek(tmp_path / "src")
    config = config_of(source)
    quantization = config["quantization_config"]
    assert isinstance(quantization, dict)
    tensors = {name: array_of(value) for name, value in read_raw(source).items()}
    write_model(
        tmp_path / "other", tensors, {**config, "quantization_config": {**quantization, "weight_block_size": stated}}
    )
    with pytest.raises(Fp4convError, match="weight_block_size"):
        fp4conv.convert(tmp_path / "other", tmp_path / "out", to="bf16")


@pytest.mark.parametrize("to", ["bf16", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("kind", ["code", "scale", "overflow"])
def test_values_that_are_not_finite(tmp_path: Path, kind: str, to: str) -> None:
    codes, scales = quantised(SHAPES["mlp.down_proj"], BLOCK, 1)
    if kind == "code":
        codes.view(np.uint8)[200, 100] = 0x7F
    else:
        scales[1, 0] = np.nan if kind == "scale" else 3e38
    source = deepseek(tmp_path / "src", changes={f"{DOWN}.weight": codes, f"{DOWN}.weight_scale_inv": scales})
    with pytest.raises(Fp4convError, match=f"{DOWN}.weight") as caught:
        fp4conv.convert(source, tmp_path / "out", to=to)
    assert "[200, 100]" in str(caught.value) or kind != "code"
    with fp4conv.open(source) as checkpoint, pytest.raises(Fp4convError, match=f"{DOWN}.weight"):
        checkpoint.read(f"{DOWN}.weight")


@pytest.mark.parametrize("scale", [np.float32(0.5), bf16(np.ones((320, 1)))], ids=["a scale a tensor", "a scale a row"])
def test_fp8_of_other_kinds_is_named(tmp_path: Path, scale: Any) -> None:
    """ModelOpt's and llm-compressor's: refused, with what it is."""
    tensors = {f"{DOWN}.weight": e4m3(np.ones((320, 192))), f"{DOWN}.weight_scale": np.asarray(scale)}
    source = write_model(tmp_path / "src", tensors)
    with pytest.raises(Fp4convError, match="FP8 with a scale a tensor or a row"):
        fp4conv.convert(source, tmp_path / "out", to="bf16")


def test_it_is_not_written(tmp_path: Path) -> None:
    source = deepseek(tmp_path / "src")
    for to in ("bf16", "nvfp4"):
        with pytest.raises(Fp4convError, match="does not hold"):
            fp4conv.convert(source, tmp_path / "out", to=to, layout="fp8")
