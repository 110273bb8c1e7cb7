"""NVFP4 sets that servers fuse and whose stored tensor scales differ: refused, or requantised with --repair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import Array, Raw, Values, array_of, config_of, decode_nvfp4, read_raw, tree, write_model
from click.testing import CliRunner

import fp4conv
from fp4conv.cli import main
from fp4conv.errors import PlanError
from fp4conv.kernels import reference as oracle

Reference = Callable[[str], Path]
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.1.mlp"


@pytest.fixture
def apart(reference: Reference, tmp_path: Path) -> Path:
    """llama-nvfp4-default with k_proj of layer 0 and gate_proj of layer 1 calibrated for themselves."""
    source = reference("llama-nvfp4-default")
    tensors = {name: array_of(value) for name, value in read_raw(source).items()}
    for module, factor in ((f"{ATTENTION}.k_proj", 0.7), (f"{MLP}.gate_proj", 0.9)):
        tensors[f"{module}.weight_scale_2"] = scaled(tensors[f"{module}.weight_scale_2"], factor)
    return write_model(tmp_path / "apart", tensors, config_of(source))


def scaled(scalar: Array, factor: float) -> Values:
    """An F32 scalar times another."""
    return np.asarray(scalar.astype(np.float32) * np.float32(factor), np.float32)


def values(raw: Raw, module: str) -> npt.NDArray[np.float64]:
    parts = [array_of(raw[f"{module}.{suffix}"]) for suffix in ("weight", "weight_scale", "weight_scale_2")]
    return decode_nvfp4(*parts)


def test_refused_with_the_set_and_the_way_out(apart: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for layout in ("modelopt", "compressed-tensors"):
        with pytest.raises(PlanError) as caught:
            fp4conv.convert(apart, tmp_path / "out", to="nvfp4", layout=layout)
        for words in (f"{ATTENTION}.{{q_proj,k_proj,v_proj}}", "k_proj 0.", "2 such sets", "--repair"):
            assert words in str(caught.value)
    assert tree(tmp_path) == before


def test_repaired_to_the_largest_scale_of_the_set(apart: Path, tmp_path: Path) -> None:
    result = fp4conv.convert(apart, tmp_path / "out", to="nvfp4", repair=True)
    before, after = read_raw(apart), read_raw(tmp_path / "out")
    mended = (f"{ATTENTION}.k_proj", f"{MLP}.gate_proj")
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {f"{m}.{suffix}" for m in mended for suffix in ("weight", "weight_scale", "weight_scale_2")}
    assert after[f"{ATTENTION}.k_proj.weight_scale_2"] == before[f"{ATTENTION}.q_proj.weight_scale_2"]
    assert after[f"{MLP}.gate_proj.weight_scale_2"] == before[f"{MLP}.up_proj.weight_scale_2"]
    assert result.per_tensor.keys() == {f"{module}.weight" for module in mended}
    signal = lost = 0.0
    for module in mended:
        exact, now = values(before, module), values(after, module)
        signal, lost = signal + float((exact**2).sum()), lost + float(((exact - now) ** 2).sum())
    assert result.sqnr_db == pytest.approx(10 * np.log10(signal / lost), rel=1e-5)
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25
    assert any("2 weights of 2 sets" in warning for warning in result.warnings)
    fp4conv.convert(tmp_path / "out", tmp_path / "again", to="nvfp4")  # nothing differs any more
    assert read_raw(tmp_path / "again") == after


@pytest.mark.parametrize("rule", ["amax", "mse"])
def test_the_rule_is_that_of_any_encoding(apart: Path, tmp_path: Path, rule: str) -> None:
    """Decoded by its own scale to F32, encoded by the shared one: by the oracle, the same bytes."""
    from fp4conv.formats import ScaleRule, Ties

    result = fp4conv.convert(apart, tmp_path / "out", to="nvfp4", repair=True, scale_rule=rule)
    assert len(result.warnings) == 1
    raw, module = read_raw(apart), f"{ATTENTION}.k_proj"
    packed, scales = (array_of(raw[f"{module}.{s}"]).view(np.uint8) for s in ("weight", "weight_scale"))
    exact = np.empty((packed.shape[0], packed.shape[1] * 2), np.float32)
    own, shared = (float(array_of(raw[f"{ATTENTION}.{m}.weight_scale_2"]).reshape(())) for m in ("k_proj", "q_proj"))
    assert oracle.decode_nvfp4(packed, scales, False, own, exact) == -1
    codes, block_scales = np.empty_like(packed), np.empty_like(scales)
    sums = np.empty(len(packed)), np.empty(len(packed))
    oracle.encode_nvfp4(exact, False, shared, ScaleRule(rule), Ties.EVEN, codes, block_scales, *sums)
    after = read_raw(tmp_path / "out")
    assert after[f"{module}.weight"][2] == codes.tobytes()
    assert after[f"{module}.weight_scale"][2] == block_scales.tobytes()


def test_repaired_in_and_out_of_compressed_tensors(apart: Path, reference: Reference, tmp_path: Path) -> None:
    """The global scale is a reciprocal, so the largest tensor scale is the smallest of those."""
    healthy = reference("llama-nvfp4-default")
    fp4conv.convert(healthy, tmp_path / "ct", to="nvfp4", layout="compressed-tensors")
    tensors = {name: array_of(value) for name, value in read_raw(tmp_path / "ct").items()}
    name = f"{ATTENTION}.v_proj.weight_global_scale"
    tensors[name] = scaled(tensors[name], 1.5)
    source = write_model(tmp_path / "src", tensors, config_of(tmp_path / "ct"))
    with pytest.raises(PlanError, match="--repair"):
        fp4conv.convert(source, tmp_path / "out", to="nvfp4")
    for layout, suffix in (("compressed-tensors", "weight_global_scale"), ("modelopt", "weight_scale_2")):
        fp4conv.convert(source, tmp_path / layout, to="nvfp4", layout=layout, repair=True)
        after = read_raw(tmp_path / layout)
        stored = {after[f"{ATTENTION}.{part}_proj.{suffix}"] for part in "qkv"}
        assert len(stored) == 1
    before = read_raw(tmp_path / "ct")
    assert read_raw(tmp_path / "compressed-tensors")[name] == before[f"{ATTENTION}.q_proj.weight_global_scale"]


def test_other_targets_have_no_need_of_it(apart: Path, tmp_path: Path) -> None:
    for to in ("bf16", "mxfp4"):
        fp4conv.convert(apart, tmp_path / to, to=to)


def test_a_healthy_source_is_left_alone(reference: Reference, tmp_path: Path) -> None:
    source = reference("qwen3moe-nvfp4-default")
    result = fp4conv.convert(source, tmp_path / "out", to="nvfp4", repair=True)
    assert read_raw(tmp_path / "out") == read_raw(source)
    assert result.warnings == ()


def test_blocks_of_32(reference: Reference, tmp_path: Path) -> None:
    """Members that have the set's scale keep their codes; the other is encoded anew in blocks of 16."""
    healthy = reference("llama-nvfp4-weight-only")
    tensors = {name: array_of(value) for name, value in read_raw(healthy).items()}
    module = next(name for name in tensors if name.endswith("gate_proj.weight_scale_2")).removesuffix(".weight_scale_2")
    tensors[f"{module}.weight_scale_2"] = scaled(tensors[f"{module}.weight_scale_2"], 0.5)
    source = write_model(tmp_path / "src", tensors, config_of(healthy))
    fp4conv.convert(source, tmp_path / "out", to="nvfp4", repair=True)
    fp4conv.convert(healthy, tmp_path / "healthy", to="nvfp4")
    after, other = read_raw(tmp_path / "out"), read_raw(tmp_path / "healthy")
    assert {name for name in other if after[name] != other[name]} <= {f"{module}.weight", f"{module}.weight_scale"}
    exact, now = values(read_raw(source), module), values(after, module)
    assert np.linalg.norm(exact - now) < 0.05 * np.linalg.norm(exact)


def test_workers_and_memory_change_no_byte(apart: Path, tmp_path: Path) -> None:
    for number, (workers, memory) in enumerate([(1, "1GB"), (4, "320MB")]):
        fp4conv.convert(apart, tmp_path / str(number), to="nvfp4", repair=True, workers=workers, max_memory=memory)
    assert read_raw(tmp_path / "0") == read_raw(tmp_path / "1")


def test_on_the_command_line(apart: Path, tmp_path: Path) -> None:
    command = ["convert", str(apart), str(tmp_path / "out"), "--to", "nvfp4"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "--repair" in result.stderr
    result = CliRunner().invoke(main, [*command, "--repair"])
    assert result.exit_code == 0, result.stderr
    assert "requantised" in result.stderr
