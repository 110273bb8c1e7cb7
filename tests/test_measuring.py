"""Figures of values: against plain NumPy float64, in every format and layout, however cut, and as convert has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import Array, array_of, e4m3, noise, read_raw, unpack, write_model

import fp4conv
from fp4conv.errors import PlanError, SourceError
from fp4conv.layouts import parse
from fp4conv.model import Decoded, Model, Stored, Weight
from fp4conv.pipeline.measuring import Measured, compare, measure
from fp4conv.pipeline.measuring.bands import FLAT_ROW
from fp4conv.report.facts import ErrorFacts, ValueFacts
from fp4conv.sources import open_source

Reference = Callable[[str], Path]
F64 = npt.NDArray[np.float64]
DOWN = "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def model_of(folder: Path) -> Model:
    return parse(open_source(folder))


def measured(
    folder: Path, reference: Path | None = None, estimate: Sequence[str] = (), workers: int = 2, memory: str = "1GB"
) -> Measured:
    from fp4conv.sizes import parse_size

    against = model_of(reference) if reference else None
    return measure(
        model_of(folder), reference=against, estimate=estimate, max_memory=parse_size(memory), workers=workers
    )


def assert_error(error: ErrorFacts, x: Array, y: Array, rounded: float = 1e-9) -> None:
    """The figures of x against y by plain float64 over pairs that are finite on both sides; dB within `rounded`."""
    good = np.isfinite(x.astype(np.float64)) & np.isfinite(y.astype(np.float64))
    a, b = x[good].astype(np.float64), y[good].astype(np.float64)
    apart = np.abs(a - b)
    signal, noise_power = (b * b).sum(), (apart * apart).sum()
    assert (error.values, error.left_out) == (good.sum(), (~good).sum())
    assert error.mse == pytest.approx((apart**2).mean() if a.size else 0.0, rel=rounded)
    assert error.max_abs_error == apart.max(initial=0)
    assert error.max_rel_error == (apart[b != 0] / np.abs(b[b != 0])).max(initial=0)
    if noise_power:
        assert error.sqnr_db == pytest.approx(10 * np.log10(signal / noise_power), abs=rounded)
        assert error.cosine == pytest.approx((a * b).sum() / np.sqrt(signal * (a * a).sum()), abs=1e-12)
        assert error.differ >= (a != b).sum() > 0
    else:
        assert (error.sqnr_db, error.cosine) == (np.inf, 1.0)


def assert_values(facts: ValueFacts, x: Array) -> None:
    finite = x[np.isfinite(x.astype(np.float64))]
    assert facts.nan == x.size - finite.size
    assert facts.zeros == np.count_nonzero(finite == 0)
    if finite.size:
        assert (facts.smallest, facts.largest) == (float(finite.min()), float(finite.max()))
    else:
        assert facts.smallest is facts.largest is None


def assert_blocks(facts: ValueFacts, weight: Weight, folder: Path) -> None:
    """Codes, scales and blocks by counting the stored bytes."""
    base = weight.base
    assert isinstance(base, Decoded)
    raw = open_source(folder)
    packed, scales = (stored(raw.root, part) for part in (base.packed, base.block_scale))
    shape = (weight.matrices, -1, weight.n) if base.kn else (weight.matrices, weight.n, -1)
    packed, scales = packed.reshape(shape), scales.reshape(shape)
    if base.kn:
        packed, scales = packed.swapaxes(1, 2), scales.swapaxes(1, 2)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    assert facts.codes == tuple(np.bincount(codes.reshape(-1), minlength=16))
    largest = np.abs(unpack(packed)).reshape(*scales.shape, -1).max(axis=-1)
    assert facts.blocks == scales.size
    assert facts.zero_blocks == (largest == 0).sum()
    assert facts.saturated == (largest == 6).sum()
    assert facts.unused_range == ((largest > 0) & (largest <= 3)).sum()
    if base.format_name == "mxfp4":
        values = scales.astype(np.float64) - 127
    else:
        values = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scale = stored(raw.root, base.tensor_scale).view(np.float32)[0] if base.tensor_scale else 0
        assert facts.tensor_scale == pytest.approx(1 / scale if base.inverse else scale)
    assert dict(facts.scales) == dict(zip(*(e.tolist() for e in np.unique(values, return_counts=True)), strict=True))


def stored(root: Path, ref: object) -> npt.NDArray[np.uint8]:
    from fp4conv.safetensors_io import TensorRef

    assert isinstance(ref, TensorRef)
    content = (root / ref.file).read_bytes()[ref.offset : ref.offset + ref.spec.nbytes]
    return np.frombuffer(content, np.uint8)


PAIRS = [
    ("gptoss-mxfp4", "gptoss-bf16"),
    ("gptoss-bf16", "gptoss-mxfp4"),
    ("gptoss-mxfp4-native-like", "gptoss-bf16-from-mxfp4"),
    ("gptoss-nvfp4-default", "gptoss-bf16"),
    ("gptoss-nvfp4-cast-from-mxfp4", "gptoss-mxfp4-native-like"),
    ("gptoss-nvfp4-weight-only", "gptoss-nvfp4-default"),
    ("gptoss-qat-fakequant-mxfp4", "gptoss-bf16"),
    ("llama-nvfp4-default", "llama-bf16"),
    ("llama-nvfp4-from-qat-default", "llama-qat-fakequant-nvfp4-default"),
    ("qwen3moe-nvfp4-default", "qwen3moe-bf16"),
]


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_figures_are_those_of_plain_float64(reference: Reference, name: str, other: str) -> None:
    """Every tensor, read by `open`, whose values the tests of `open` compare with ml_dtypes."""
    found = measured(reference(name), reference(other))
    model = model_of(reference(name))
    assert (found.only_here, found.only_there, found.apart, found.unread) == ((), (), (), ())
    assert set(found.tensors) == {weight.name for weight in model.weights}
    with fp4conv.open(reference(name)) as ours, fp4conv.open(reference(other)) as theirs:
        for weight in model.weights:
            x, y, facts = ours.read(weight.name), theirs.read(weight.name), found.tensors[weight.name]
            assert facts.error is not None
            assert_error(facts.error, x, y)
            assert_values(facts.values, x)
            if isinstance(weight.base, Decoded):
                assert_blocks(facts.values, weight, reference(name))


def test_layouts_of_the_same_values_do_not_differ(reference: Reference, tmp_path: Path) -> None:
    source = reference("gptoss-mxfp4-native-like")
    for to, layout in (("mxfp4", "openai-original"), ("bf16", "hf"), ("nvfp4", "modelopt")):
        done = fp4conv.convert(source, tmp_path / to, to=to, layout=layout)
        for other in (source, tmp_path / to):
            found = compare(model_of(tmp_path / to), model_of(other), max_memory=10**9, workers=2)
            assert found.complete
            assert found.same == (other != source or not done.lossy_blocks)
    assert done.lossy_blocks  # only the last of them could lose something, and did
    for layout in ("modelopt", "compressed-tensors"):
        fp4conv.convert(reference("llama-nvfp4-default"), tmp_path / layout, to="nvfp4", layout=layout)
    a, b = (model_of(tmp_path / layout) for layout in ("modelopt", "compressed-tensors"))
    found = compare(a, b, max_memory=10**9, workers=2)
    assert found.complete
    assert min(each.error.sqnr_db for each in found.tensors) > 140  # reciprocals are rounded
    assert_error(
        next(each.error for each in found.tensors if each.name == f"{DOWN}.weight"),
        fp4conv.open(tmp_path / "modelopt").read(f"{DOWN}.weight"),
        fp4conv.open(tmp_path / "compressed-tensors").read(f"{DOWN}.weight"),
    )


@pytest.mark.parametrize(("name", "other"), [PAIRS[0], PAIRS[3], PAIRS[7]])
def test_figures_do_not_depend_on_workers_or_memory(
    reference: Reference, name: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4conv.pipeline.measuring import bands

    whole = measured(reference(name), reference(other), workers=1).tensors
    for workers, memory, nbytes in ((3, "400MB", 30_000), (2, "320MB", 1)):
        monkeypatch.setattr(bands, "BAND_BYTES", nbytes)
        monkeypatch.setattr(bands, "BAND_COLUMNS", 1)
        assert measured(reference(name), reference(other), workers=workers, memory=memory).tensors == whole


def test_estimates_do_not_depend_on_workers_or_memory(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4conv.pipeline.measuring import bands

    for name in ("llama-bf16", "gptoss-bf16"):
        whole = measured(reference(name), estimate=("mxfp4", "nvfp4"), workers=1).tensors
        monkeypatch.setattr(bands, "BAND_BYTES", 100_000)
        monkeypatch.setattr(bands, "BAND_COLUMNS", 1)
        assert measured(reference(name), estimate=("mxfp4", "nvfp4"), workers=3).tensors == whole
        monkeypatch.undo()


RULES = {"mxfp4": ("floor", "rceil", "even", "mse"), "nvfp4": ("amax", "four-over-six", "mse")}


@pytest.mark.parametrize("name", ["llama-bf16", "gptoss-bf16", "llama-qat-fakequant-nvfp4-default"])
@pytest.mark.parametrize("to", ["mxfp4", "nvfp4"])
def test_estimates_are_what_convert_then_reports(reference: Reference, tmp_path: Path, name: str, to: str) -> None:
    found = fp4conv.inspect(reference(name), estimate=[to])
    estimated = {(facts.name, each.rule): each.error for facts in found.tensors for each in facts.estimates}
    for rule in RULES[to]:
        done = fp4conv.convert(reference(name), tmp_path / rule, to=to, scale_rule=rule)
        assert done.per_tensor == {key: e.sqnr_db for (key, of), e in estimated.items() if of == rule}
        total = next(each.error for each in found.estimates if each.rule == rule)
        assert total.sqnr_db == pytest.approx(done.sqnr_db, abs=1e-9)
        tensor = next(iter(done.per_tensor))
        x, y = fp4conv.open(tmp_path / rule).read(tensor), fp4conv.open(reference(name)).read(tensor)
        assert_error(estimated[tensor, rule], x, y, rounded=1e-6)  # convert multiplies the scales in float64


def test_a_part_of_a_set_is_estimated_under_the_scale_of_the_whole(reference: Reference) -> None:
    whole = fp4conv.inspect(reference("llama-bf16"), estimate=["nvfp4"])
    part = fp4conv.inspect(reference("llama-bf16"), estimate=["nvfp4"], tensor="*.0.*k_proj.weight")
    assert part.tensors == tuple(facts for facts in whole.tensors if facts.name == part.tensors[0].name)


# ---- what is damaged or odd is counted and told, never skipped


def test_nan_and_inf_are_counted_and_left_out(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    values[3, 5], values[7, 9], values[9, 1] = np.nan, np.inf, 0.0
    clean = np.where(np.isfinite(values), values, 1).astype(np.float32) * np.float32(1.01)
    tensors: dict[str, Array] = {f"{DOWN}.weight": values, "vector": values[3], "nothing": np.full((3,), np.nan, "f4")}
    others: dict[str, Array] = {f"{DOWN}.weight": clean, "vector": clean[3], "nothing": np.ones(3, np.float32)}
    source, other = write_model(tmp_path / "a", tensors), write_model(tmp_path / "b", others)
    found = measured(source, other, estimate=("mxfp4", "nvfp4"))
    for name, value in tensors.items():
        own = found.tensors[name]
        assert own.error is not None
        assert_error(own.error, value, others[name])
        assert_values(own.values, value)
    assert found.tensors[f"{DOWN}.weight"].unquantisable
    shown = fp4conv.inspect(source, reference=other, estimate=["nvfp4"])
    assert any("NaN or Inf" in warning and DOWN in warning for warning in shown.warnings)
    assert any("no estimate" in warning for warning in shown.warnings)


def test_scales_of_every_kind(tmp_path: Path) -> None:
    """NaN, zero, negative and overflowing block scales: counted, by the bytes that were planted."""
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (4, 64, 16), dtype=np.uint8)
    scales = rng.integers(100, 140, (4, 64), dtype=np.uint8)
    scales[0, 0], scales[1, 3], scales[2, :2] = 255, 254, 0
    packed[3, 5] = 0x80
    mx: dict[str, Array] = {f"{DOWN}.weight_packed": packed.reshape(4, -1), f"{DOWN}.weight_scale": scales}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}}
    found = measured(write_model(tmp_path / "mx", mx, config)).tensors[f"{DOWN}.weight"].values
    with np.errstate(over="ignore"):
        factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        values = unpack(packed).reshape(4, 64, 32) * factors[..., None]
    assert_values(found, values)
    assert (found.nan_scales, found.zero_blocks, found.dead_blocks) == (1, 1, 0)
    nv_scales = e4m3(np.ones((4, 128)))
    raw = nv_scales.view(np.uint8)
    raw[0, 0], raw[1, 1], raw[2, 2], raw[3, 3] = 0x7F, 0x00, 0xB8, 0x80
    nv: dict[str, Array] = {
        f"{DOWN}.weight": packed.reshape(4, -1),
        f"{DOWN}.weight_scale": nv_scales,
        f"{DOWN}.weight_scale_2": np.full((), 0.5, np.float32),
    }
    found = measured(write_model(tmp_path / "nv", nv)).tensors[f"{DOWN}.weight"].values
    values = unpack(packed).reshape(4, 128, 16) * (nv_scales.astype(np.float32) * np.float32(0.5))[..., None]
    assert_values(found, values)
    assert (found.nan_scales, found.negative_scales) == (1, 2)
    assert found.dead_blocks == 1
    assert dict(found.scales)[0.0] == 2


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_tensor_scale_that_is_no_scale_is_no_reason_to_stop(tmp_path: Path, scale: float) -> None:
    tensors: dict[str, Array] = {
        f"{DOWN}.weight": np.full((4, 16), 0x21, np.uint8),
        f"{DOWN}.weight_scale": e4m3(np.ones((4, 2))),
        f"{DOWN}.weight_scale_2": np.full((), scale, np.float32),
    }
    source = write_model(tmp_path / "src", tensors)
    found = measured(source, source).tensors[f"{DOWN}.weight"]
    with np.errstate(all="ignore"):
        assert_values(found.values, unpack(tensors[f"{DOWN}.weight"]) * np.float32(scale))
    assert found.error is not None
    assert not found.error.differ
    fp4conv.inspect(source).to_json()


def test_tensors_of_every_type_and_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tensors: dict[str, Array] = {
        "scalar": np.full((), 3.5, np.float32),
        "empty": np.empty((0, 4), np.float32),
        "long": rng.standard_normal(3 * FLAT_ROW + 17).astype(np.float32),
        "f16": rng.standard_normal((5, 7)).astype(np.float16),
        "f64": rng.standard_normal((3, 5000)),
        "i64": rng.integers(-(2**62), 2**62, (4, 3)),
        "bool": rng.random((9,)) < 0.5,
        "u8": rng.integers(0, 256, (31,), dtype=np.uint8),
        "conv.weight": noise((4, 1, 2, 3)),
        "matrix.weight": noise((5, 7)),
    }
    others = {name: value.copy() for name, value in tensors.items()}
    others["i64"][1, 1] += 1  # one in 2^62, which float64 cannot tell
    others["f64"][2, 4999] *= 2
    others["long"][-1] = 9
    others["f16"] = others["f16"].astype(np.float32) * np.float32(1.1)
    source, other = write_model(tmp_path / "a", tensors), write_model(tmp_path / "b", others)
    found = measured(source, other)
    for name, value in tensors.items():
        own = found.tensors[name]
        assert_values(own.values, value)
        assert own.error is not None
        expected = {"i64": 1, "f64": 1, "long": 1, "f16": np.count_nonzero(tensors["f16"])}
        assert own.error.differ == expected.get(name, 0), name
        if name != "i64":
            assert_error(own.error, value, others[name])
    assert not compare(model_of(source), model_of(other), max_memory=10**9, workers=1).same
    assert compare(model_of(source), model_of(source), max_memory=10**9, workers=1).same


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a", {"a": noise((4, 4)), "b": noise((4,)), "c": noise((2, 2))})
    other = write_model(tmp_path / "b", {"b": noise((5,)), "c": noise((2, 2)), "d": noise((1,))})
    found = fp4conv.inspect(source, reference=other)
    assert (found.only_in_source, found.only_in_reference) == (("a",), ("d",))
    assert found.shapes_apart == (("b", "[4]", "[5]"),)
    for words in ("not in the reference", "(a)", "in the reference alone (d)", "b: [4], there [5]"):
        assert any(words in warning for warning in found.warnings), words
    assert [facts.error is not None for facts in found.tensors] == [False, False, True]
    assert not compare(model_of(source), model_of(other), max_memory=10**9, workers=1).complete


def test_a_square_parameter_is_the_same_whichever_way_it_is_taken(tmp_path: Path) -> None:
    weight = noise((2, 64, 64), seed=3)
    source = write_model(tmp_path / "a", {EXPERTS: weight, "model.layers.0.self_attn.sinks": noise((4,))})
    found = measured(source, source)
    assert found.tensors[EXPERTS].error is not None
    assert not found.tensors[EXPERTS].error.differ  # type: ignore[union-attr]
    assert isinstance(model_of(source).weights[0].base, Stored)


def test_bytes_add_up(reference: Reference) -> None:
    for name, other, estimate in (("gptoss-mxfp4", "gptoss-bf16", None), ("llama-bf16", None, ["nvfp4"])):
        totals: list[int] = []
        done: list[int] = []
        fp4conv.inspect(
            reference(name),
            reference=reference(other) if other else None,
            estimate=estimate,
            on_total=totals.append,
            on_bytes=done.append,
        )
        assert len(totals) == 1
        assert sum(done) == pytest.approx(totals[0], rel=1e-3)


def test_figures_of_whole_raw_files(reference: Reference) -> None:
    """One tensor from the bytes on disk, with nothing of fp4conv in between."""
    found = measured(reference("llama-nvfp4-default"), reference("llama-bf16")).tensors[f"{DOWN}.weight"]
    raw, plain = read_raw(reference("llama-nvfp4-default")), read_raw(reference("llama-bf16"))
    codes = unpack(array_of(raw[f"{DOWN}.weight"]))
    factor = array_of(raw[f"{DOWN}.weight_scale"]).astype(np.float32)
    factor = factor * array_of(raw[f"{DOWN}.weight_scale_2"]).astype(np.float32)
    values = codes * np.repeat(factor, 16, axis=1)
    assert found.error is not None
    assert_error(found.error, values, array_of(plain[f"{DOWN}.weight"]))


WHOLE_PAIRS = [
    ("gptoss-original/original", "gptoss-mxfp4"),
    ("gptoss-qat-fakequant-mxfp4-f32", "gptoss-bf16"),
    ("gptoss-nvfp4-default-kvfp8", "gptoss-bf16"),
    ("gptoss-mxfp4-from-f32", "gptoss-qat-fakequant-mxfp4-f32"),
    ("llama-mxfp4-attempt-default", "llama-bf16"),
    ("llama-nvfp4-weight-only", "llama-bf16"),
    ("qwen3moe-nvfp4-from-qat-default", "qwen3moe-qat-fakequant-nvfp4-default"),
]


@pytest.mark.parametrize(("name", "other"), WHOLE_PAIRS)
def test_figures_of_the_other_references(full_reference: Reference, name: str, other: str) -> None:
    test_figures_are_those_of_plain_float64(full_reference, name, other)


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_figures_in_layouts_of_our_own_making(reference: Reference, tmp_path: Path, layout: str) -> None:
    formats = ("mxfp4", "nvfp4") if layout == "compressed-tensors" else ("nvfp4",)
    for to in formats:
        fp4conv.convert(reference("llama-bf16"), tmp_path / to, to=to, layout=layout)
        test_figures_are_those_of_plain_float64(lambda name: tmp_path / name, to, str(reference("llama-bf16")))
    dense = fp4conv.convert(reference("llama-bf16"), tmp_path / "f16", to="f16")
    assert dense.format == "f16"
    test_figures_are_those_of_plain_float64(lambda name: tmp_path / name, "f16", "nvfp4")


def test_fp8_is_decoded_first(tmp_path: Path) -> None:
    """A scale a tile of 3 x 5, so that bands of rows begin inside of tiles; with NaN codes."""
    rng = np.random.default_rng(5)
    codes = e4m3(rng.standard_normal((64, 64)) * 50)
    codes.view(np.uint8)[7, 9] = 0x7F
    scales = np.exp(rng.standard_normal((22, 13))).astype(np.float32)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [3, 5]}}
    source = write_model(
        tmp_path / "fp8", {f"{DOWN}.weight": codes, f"{DOWN}.weight_scale_inv": scales, "norm": noise((64,))}, config
    )
    tiles = np.repeat(np.repeat(scales, 3, axis=0)[:64], 5, axis=1)[:, :64]
    values = codes.astype(np.float32) * tiles
    plain = noise((64, 64), seed=6)
    other = write_model(tmp_path / "bf16", {f"{DOWN}.weight": plain, "norm": noise((64,))})
    found = measured(source, other).tensors[f"{DOWN}.weight"]
    assert found.error is not None
    assert_error(found.error, values, plain)
    assert_values(found.values, values)
    turned_about = measured(other, source).tensors[f"{DOWN}.weight"]
    assert turned_about.error is not None
    assert_error(turned_about.error, plain, values)


def test_memory_too_small_for_a_row_is_said_before_anything_is_read(tmp_path: Path) -> None:
    wide = write_model(tmp_path / "wide", {f"{DOWN}.weight": noise((2, 2_000_000))})
    with pytest.raises(PlanError, match=r"one row needs .* bytes"):
        measured(wide, estimate=("mxfp4",), workers=1, memory="302MB")


def test_an_error_in_a_worker_stops_them_all(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": noise((64, 4096)), "b": noise((1_000_000,))})
    model = model_of(source)
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(300_000)
    with pytest.raises(SourceError, match="changed while it was read"):
        measure(model, max_memory=10**9, workers=3)
