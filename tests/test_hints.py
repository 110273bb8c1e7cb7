"""Round trips to the byte: a dense checkpoint and its hints give back every tensor of the four-bit one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import (
    INDEX,
    Array,
    Raw,
    array_of,
    assert_same_tensors,
    bf16,
    config_of,
    decode_experts_mxfp4,
    decode_nvfp4,
    e4m3,
    noise,
    read_raw,
    tree,
    unpack,
    write_model,
    write_shard,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fp4conv
from fp4conv.commands.convert import plan_conversion
from fp4conv.errors import SourceError, ValuesError
from fp4conv.hints.values import FACTS, LOG, PARTS, RECORDS
from fp4conv.kernels import hints_reference
from fp4conv.plan import BASE_BYTES

Reference = Callable[[str], Path]
MXFP4 = ["gptoss-mxfp4", "gptoss-mxfp4-native-like"]
NVFP4 = [
    "gptoss-nvfp4-default",
    "gptoss-nvfp4-mlp-only",
    "gptoss-nvfp4-cast-from-mxfp4",
    "llama-nvfp4-default",
    "llama-nvfp4-mlp-only",
    "qwen3moe-nvfp4-default",
    "qwen3moe-nvfp4-mlp-only",
]
QUANTISED = ("_blocks", "_scales", "weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
LAYER = "model.layers.0"
SINKS: Mapping[str, Array] = {f"{LAYER}.self_attn.sinks": bf16([0.5, -1.0])}  # what tells gpt-oss
PROPERTY = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def round_trip(source: Path, folder: Path, via: str, to: str, **back: object) -> fp4conv.ConvertResult:
    shutil.rmtree(folder, ignore_errors=True)
    fp4conv.convert(source, folder / "dense", to=via)
    return fp4conv.convert(folder / "dense", folder / "back", to=to, **back)  # type: ignore[arg-type]


# ---- checkpoints of other tools


@pytest.mark.parametrize("via", ["bf16", "f32"])
@pytest.mark.parametrize("name", [*MXFP4, *NVFP4])
def test_every_tensor_comes_back(reference: Reference, tmp_path: Path, name: str, via: str) -> None:
    to = "mxfp4" if name in MXFP4 else "nvfp4"
    result = round_trip(reference(name), tmp_path, via, to)
    assert_same_tensors(read_raw(tmp_path / "back"), read_raw(reference(name)))
    assert (result.hints.blocks_stale, result.hints.sets_stale) == (0, 0)
    assert not (tmp_path / "back" / "fp4conv").exists()


@pytest.mark.parametrize("name", [*MXFP4, *NVFP4])
def test_quantised_tensors_come_back_from_f16(reference: Reference, tmp_path: Path, name: str) -> None:
    """Of dense tensors F16 itself rounds small values; nothing can bring those back."""
    round_trip(reference(name), tmp_path, "f16", "mxfp4" if name in MXFP4 else "nvfp4")
    ours, theirs = read_raw(tmp_path / "back"), read_raw(reference(name))
    assert sorted(ours) == sorted(theirs)
    kept = [n for n, (dtype, _, _) in theirs.items() if dtype in ("U8", "F8_E4M3") or n.endswith(QUANTISED)]
    assert kept
    for tensor in kept:
        assert ours[tensor] == theirs[tensor], tensor
    for tensor, (dtype, shape, _) in theirs.items():
        assert ours[tensor][:2] == (dtype, shape)


@pytest.mark.parametrize(("rule", "ties"), [("floor", "down"), ("even", "even"), ("rceil", "even")])
def test_old_bytes_win_over_a_rule(reference: Reference, tmp_path: Path, rule: str, ties: str) -> None:
    source = reference("gptoss-mxfp4-native-like")
    round_trip(source, tmp_path, "bf16", "mxfp4", scale_rule=rule, ties=ties)
    assert_same_tensors(read_raw(tmp_path / "back"), read_raw(source))


@pytest.mark.parametrize("name", ["llama-nvfp4-default", "llama-nvfp4-mlp-only", "qwen3moe-nvfp4-default"])
def test_configs_say_the_same(reference: Reference, tmp_path: Path, name: str) -> None:
    """As a layout of the source anew says: algorithm, group size, what is not quantised, W4A4."""
    source = reference(name)
    round_trip(source, tmp_path, "bf16", "nvfp4")
    fp4conv.convert(source, tmp_path / "anew", to="nvfp4")
    for file in ("config.json", "hf_quant_config.json"):
        assert config_of(tmp_path / "back", file) == config_of(tmp_path / "anew", file)
    assert config_of(tmp_path / "back")["quantization_config"]["quant_algo"] == "NVFP4"  # type: ignore[index]


def test_kv_scales_come_back(full_reference: Reference, tmp_path: Path) -> None:
    source = full_reference("gptoss-nvfp4-default-kvfp8")
    round_trip(source, tmp_path, "f32", "nvfp4")
    assert_same_tensors(read_raw(tmp_path / "back"), read_raw(source))
    separate = config_of(tmp_path / "back", "hf_quant_config.json")["quantization"]
    assert separate["kv_cache_quant_algo"] == "FP8"  # type: ignore[index]


@pytest.mark.parametrize("name", ["gptoss-nvfp4-weight-only", "llama-nvfp4-weight-only"])
def test_blocks_of_32_come_back_as_pairs_of_16(reference: Reference, tmp_path: Path, name: str) -> None:
    """Which is what a layout of such a source anew writes, and what servers read."""
    round_trip(reference(name), tmp_path, "bf16", "nvfp4")
    fp4conv.convert(reference(name), tmp_path / "anew", to="nvfp4")
    assert_same_tensors(read_raw(tmp_path / "back"), read_raw(tmp_path / "anew"))


# ---- any codes, any scales


def random_codes(draw: st.DrawFn, size: int) -> npt.NDArray[np.uint8]:
    """Packed codes: of all values, or small ones, or zeros of both signs, by blocks of eight bytes."""
    content = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(-1, 8)
    masks = draw(
        st.lists(st.sampled_from([255, 0xDD, 0xBB, 0x99, 0x88, 0]), min_size=len(content), max_size=len(content))
    )
    return (content & np.array(masks, np.uint8)[:, None]).reshape(-1)


@st.composite
def mxfp4_experts(draw: st.DrawFn) -> Mapping[str, Array]:
    """gpt-oss experts of E 2, K 64 and N 6: every scale byte but NaN; 253 and 254 may overflow."""
    codes = random_codes(draw, 2 * 6 * 2 * 16).reshape(2, 6, 2, 16)
    scales = st.integers(0, 254) | st.sampled_from([0, 1, 2, 100, 103, 104, 127, 251, 252, 253, 254])
    drawn = draw(st.lists(scales, min_size=24, max_size=24))
    stem = f"{LAYER}.mlp.experts"
    other = noise((2, 64, 32))
    return {
        f"{stem}.gate_up_proj_blocks": codes,
        f"{stem}.gate_up_proj_scales": np.array(drawn, np.uint8).reshape(2, 6, 2),
        f"{stem}.down_proj": other,
        **SINKS,
    }


def tensor_scales() -> st.SearchStrategy[npt.NDArray[np.float32]]:
    """Any positive finite float32: subnormal, huge, a power of two, ordinary."""
    bits = st.integers(1, 0x7F7FFFFF) | st.integers(1, 0x01000000) | st.integers(0x30000000, 0x3F800000)
    return bits.map(lambda value: np.array(value, np.uint32).view(np.float32))


@st.composite
def nvfp4_linear(draw: st.DrawFn) -> Mapping[str, Array]:
    """q and k of one set, each with a tensor scale of its own, and o alone; every E4M3 byte without a sign."""
    found: dict[str, Array] = {"model.norm.weight": noise((32,))}
    for name in "qko":
        module = f"{LAYER}.self_attn.{name}_proj"
        scales = draw(st.lists(st.integers(0, 0x7E) | st.sampled_from([0, 1, 8, 0x38]), min_size=8, max_size=8))
        found[f"{module}.weight"] = random_codes(draw, 64).reshape(4, 16)
        found[f"{module}.weight_scale"] = np.array(scales, np.uint8).reshape(4, 2).view(e4m3(0).dtype)
        found[f"{module}.weight_scale_2"] = draw(tensor_scales())
    return found


def overflows(values: npt.NDArray[np.float64], via: str) -> bool:
    with np.errstate(over="ignore"):
        wide = values.astype(np.float32)
        narrow = {"bf16": bf16(wide), "f16": wide.astype(np.float16)}.get(via, wide)
        return not np.isfinite(narrow.astype(np.float64)).all()


@PROPERTY
@given(mxfp4_experts(), st.sampled_from(["bf16", "bf16", "f32", "f16"]))
def test_any_mxfp4_comes_back(tmp_path: Path, tensors: Mapping[str, Array], via: str) -> None:
    shutil.rmtree(tmp_path / "src", ignore_errors=True)
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "dtype": "bfloat16"}
    source = write_model(tmp_path / "src", tensors, config)
    if overflows(decode_experts_mxfp4(read_raw(source), f"{LAYER}.mlp.experts.gate_up_proj"), via):
        with pytest.raises(ValuesError, match="gate_up_proj"):
            round_trip(source, tmp_path / "trip", via, "mxfp4")
        return
    round_trip(source, tmp_path / "trip", via, "mxfp4")
    ours, theirs = read_raw(tmp_path / "trip" / "back"), read_raw(source)
    assert sorted(ours) == sorted(theirs)
    for name in theirs:
        assert ours[name] == theirs[name] or (via == "f16" and theirs[name][0] == "BF16"), name


@PROPERTY
@given(nvfp4_linear(), st.sampled_from(["bf16", "bf16", "f32", "f16"]))
def test_any_nvfp4_comes_back(tmp_path: Path, tensors: Mapping[str, Array], via: str) -> None:
    """Also where the members of a set had tensor scales of their own, which is worth a warning."""
    shutil.rmtree(tmp_path / "src", ignore_errors=True)
    source = write_model(tmp_path / "src", tensors)
    raw = read_raw(source)
    modules = [f"{LAYER}.self_attn.{name}_proj" for name in "qko"]
    with np.errstate(over="ignore"):
        values = [f32_products(raw, module) for module in modules]
    if any(overflows(value, via) for value in values):
        with pytest.raises(ValuesError, match="_proj"):
            round_trip(source, tmp_path / "trip", via, "nvfp4")
        return
    result = round_trip(source, tmp_path / "trip", via, "nvfp4")
    ours = read_raw(tmp_path / "trip" / "back")
    assert_same_tensors(ours, raw, leaving_out=("norm.weight",) if via == "f16" else ()) if via != "f16" else None
    for name in raw:
        assert ours[name] == raw[name] or (via == "f16" and raw[name][0] == "BF16"), name
    split = raw[f"{modules[0]}.weight_scale_2"] != raw[f"{modules[1]}.weight_scale_2"]
    assert any("differ within the set" in warning for warning in result.warnings) == split
    assert (result.hints.sets_used, result.hints.sets_stale) == (2, 0)


@PROPERTY
@given(nvfp4_linear(), st.sampled_from(["bf16", "f32", "f16"]))
def test_any_nvfp4_under_reciprocals_comes_back(tmp_path: Path, tensors: Mapping[str, Array], via: str) -> None:
    """compressed-tensors' global scales, in its own layout."""
    shutil.rmtree(tmp_path / "src", ignore_errors=True)
    renamed = {".weight": ".weight_packed", ".weight_scale": ".weight_scale", ".weight_scale_2": ".weight_global_scale"}
    theirs: dict[str, Array] = {"model.norm.weight": tensors["model.norm.weight"]}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if module.endswith("_proj"):
            shaped = value.reshape(1) if part == "weight_scale_2" else value
            theirs[module + renamed[f".{part}"]] = shaped
    source = write_model(tmp_path / "src", theirs)
    raw = read_raw(source)
    with np.errstate(all="ignore"):
        values = [divided(raw, f"{LAYER}.self_attn.{name}_proj") for name in "qko"]
    if any(overflows(value, via) for value in values):
        with pytest.raises(ValuesError, match="_proj"):
            round_trip(source, tmp_path / "trip", via, "nvfp4", layout="compressed-tensors")
        return
    round_trip(source, tmp_path / "trip", via, "nvfp4", layout="compressed-tensors")
    ours, before = read_raw(tmp_path / "trip" / "back"), read_raw(source)
    for name in before:
        assert ours[name] == before[name] or (via == "f16" and before[name][0] == "BF16"), name


def f32(raw: Raw, name: str) -> npt.NDArray[np.float32]:
    return array_of(raw[name]).astype(np.float32)


def divided(raw: Raw, module: str) -> npt.NDArray[np.float64]:
    """The largest magnitude of each block under F32(block scale / global scale)."""
    scale = f32(raw, f"{module}.weight_scale") / f32(raw, f"{module}.weight_global_scale")
    codes = unpack(array_of(raw[f"{module}.weight_packed"])).reshape(4, 2, 16)
    product: npt.NDArray[np.float64] = (np.abs(codes).max(axis=-1) * scale).astype(np.float64)
    return product


def f32_products(raw: Raw, module: str) -> npt.NDArray[np.float64]:
    """Values as tools compute them: the product of the scales is rounded to F32 first."""
    scale = f32(raw, f"{module}.weight_scale") * f32(raw, f"{module}.weight_scale_2")
    ones = np.ones((), np.float32)
    unit = np.ones_like(scale).astype(e4m3(0).dtype)
    codes = decode_nvfp4(array_of(raw[f"{module}.weight"]), unit, ones)
    with np.errstate(over="ignore", invalid="ignore"):
        product: npt.NDArray[np.float64] = (codes.astype(np.float32) * np.repeat(scale, 16, axis=1)).astype(np.float64)
    return product


def test_hints_are_few_where_scales_are_implied(tmp_path: Path) -> None:
    """What this program quantised itself needs none; a byte a block at the most, numbers and bytes where it is less."""
    rng = np.random.default_rng(1)
    experts = bf16(rng.standard_normal((2, 64, 96)))
    tensors = {f"{LAYER}.mlp.experts.{name}": experts for name in ("gate_up_proj", "down_proj")} | dict(SINKS)
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1}
    fp4conv.convert(write_model(tmp_path / "src", tensors, config), tmp_path / "mxfp4", to="mxfp4")
    fp4conv.convert(tmp_path / "mxfp4", tmp_path / "dense", to="bf16")
    assert [path.name for path in (tmp_path / "dense" / "fp4conv").iterdir()] == ["hints.json"]
    for share, expected in ((0.1, {"index": 12, "scales": 12}), (0.7, {"scales": 384})):
        raw = {name: array_of(value) for name, value in read_raw(tmp_path / "mxfp4").items()}
        scales = np.full((2, 96, 2), 127, np.uint8)
        codes = np.full((2, 96, 2, 16), 0x77, np.uint8)
        picked = rng.permutation(384) < expected.get("index", 384 * share)
        codes.reshape(384, 16)[picked] = 0x55
        stem = f"{LAYER}.mlp.experts.gate_up_proj"
        name = f"dense-{share}"
        source = write_model(
            tmp_path / f"src-{share}", {**raw, f"{stem}_blocks": codes, f"{stem}_scales": scales}, config
        )
        fp4conv.convert(source, tmp_path / name, to="bf16")
        found = {n.removeprefix(stem + "."): value[1][0] for n, value in read_raw(tmp_path / name / "fp4conv").items()}
        assert found == expected
        plan = plan_conversion(source, to="bf16")
        taken = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        assert taken <= plan.disk_bytes + 400  # digests


# ---- a model that was trained on


def edit(folder: Path, name: str, change: Callable[[Array], None]) -> None:
    """Change a tensor of the dense checkpoint in place, as a training that saves under the same names would."""
    for path in folder.glob("*.safetensors"):
        raw = {key: array_of(value).copy() for key, value in read_one(path).items()}
        if name in raw:
            change(raw[name])
            write_shard(path, raw)
            return
    raise AssertionError(f"{name} is not in {folder}")


def read_one(path: Path) -> Raw:
    lonely = path.parent / "one"
    lonely.mkdir()
    shutil.copy(path, lonely)
    raw = read_raw(lonely)
    shutil.rmtree(lonely)
    return raw


def test_blocks_that_changed_are_quantised_anew_and_the_others_come_back(reference: Reference, tmp_path: Path) -> None:
    source = reference("gptoss-mxfp4-native-like")
    fp4conv.convert(source, tmp_path / "dense", to="bf16")
    stem = f"{LAYER}.mlp.experts.gate_up_proj"
    before = read_raw(source)
    hinted = noncanonical(before, stem)
    e, n, block = (int(i) for i in np.argwhere(hinted)[0])

    def change(values: Array) -> None:
        values[e, 32 * block : 32 * block + 32, n] = bf16(np.linspace(-1, 1, 32) * 1.37)

    edit(tmp_path / "dense", stem, change)
    result = fp4conv.convert(tmp_path / "dense", tmp_path / "back", to="mxfp4")
    assert (result.hints.blocks_stale, result.hints.blocks_used > 0) == (1, True)
    fp4conv.convert(tmp_path / "dense", tmp_path / "plain", to="mxfp4", hints=False)
    ours, plain = read_raw(tmp_path / "back"), read_raw(tmp_path / "plain")
    for part in ("_blocks", "_scales"):
        new, old, without = (array_of(raw[stem + part]) for raw in (ours, before, plain))
        same = (new == old).reshape(*new.shape[:3], -1).all(axis=-1)
        assert np.argwhere(~same).tolist() == [[e, n, block]] or part == "_scales"
        assert np.array_equal(new[e, n, block], without[e, n, block])
    assert_same_tensors(
        {k: v for k, v in ours.items() if not k.startswith(stem + "_")},
        {k: v for k, v in before.items() if not k.startswith(stem + "_")},
    )


def noncanonical(raw: Raw, stem: str) -> npt.NDArray[np.bool_]:
    scales = array_of(raw[f"{stem}_scales"]).astype(np.uint8)
    packed = array_of(raw[f"{stem}_blocks"]).astype(np.uint8).reshape(-1, scales.shape[-1] * 16)
    plane = np.empty((packed.shape[0], scales.shape[-1]), np.uint8)
    hints_reference.noncanonical_mxfp4(packed, scales.reshape(plane.shape), plane)
    found: npt.NDArray[np.bool_] = (plane != 255).reshape(scales.shape)
    return found


def test_a_set_that_changed_is_quantised_anew_whole(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-nvfp4-default")
    fp4conv.convert(source, tmp_path / "dense", to="bf16")
    names = [f"{LAYER}.self_attn.{p}_proj" for p in "qkv"]

    def change(values: Array) -> None:
        values[3, 5] = bf16(0.7713)

    edit(tmp_path / "dense", f"{names[1]}.weight", change)
    result = fp4conv.convert(tmp_path / "dense", tmp_path / "back", to="nvfp4")
    assert (result.hints.sets_stale, result.hints.sets_used) == (1, 7)
    fp4conv.convert(tmp_path / "dense", tmp_path / "plain", to="nvfp4", hints=False, modules="all")
    ours, before, plain = (read_raw(folder) for folder in (tmp_path / "back", source, tmp_path / "plain"))
    anew = {f"{name}.{part}" for name in names for part in ("weight", "weight_scale", "weight_scale_2")}
    assert {name for name in ours if ours[name] != before[name]} <= anew
    for name in anew:
        assert ours[name] == plain[name]


def test_a_dense_tensor_goes_back_only_where_nothing_is_lost(reference: Reference, tmp_path: Path) -> None:
    fp4conv.convert(reference("llama-nvfp4-mlp-only"), tmp_path / "dense", to="f32")
    changed = np.float32(1 + 2**-20)

    def change(values: Array) -> None:
        values[2] = changed

    edit(tmp_path / "dense", "model.norm.weight", change)
    with pytest.raises(ValuesError, match=r"model.norm.weight: the value at \[2\].*BF16.*changed since") as caught:
        fp4conv.convert(tmp_path / "dense", tmp_path / "back", to="nvfp4")
    assert "--no-hints" in str(caught.value)
    fp4conv.convert(tmp_path / "dense", tmp_path / "plain", to="nvfp4", hints=False)
    assert array_of(read_raw(tmp_path / "plain")["model.norm.weight"])[2] == changed


# ---- the folder of hints


def test_no_hints_keeps_none_and_uses_none(reference: Reference, tmp_path: Path) -> None:
    source = reference("llama-nvfp4-mlp-only")
    result = fp4conv.convert(source, tmp_path / "bare", to="bf16", hints=False)
    assert result.hints.kept_bytes == 0
    assert not (tmp_path / "bare" / "fp4conv").exists()
    fp4conv.convert(source, tmp_path / "dense", to="bf16")
    fp4conv.convert(tmp_path / "dense", tmp_path / "a", to="nvfp4", modules="mlp", hints=False)
    fp4conv.convert(tmp_path / "bare", tmp_path / "b", to="nvfp4", modules="mlp")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    fp4conv.convert(tmp_path / "dense", tmp_path / "c", to="bf16", hints=False)
    assert tree(tmp_path / "c") == tree(tmp_path / "bare")


def test_loaders_do_not_see_them(reference: Reference, tmp_path: Path) -> None:
    """Nothing new at the top of the folder, and no index names what lies in fp4conv/."""
    source = reference("gptoss-nvfp4-default")
    for hints in (True, False):
        fp4conv.convert(source, tmp_path / str(hints), to="bf16", max_shard_size=200_000, hints=hints)
    with_hints, without = tree(tmp_path / "True"), tree(tmp_path / "False")
    extra = {name for name in with_hints if name not in without}
    assert extra == {"fp4conv", FACTS, PARTS}
    assert {name: with_hints[name] for name in without} == without
    index = json.loads((tmp_path / "True" / INDEX).read_text())
    assert not any("/" in shard for shard in index["weight_map"].values())


@pytest.mark.parametrize("to", ["bf16", "f32"])
def test_they_come_along_when_a_dense_folder_is_converted(reference: Reference, tmp_path: Path, to: str) -> None:
    source = reference("gptoss-mxfp4-native-like")
    fp4conv.convert(source, tmp_path / "dense", to="bf16")
    result = fp4conv.convert(tmp_path / "dense", tmp_path / "again", to=to, max_shard_size=100_000)
    first, second = tree(tmp_path / "dense"), tree(tmp_path / "again")
    assert {n: d for n, d in first.items() if n.startswith("fp4conv")} == {
        n: d for n, d in second.items() if n.startswith("fp4conv")
    }
    assert result.hints.kept_bytes == sum(p.stat().st_size for p in (tmp_path / "again" / "fp4conv").iterdir())
    fp4conv.convert(tmp_path / "again", tmp_path / "back", to="mxfp4")
    assert_same_tensors(read_raw(tmp_path / "back"), read_raw(source))


@pytest.mark.parametrize("file", [FACTS, PARTS, RECORDS])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_hints_are_refused_by_name(reference: Reference, tmp_path: Path, file: str, damage: str) -> None:
    name = "gptoss-nvfp4-default" if file == PARTS else "gptoss-mxfp4-native-like"
    fp4conv.convert(reference(name), tmp_path / "dense", to="bf16")
    path = tmp_path / "dense" / file
    content = bytearray(path.read_bytes())
    content[-40] ^= 4
    path.unlink() if damage == "missing" else path.write_bytes(content if damage == "flip" else content[:-9])
    if (file, damage) == (FACTS, "missing"):
        result = fp4conv.convert(tmp_path / "dense", tmp_path / "back", to=name.split("-")[1])
        assert any(FACTS in warning for warning in result.warnings)
        return
    with pytest.raises(SourceError, match=file) as caught:
        fp4conv.convert(tmp_path / "dense", tmp_path / "back", to=name.split("-")[1])
    assert "--no-hints" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]
    fp4conv.convert(tmp_path / "dense", tmp_path / "back", to=name.split("-")[1], hints=False)


def test_hints_of_another_version_or_another_model_are_left_alone(reference: Reference, tmp_path: Path) -> None:
    for name in ("llama-nvfp4-default", "qwen3moe-nvfp4-default"):
        fp4conv.convert(reference(name), tmp_path / name, to="bf16")
    theirs, ours = tmp_path / "qwen3moe-nvfp4-default", tmp_path / "llama-nvfp4-default"
    fp4conv.convert(ours, tmp_path / "plain", to="nvfp4", modules="all", hints=False)
    facts = json.loads((ours / FACTS).read_text())
    (ours / FACTS).write_text(json.dumps({**facts, "fp4conv_hints": 2}))
    result = fp4conv.convert(ours, tmp_path / "version", to="nvfp4")
    assert any("version 2" in warning for warning in result.warnings)
    assert tree(tmp_path / "version") == tree(tmp_path / "plain")
    shutil.rmtree(ours / "fp4conv")
    shutil.copytree(theirs / "fp4conv", ours / "fp4conv")
    result = fp4conv.convert(ours, tmp_path / "other", to="nvfp4")
    assert any("of another model and not used" in warning for warning in result.warnings)
    assert tree(tmp_path / "other") == tree(tmp_path / "plain")
    result = fp4conv.convert(theirs, tmp_path / "mxfp4", to="mxfp4")
    assert any("are of nvfp4" in warning for warning in result.warnings)


# ---- bytes, memory, kills


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Both formats with much to note: scales that are not implied, and scales so small that F16 and BF16 collapse."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(3)
    stem = f"{LAYER}.mlp.experts"
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "dtype": "bfloat16"}
    mxfp4: dict[str, Array] = dict(SINKS)
    nvfp4: dict[str, Array] = dict(SINKS)
    for name, n, k in (("gate_up_proj", 768, 512), ("down_proj", 512, 384)):
        codes = rng.integers(0, 256, (3, n, k // 32, 16)).astype(np.uint8)
        codes &= rng.choice(np.array([255, 0xDD, 0x88], np.uint8), (3, n, k // 32, 1))
        mxfp4[f"{stem}.{name}_blocks"] = codes
        mxfp4[f"{stem}.{name}_scales"] = rng.integers(95, 130, (3, n, k // 32)).astype(np.uint8)
        nvfp4[f"{stem}.{name}"] = rng.integers(0, 256, (3, k // 2, n)).astype(np.uint8)
        scales = rng.integers(0, 127, (3, k // 16, n)).astype(np.uint8)
        scales[rng.random(scales.shape) < 0.02] = 0
        nvfp4[f"{stem}.{name}_weight_scale"] = scales.view(e4m3(0).dtype)
        nvfp4[f"{stem}.{name}_weight_scale_2"] = np.array(2.0**-128 * 1.3, np.float32)
    return {
        "mxfp4": write_model(folder / "mxfp4", mxfp4, config),
        "nvfp4": write_model(folder / "nvfp4", nvfp4, config),
    }


@pytest.mark.parametrize(("to", "via"), [("mxfp4", "bf16"), ("mxfp4", "f16"), ("nvfp4", "bf16")])
def test_bytes_do_not_depend_on_workers_or_memory(large: Mapping[str, Path], tmp_path: Path, to: str, via: str) -> None:
    trees = []
    bounds = [(1, 1_000_000_000), (4, BASE_BYTES + 4_200_000), (2, BASE_BYTES + 3_000_000)]
    for number, (workers, memory) in enumerate(bounds):
        dense, back = tmp_path / f"dense{number}", tmp_path / f"back{number}"
        fp4conv.convert(large[to], dense, to=via, workers=workers, max_memory=memory)
        assert (dense / RECORDS).exists()
        assert not (dense / LOG).exists()
        result = fp4conv.convert(dense, back, to=to, workers=workers, max_memory=memory)
        assert (result.hints.blocks_stale, result.hints.sets_stale) == (0, 0)
        trees.append((tree(dense), tree(back), result.sqnr_db))
    assert trees[0] == trees[1] == trees[2]
    assert_same_tensors(read_raw(tmp_path / "back0"), read_raw(large[to]))


class _StopError(Exception):
    pass


def stop_after(pieces: int) -> Callable[[int], None]:
    left = [pieces]

    def count(_: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise _StopError

    return count


@pytest.mark.parametrize("to", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("pieces", [1, 4, 9])
def test_a_run_that_stopped_goes_on(large: Mapping[str, Path], tmp_path: Path, to: str, pieces: int) -> None:
    small = {"workers": 2, "max_memory": BASE_BYTES + 3_000_000}
    fp4conv.convert(large[to], tmp_path / "dense", to="f16" if to == "mxfp4" else "bf16")
    for number, (source, target) in enumerate([(large[to], "dense2"), (tmp_path / "dense", "back")]):
        goal = to if number else ("f16" if to == "mxfp4" else "bf16")
        with pytest.raises(_StopError):
            fp4conv.convert(source, tmp_path / target, to=goal, on_bytes=stop_after(pieces), **small)  # type: ignore[arg-type]
        fp4conv.convert(source, tmp_path / target, to=goal)
    assert tree(tmp_path / "dense") == tree(tmp_path / "dense2")
    assert_same_tensors(read_raw(tmp_path / "back"), read_raw(large[to]))


def test_a_log_that_is_gone_is_made_again(large: Mapping[str, Path], tmp_path: Path) -> None:
    """A kill after the records were sorted, before the folder got its name."""
    fp4conv.convert(large["mxfp4"], tmp_path / "dense", to="bf16")
    with pytest.raises(_StopError):
        fp4conv.convert(large["mxfp4"], tmp_path / "again", to="bf16", on_bytes=stop_after(5), workers=1)
    partial = tmp_path / "again.partial"
    (partial / LOG).unlink()
    (partial / RECORDS).write_bytes(b"half")
    fp4conv.convert(large["mxfp4"], tmp_path / "again", to="bf16")
    assert tree(tmp_path / "dense") == tree(tmp_path / "again")


# ---- what is no valid input


@pytest.mark.parametrize("byte", [0x80, 0xB8, 0xFE, 0x7F, 0xFF])
@pytest.mark.parametrize("to", ["bf16", "f32", "mxfp4"])
def test_a_block_scale_with_a_sign_is_refused(tmp_path: Path, byte: int, to: str) -> None:
    module = f"{LAYER}.mlp.down_proj"
    scales = np.full((4, 4), 0x38, np.uint8)
    scales[2, 1] = byte
    tensors: dict[str, Array] = {
        f"{module}.weight": np.full((4, 32), 0x21, np.uint8),
        f"{module}.weight_scale": scales.view(e4m3(0).dtype),
        f"{module}.weight_scale_2": np.array(1, np.float32),
    }
    source = write_model(tmp_path / "src", tensors)
    with pytest.raises(ValuesError, match=rf"{module}.weight: .*\[2, 16\]"):
        fp4conv.convert(source, tmp_path / "out", to=to)


# ---- adapters


@pytest.mark.parametrize("touched", ["self_attn", "q_proj", ""])
def test_what_no_adapter_touched_comes_back(reference: Reference, tmp_path: Path, touched: str) -> None:
    """Merged before the way back or on it: sets with a merged member are quantised anew, and none stays dense."""
    source, adapter = reference("llama-nvfp4-default"), tmp_path / "adapter"
    theirs = reference("lora-variants/llama-patterns") / "adapter"
    adapter.mkdir()
    raw = {name: array_of(value) for name, value in read_raw(theirs).items() if touched in name}
    write_shard(adapter / "adapter_model.safetensors", raw)
    config = json.loads((theirs / "adapter_config.json").read_text())
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in raw})
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    fp4conv.convert(source, tmp_path / "merged", to="bf16", lora=[adapter])
    first = fp4conv.convert(tmp_path / "merged", tmp_path / "a", to="nvfp4")
    fp4conv.convert(source, tmp_path / "dense", to="bf16")
    second = fp4conv.convert(tmp_path / "dense", tmp_path / "b", to="nvfp4", lora=[adapter])
    before = read_raw(source)
    merged = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in raw}
    parents = {f"{module.rpartition('.')[0]}." for module in merged}
    for result, folder in ((first, "a"), (second, "b")):
        after = read_raw(tmp_path / folder)
        assert {name: value[:2] for name, value in after.items()} == {name: value[:2] for name, value in before.items()}
        changed = {name.rpartition(".")[0] for name in after if after[name] != before[name]}
        assert merged <= changed
        assert all(any(name.startswith(parent) for parent in parents) for name in changed)
        assert (result.hints.sets_used > 0) == bool(touched)
        assert config_of(tmp_path / folder)["quantization_config"]["quant_algo"] == "NVFP4"  # type: ignore[index]
