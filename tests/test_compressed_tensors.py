"""compressed-tensors' NVFP4, in and out, against the library itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Raw, Values, array_of, bf16, config_of, e4m3, read_raw, tree, write_model
from library_checkpoints import made_by_compressed_tensors

import fp4conv
from fp4conv.errors import Fp4convError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

Reference = Callable[[str], Path]
SCALARS = (".weight_scale_2", ".input_scale")


@pytest.fixture(params=["NVFP4A16", "NVFP4"])
def theirs(request: pytest.FixtureRequest, reference: Reference, tmp_path: Path) -> Path:
    """llama-bf16 as the library writes it, weight-only and with quantised inputs."""
    return made_by_compressed_tensors(reference("llama-bf16"), tmp_path / "theirs", request.param)


def decompressed_by_the_library(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """BF16 bits of every quantised weight, by the library's own decompression."""
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    values = {}
    for name in tensors:
        if name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed").removesuffix(".weight")
            parts = {k.removeprefix(stem + "."): value for k, value in tensors.items() if k.startswith(stem + ".")}
            whole = NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
            values[f"{stem}.weight"] = whole.contiguous().view(torch.uint16).numpy()
    assert values
    return values


# ---- in


def test_the_librarys_checkpoint_decodes_to_the_librarys_values(theirs: Path, tmp_path: Path) -> None:
    """Block scale divided by global scale in F32, times the code, once rounded: every bit."""
    expected = decompressed_by_the_library(theirs)
    result = fp4conv.convert(theirs, tmp_path / "bf16", to="bf16")
    ours = read_raw(tmp_path / "bf16")
    for name, bits in expected.items():
        assert ours[name][2] == bits.tobytes(), name
    assert "quantization_config" not in config_of(tmp_path / "bf16")
    w4a4 = any(name.endswith("input_global_scale") for name in read_raw(theirs))
    assert any("input scales" in warning for warning in result.warnings) == w4a4
    with fp4conv.open(theirs) as checkpoint:
        for name, bits in expected.items():
            assert np.array_equal(bf16(checkpoint.read(name)).view(np.uint16), bits)


def test_the_division_is_not_the_product_with_the_reciprocal(theirs: Path) -> None:
    """The order of operations shows: with ModelOpt's, bits of these very weights would differ."""
    from fp4conv.kernels import compiled

    raw = read_raw(theirs)
    differing = 0
    for name in raw:
        if name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed")
            packed, scales = (array_of(raw[stem + part]).view(np.uint8) for part in ("_packed", "_scale"))
            whole = float(array_of(raw[f"{stem}_global_scale"])[0])
            outs = [np.empty((packed.shape[0], packed.shape[1] * 2), np.float32) for _ in range(2)]
            compiled.decode_nvfp4(packed, scales, False, whole, outs[0], inverse=True)
            compiled.decode_nvfp4(packed, scales, False, float(np.float32(1) / np.float32(whole)), outs[1])
            differing += int(np.count_nonzero(outs[0] != outs[1]))
    assert differing


def test_laid_out_anew_it_stays_as_it_is(theirs: Path, tmp_path: Path) -> None:
    fp4conv.convert(theirs, tmp_path / "same", to="nvfp4", layout="compressed-tensors")
    assert read_raw(tmp_path / "same") == read_raw(theirs)


def test_in_modelopts_layout_codes_and_scales_are_kept(theirs: Path, tmp_path: Path) -> None:
    result = fp4conv.convert(theirs, tmp_path / "out", to="nvfp4")
    assert result.layout == "modelopt"
    assert any("reciprocals" in warning for warning in result.warnings)
    before, after = read_raw(theirs), read_raw(tmp_path / "out")
    for name, value in before.items():
        if name.endswith(".weight_packed"):
            assert after[name.removesuffix("_packed")] == value
        elif name.endswith("global_scale"):
            renamed = name.replace("weight_global_scale", "weight_scale_2").replace("input_global_scale", "input_scale")
            assert after[renamed][:2] == ("F32", ())
            assert array_of(after[renamed]) == np.float32(1) / array_of(value)[0]
        else:
            assert after[name] == value
    assert len(after) == len(before)


# ---- out


def test_our_config_and_names_are_the_librarys(theirs: Path, reference: Reference, tmp_path: Path) -> None:
    """Key for key, for weight-only and for quantised inputs; `ignore` names the embeddings too, which are no Linear."""
    w4a4 = any(name.endswith("input_global_scale") for name in read_raw(theirs))
    scales = "constant" if w4a4 else "none"
    fp4conv.convert(
        reference("llama-bf16"), tmp_path / "ours", to="nvfp4", layout="compressed-tensors", input_scales=scales
    )
    ours, expected = (config_of(folder)["quantization_config"] for folder in (tmp_path / "ours", theirs))
    assert isinstance(ours, dict)
    assert isinstance(expected, dict)
    expected.pop("moe_sparsity_config")  # null, and unknown to earlier releases
    assert set(expected.pop("ignore")) < set(ours.pop("ignore"))
    assert ours == expected
    left, right = read_raw(tmp_path / "ours"), read_raw(theirs)
    assert {name: value[:2] for name, value in left.items()} == {name: value[:2] for name, value in right.items()}


MODELOPTS = ["llama-nvfp4-mlp-only", "qwen3moe-nvfp4-mlp-only", "llama-nvfp4-default"]


@pytest.mark.parametrize("name", MODELOPTS)
def test_modelopts_checkpoint_there_and_back(reference: Reference, tmp_path: Path, name: str) -> None:
    """Every byte: the scalars that F32's reciprocal rounds for good are kept beside, and the warning counts them."""
    source = reference(name)
    result = fp4conv.convert(source, tmp_path / "ct", to="nvfp4", layout="compressed-tensors")
    fp4conv.convert(tmp_path / "ct", tmp_path / "back", to="nvfp4", layout="modelopt")
    assert read_raw(tmp_path / "back") == read_raw(source)
    lost = lost_scalars(read_raw(source))
    kept = config_of(tmp_path / "ct", "fp4conv/reciprocals.json")["scales"] if lost else {}
    assert isinstance(kept, dict)
    assert sorted(kept.values()) == sorted(float(value.reshape(())).hex() for value in lost.values())
    [said] = [warning for warning in result.warnings if "reciprocals" in warning]
    assert (f"{len(lost)} of them do not" in said) == bool(lost)
    assert not (tmp_path / "back" / "fp4conv").exists()


def lost_scalars(raw: Raw) -> dict[str, Values]:
    """The scalars whose reciprocal's reciprocal is another F32 value."""
    scalars = {key: array_of(value).astype(np.float32) for key, value in raw.items() if key.endswith(SCALARS)}
    one = np.float32(1)
    return {key: value for key, value in scalars.items() if one / (one / value) != value}


def test_without_hints_scalars_differ_in_the_last_bit(reference: Reference, tmp_path: Path) -> None:
    """So they do where what was kept does not fit what is stored, or was not asked for on the way back."""
    source = reference("llama-nvfp4-default")
    lost = lost_scalars(read_raw(source))
    assert lost
    fp4conv.convert(source, tmp_path / "bare", to="nvfp4", layout="compressed-tensors", hints=False)
    assert not (tmp_path / "bare" / "fp4conv").exists()
    fp4conv.convert(source, tmp_path / "ct", to="nvfp4", layout="compressed-tensors")
    fp4conv.convert(tmp_path / "ct", tmp_path / "ignored", to="nvfp4", hints=False)
    kept = tmp_path / "ct" / "fp4conv" / "reciprocals.json"
    listed = config_of(tmp_path / "ct", "fp4conv/reciprocals.json")
    assert isinstance(listed["scales"], dict)
    listed["scales"] = dict.fromkeys(listed["scales"], "0x1.8p-10")
    kept.write_text(json.dumps(listed))
    fp4conv.convert(tmp_path / "ct", tmp_path / "stale", to="nvfp4")
    fp4conv.convert(tmp_path / "bare", tmp_path / "none", to="nvfp4")
    for folder in ("none", "ignored", "stale"):
        after, before = read_raw(tmp_path / folder), read_raw(source)
        assert {name for name in before if before[name] != after[name]} == set(lost)
    listed["scales"] = {"model.layers.0.mlp.down_proj.tensor_scale": "many"}
    kept.write_text(json.dumps(listed))
    with pytest.raises(Fp4convError, match=r"reciprocals\.json"):
        fp4conv.convert(tmp_path / "ct", tmp_path / "broken", to="nvfp4")


def test_the_librarys_checkpoint_there_and_back(theirs: Path, tmp_path: Path) -> None:
    fp4conv.convert(theirs, tmp_path / "modelopt", to="nvfp4")
    fp4conv.convert(tmp_path / "modelopt", tmp_path / "back", to="nvfp4", layout="compressed-tensors")
    assert read_raw(tmp_path / "back") == read_raw(theirs)


@pytest.mark.parametrize("to", ["bf16", "f32"])
def test_by_way_of_a_dense_checkpoint_every_byte_comes_back(theirs: Path, tmp_path: Path, to: str) -> None:
    """Round-trip hints know that the scalars are reciprocals, those of inputs too; for the other layout they turn."""
    fp4conv.convert(theirs, tmp_path / "dense", to=to)
    fp4conv.convert(tmp_path / "dense", tmp_path / "back", to="nvfp4", layout="compressed-tensors")
    assert read_raw(tmp_path / "back") == read_raw(theirs)
    fp4conv.convert(tmp_path / "dense", tmp_path / "modelopt", to="nvfp4")
    fp4conv.convert(theirs, tmp_path / "expected", to="nvfp4")
    assert read_raw(tmp_path / "modelopt") == read_raw(tmp_path / "expected")


def test_transformers_loads_it_with_the_logits_of_our_bf16(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-bf16")
    fp4conv.convert(source, tmp_path / "ct", to="nvfp4", layout="compressed-tensors")
    fp4conv.convert(tmp_path / "ct", tmp_path / "bf16", to="bf16")
    logits = []
    for folder in ("ct", "bf16"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        with torch.inference_mode():
            logits.append(model(torch.arange(3, 40)[None]).logits)
    assert torch.equal(*logits)


def test_mxfp4_goes_there_as_exactly_as_to_modelopts_layout(reference: Reference, tmp_path: Path) -> None:
    """The tensor scale is a power of two, and so is its reciprocal."""
    fp4conv.convert(reference("llama-bf16"), tmp_path / "mx", to="mxfp4")
    for layout in ("compressed-tensors", "modelopt"):
        result = fp4conv.convert(tmp_path / "mx", tmp_path / layout, to="nvfp4", layout=layout)
        assert not any("reciprocals" in warning for warning in result.warnings)
        fp4conv.convert(tmp_path / layout, tmp_path / f"{layout}-bf16", to="bf16")
    assert read_raw(tmp_path / "compressed-tensors-bf16") == read_raw(tmp_path / "modelopt-bf16")


def test_workers_and_memory_change_no_byte(reference: Reference, tmp_path: Path) -> None:
    source = reference("qwen3moe-nvfp4-default")
    for number, (workers, memory) in enumerate([(1, "1GB"), (4, "320MB")]):
        fp4conv.convert(
            source, tmp_path / str(number), to="nvfp4", layout="compressed-tensors", workers=workers, max_memory=memory
        )
    assert read_raw(tmp_path / "0") == read_raw(tmp_path / "1")


def test_kv_scales_have_no_place_in_it(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-nvfp4-mlp-only")
    raw = {key: array_of(value) for key, value in read_raw(source).items()}
    raw["model.layers.0.self_attn.k_proj.k_scale"] = np.array(0.5, np.float32)
    write_model(tmp_path / "src", raw, config_of(source))
    result = fp4conv.convert(tmp_path / "src", tmp_path / "out", to="nvfp4", layout="compressed-tensors")
    assert any("KV-cache" in warning for warning in result.warnings)
    assert not any(name.endswith("k_scale") for name in read_raw(tmp_path / "out"))


def test_gpt_oss_has_no_such_form(reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(Fp4convError, match="linear layers only"):
        fp4conv.convert(reference("gptoss-mxfp4"), tmp_path / "out", to="nvfp4", layout="compressed-tensors")


# ---- bad input

DOWN = "model.layers.0.mlp.down_proj"


def packed_nvfp4() -> dict[str, Any]:
    return {
        f"{DOWN}.weight_packed": np.full((8, 32), 0x21, np.uint8),
        f"{DOWN}.weight_scale": e4m3(np.ones((8, 4))),
        f"{DOWN}.weight_global_scale": np.full(1, 4.0, np.float32),
        "model.norm.weight": bf16(np.ones(8)),
    }


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no codes": ({f"{DOWN}.weight_packed": None}, f"{DOWN}.weight_packed"),
    "no block scales": ({f"{DOWN}.weight_scale": None}, f"{DOWN}.weight"),
    "no global scale": ({f"{DOWN}.weight_global_scale": None}, f"{DOWN}.weight_global_scale"),
    "a global scale a row": ({f"{DOWN}.weight_global_scale": np.ones(8, np.float32)}, f"{DOWN}.weight_global_scale"),
    "a BF16 global scale": ({f"{DOWN}.weight_global_scale": bf16(np.ones(1))}, f"{DOWN}.weight_global_scale"),
    "blocks of 8": ({f"{DOWN}.weight_scale": e4m3(np.ones((8, 8)))}, f"{DOWN}.weight_packed"),
    "a zero point": ({f"{DOWN}.weight_zero_point": e4m3(np.ones((8, 4)))}, f"{DOWN}.weight_zero_point"),
    "an FP8 layer beside it": (
        {"model.layers.0.mlp.up_proj.weight": e4m3(np.ones((8, 8)))},
        "model.layers.0.mlp.up_proj.weight",
    ),
    "scales of another layer": (
        {"model.layers.0.mlp.up_proj.weight_scale": bf16(np.ones((8, 1)))},
        "model.layers.0.mlp.up_proj.weight_scale",
    ),
    "a global scale of zero": ({f"{DOWN}.weight_global_scale": np.zeros(1, np.float32)}, f"{DOWN}.weight_global_scale"),
    "a global scale that is NaN": (
        {f"{DOWN}.weight_global_scale": np.full(1, np.nan, np.float32)},
        f"{DOWN}.weight_global_scale",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_damaged_ones_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    changes, where = BROKEN[kind]
    tensors = {name: value for name, value in {**packed_nvfp4(), **changes}.items() if value is not None}
    source = write_model(tmp_path / "src", tensors)
    with pytest.raises(Fp4convError, match=where):
        fp4conv.convert(source, tmp_path / "out", to="bf16")
    if "global scale of" in kind or "NaN" in kind:  # values, found by a run
        before = tree(source)
        with pytest.raises(Fp4convError, match=where):
            fp4conv.convert(source, tmp_path / "nvfp4", to="nvfp4")
        assert not (tmp_path / "nvfp4.partial").exists()
        assert tree(source) == before
    else:
        assert not (tmp_path / "out.partial").exists()


def test_a_scale_without_a_reciprocal_is_refused(tmp_path: Path) -> None:
    source = write_model(
        tmp_path / "src",
        {**packed_nvfp4(), f"{DOWN}.weight_global_scale": np.full(1, 1e-45, np.float32)},
    )
    with pytest.raises(Fp4convError, match=f"{DOWN}.weight_global_scale"):
        fp4conv.convert(source, tmp_path / "out", to="nvfp4")


def test_scales_of_the_kv_cache_are_named_and_left_out(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.k_scale": bf16(np.ones(1))}
    source = write_model(tmp_path / "src", {**packed_nvfp4(), **extra})
    found = fp4conv.inspect(source)
    assert any("KV cache" in warning for warning in found.warnings)
