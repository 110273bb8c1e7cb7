"""The checks of a training run, each with the fault that it is there for; and ModelOpt's CUDA kernels as measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import Array, noise, read_raw, write_model

import fp4conv
from fp4conv.errors import SourceError, ValuesError
from fp4conv.modelopt_state import Quantizer
from fp4conv.qat.backend import QuantizedWeight
from fp4conv.qat.checks import check_exported, check_forward, check_saved, check_shared, decoded
from fp4conv.qat.fake_quant import fake_quantise
from fp4conv.qat.state import write_state
from fp4conv.qat.windows import differing_blocks, rounded

MEASURED = json.loads((Path(__file__).parent / "modelopt_cuda.json").read_text())
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
QUERY, KEY, VALUE, OUT = (f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkvo")


def weight(
    name: str = OUT, format_name: str = "mxfp4", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedWeight:
    master = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    amax = master.abs().amax().float() if format_name == "nvfp4" else None
    values = fake_quantise(master, format_name, amax)
    return QuantizedWeight(name, format_name, -1, False, amax, master, values)


def experts(format_name: str = "nvfp4", *, kn: bool = False) -> QuantizedWeight:
    """Three experts: [E, 2I, H] with a scale each, or gpt-oss's [E, H, 2I] with one."""
    master = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(1))
    amax = master.abs().amax() if kn else master.abs().flatten(1).amax(1)
    values = fake_quantise(master, format_name, amax, -2 if kn else -1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    return QuantizedWeight(name, format_name, -2 if kn else -1, not kn, amax, master, values)


# ---- before training


@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_right_passes_and_is_counted(format_name: str, dtype: torch.dtype) -> None:
    report = check_forward([weight(format_name=format_name, dtype=dtype), experts(), experts(kn=True)])
    assert (report.weights, report.values, report.explained) == (3, 6 * 64 + 2 * 3 * 64 * 32, {})
    assert report.notes == []


@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
def test_one_wrong_value_is_found_and_named(format_name: str) -> None:
    right = weight(format_name=format_name)
    values = right.values.clone()
    values[4, 9] += 1
    with pytest.raises(ValuesError, match=rf"{OUT}: 1 of 384 values[^$]*codec: at \[4, 9\]"):
        check_forward([right, replace(right, values=values)])


def test_a_wrong_expert_is_named_as_the_checkpoint_names_it() -> None:
    right = experts()
    values = right.values.clone()
    values[2, 40, 3] = 77
    with pytest.raises(ValuesError, match=r"experts\.2\.up_proj\.weight: 1 of 1,024 [^$]*at \[8, 3\] 77"):
        check_forward([replace(right, values=values)])
    gpt_oss = experts(kn=True)
    values = gpt_oss.values.clone()
    values[2, 40, 3] = 77
    with pytest.raises(ValuesError, match=r"gate_up_proj: 1 of 6,144 [^$]*at \[2, 40, 3\] 77"):
        check_forward([replace(gpt_oss, values=values)])


@pytest.mark.parametrize(
    "other",
    [
        lambda w: replace(w, amax=w.amax * 1.5),
        lambda w: replace(w, values=w.master),
        lambda w: replace(w, format_name="mxfp4"),
        lambda w: replace(w, values=fake_quantise(w.master.T.contiguous(), "nvfp4", w.amax, -2).T.roll(1, 0)),
    ],
    ids=["another amax", "not quantised", "another format", "another order"],
)
def test_another_quantiser_is_found(other: Callable[[QuantizedWeight], QuantizedWeight]) -> None:
    with pytest.raises(ValuesError, match="of fp4conv's codec"):
        check_forward([other(weight(format_name="nvfp4"))])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_master_that_is_not_finite(bad: float) -> None:
    right = weight()
    right.master[3, 3] = bad
    with pytest.raises(ValuesError, match=rf"{OUT}: has a NaN or an Inf"):
        check_forward([replace(right, values=fake_quantise(right.master, "mxfp4"))])


# ---- ModelOpt's kernels


def unpacked(text: str) -> npt.NDArray[np.float32]:
    return np.array([int(text[i : i + 8], 16) for i in range(0, len(text), 8)], np.uint32).view(np.float32)[None]


@pytest.mark.parametrize("number", range(len(MEASURED["blocks"])))
def test_blocks_measured_on_a_gpu_are_equal_or_explained(number: int) -> None:
    """One block of each kind that ModelOpt's CUDA kernel gave the codec's values, and one that it gave others."""
    block = MEASURED["blocks"][number]
    dtype, format_name, amax = DTYPES[block["dtype"]], block["format"], block["amax"]
    master, theirs = (np.repeat(unpacked(block[name]), 2, axis=0) for name in ("master", "theirs"))
    tensor = torch.from_numpy(master).to(dtype)
    scalar = None if amax is None else torch.tensor(amax)
    found = QuantizedWeight(OUT, format_name, -1, False, scalar, tensor, torch.from_numpy(theirs).to(dtype))
    codec = rounded(decoded(master, format_name, amax)[0], dtype)
    report = check_forward([found])
    assert report.explained == ({} if np.array_equal(codec, theirs) else {OUT: 2}), "it is there twice"
    assert len(report.notes) == len(report.explained)
    # With the largest value's sign turned, nothing explains the block.
    wrong = theirs.copy()
    place = int(np.abs(master[0]).argmax())
    wrong[0, place] = -theirs[0, place] or -master[0, place] or 1
    with pytest.raises(ValuesError, match="of fp4conv's codec"):
        check_forward([replace(found, values=torch.from_numpy(wrong).to(dtype))])


def test_measured_blocks_hold_both_kinds() -> None:
    kinds = {True: 0, False: 0}
    for block in MEASURED["blocks"]:
        codec, _ = decoded(unpacked(block["master"]), block["format"], block["amax"])
        kinds[bool(np.array_equal(rounded(codec, DTYPES[block["dtype"]]), unpacked(block["theirs"])))] += 1
    assert min(kinds.values()) > 15


def test_the_log2_window_of_float32_masters() -> None:
    """An amax one step above 6 x 2^k under the smaller scale: explained for float32 alone, and not far above."""
    six = np.float32(6)
    for steps, dtype, known in ((1, torch.float32, True), (32, torch.float32, True), (33, torch.float32, False),
                                (1, torch.float16, False)):  # fmt: skip
        amax = (six.view(np.uint32) + np.uint32(steps)).view(np.float32)
        master = np.full((1, 32), 1.3, np.float32)
        master[0, 7] = -amax
        expected, _ = decoded(master, "mxfp4", None)
        assert expected[0, 7] == -8 + 2 or expected[0, 7] == -6
        smaller = np.where(np.abs(master) > 6, np.copysign(six, master), np.float32(1.5))
        blocks, explained = differing_blocks("mxfp4", (master, smaller, expected), None, dtype)
        assert blocks.tolist() == [0]
        assert explained.tolist() == [known]


# ---- after calibration


def test_sets_with_one_amax_pass() -> None:
    one = torch.tensor(2.0)
    set_of = [replace(weight(name, "nvfp4"), amax=one) for name in (QUERY, KEY, VALUE)]
    check_shared([*set_of, weight(OUT, "nvfp4"), weight(QUERY.replace("layers.0", "layers.1"), "nvfp4"), weight()])


@pytest.mark.parametrize("names", [(QUERY, KEY), (VALUE, QUERY), ("a.mlp.gate_proj.weight", "a.mlp.up_proj.weight")])
def test_sets_with_two_are_found(names: tuple[str, str]) -> None:
    first, other = (replace(weight(name, "nvfp4"), amax=torch.tensor(2.0 + i)) for i, name in enumerate(names))
    with pytest.raises(ValuesError, match=f"{names[1][:-7]}: its amax is not that of {names[0][:-7]}"):
        check_shared([first, other])


# ---- after saving


def model_arrays(**changes: Array | None) -> dict[str, Array]:
    tensors: dict[str, Array] = {name: noise((64, 64), seed) for seed, name in enumerate((QUERY, KEY, VALUE, OUT))}
    tensors["model.embed_tokens.weight"] = noise((8, 64), 9)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    return tensors


def test_the_same_names_and_shapes_pass(tmp_path: Path) -> None:
    write_model(tmp_path / "a", model_arrays())
    write_model(
        tmp_path / "b",
        {name: value * 2 for name, value in model_arrays().items()},
        shards=[[QUERY, KEY, VALUE], [OUT, "model.embed_tokens.weight"]],
    )
    assert check_saved(tmp_path / "b", tmp_path / "a") == 5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({KEY: None}, f"{KEY}: was not saved, one of 1"),
        ({"model.layers.0.extra.weight": noise((4, 4))}, "extra.weight: was saved, one of 1 tensors that"),
        ({VALUE: noise((64, 32))}, rf"{VALUE}: was saved as \[64, 32\], expected \[64, 64\]"),
    ],
)
def test_other_names_or_shapes_are_found(tmp_path: Path, changes: dict[str, Array | None], match: str) -> None:
    write_model(tmp_path / "a", model_arrays())
    write_model(tmp_path / "b", model_arrays(**changes))
    with pytest.raises(SourceError, match=match):
        check_saved(tmp_path / "b", tmp_path / "a")


def test_a_tied_head_need_not_be_saved(tmp_path: Path) -> None:
    write_model(tmp_path / "a", model_arrays(**{"lm_head.weight": noise((8, 64), 9)}))
    write_model(tmp_path / "untied", model_arrays())
    write_model(tmp_path / "tied", model_arrays(), {"model_type": "test", "tie_word_embeddings": True})
    assert check_saved(tmp_path / "tied", tmp_path / "a") == 6
    with pytest.raises(SourceError, match="lm_head"):
        check_saved(tmp_path / "untied", tmp_path / "a")


# ---- after an export


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, list[QuantizedWeight]]:
    """A checkpoint of a run in NVFP4, whose weights have outgrown their frozen amax, and what its forward pass used."""
    tensors = model_arrays()
    write_model(tmp_path / "trained", tensors)
    amax = {name: torch.tensor(2688 * (2.0**-14 if name == OUT else 2.0**-15)) for name in (QUERY, KEY, VALUE, OUT)}
    quantizers = [Quantizer(f"{name[:-7]}.weight_quantizer", True, "nvfp4") for name in amax]
    arrays = {f"{name[:-7]}.weight_quantizer._amax": np.asarray(value, np.float32) for name, value in amax.items()}
    write_state(tmp_path / "trained", "fp4conv", quantizers, arrays)
    used = []
    for name, own in amax.items():
        master = torch.from_numpy(tensors[name].astype(np.float32)).to(torch.bfloat16)
        values = fake_quantise(master, "nvfp4", own)
        used.append(QuantizedWeight(name, "nvfp4", -1, False, own, master, values))
    return tmp_path / "trained", used


def test_an_export_has_the_values_of_training(tmp_path: Path, trained: tuple[Path, list[QuantizedWeight]]) -> None:
    folder, used = trained
    for layout in ("modelopt", "compressed-tensors"):
        fp4conv.convert(folder, tmp_path / layout, to="nvfp4", layout=layout)
        report = check_exported(used, tmp_path / layout)
        assert (report.weights, report.values, report.explained) == (4, 4 * 64 * 64, {})


def test_one_flipped_code_is_found(tmp_path: Path, trained: tuple[Path, list[QuantizedWeight]]) -> None:
    folder, used = trained
    fp4conv.convert(folder, tmp_path / "out", to="nvfp4")
    file = next((tmp_path / "out").glob("*.safetensors"))
    content = file.read_bytes()
    packed = read_raw(tmp_path / "out")[KEY][2]
    at = content.index(packed) + 37
    file.write_bytes(content[:at] + bytes([content[at] ^ 0x08]) + content[at + 1 :])
    with pytest.raises(ValuesError, match=rf"{KEY}: \d of 4,096 values of the export[^$]*at \[1, 10\]"):
        check_exported(used, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scale_rule": "mse"}, ValuesError, "values of the export are not those of fp4conv"),
        ({"ties": "down"}, ValuesError, "values of the export are not those of fp4conv"),
        ({"exclude": ["*o_proj"]}, SourceError, "o_proj.weight .*: is bf16, expected nvfp4"),
    ],
)
def test_an_export_by_another_rule_is_found(
    tmp_path: Path,
    trained: tuple[Path, list[QuantizedWeight]],
    options: dict[str, object],
    error: type[Exception],
    match: str,
) -> None:
    folder, used = trained
    fp4conv.convert(folder, tmp_path / "out", to="nvfp4", **options)  # type: ignore[arg-type]
    with pytest.raises(error, match=match):
        check_exported(used, tmp_path / "out")


def test_an_export_without_a_weight_is_found(tmp_path: Path, trained: tuple[Path, list[QuantizedWeight]]) -> None:
    folder, used = trained
    fp4conv.convert(folder, tmp_path / "out", to="nvfp4")
    lost = replace(used[0], name="model.layers.7.self_attn.q_proj.weight")
    with pytest.raises(SourceError, match=r"layers\.7\.\S+ .*: is not there, expected nvfp4"):
        check_exported([*used, lost], tmp_path / "out")
