"""`open` and `inspect`: every tensor decoded as other people decode it, and the facts that headers tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    Array,
    array_of,
    bf16,
    decode_experts_mxfp4,
    decode_experts_nvfp4,
    decode_mxfp4,
    decode_nvfp4,
    e4m3,
    noise,
    read_raw,
    write_model,
)
from click.testing import CliRunner

import fp4conv
from fp4conv.cli import main
from fp4conv.errors import OutputError, SourceError, UsageError, ValuesError

Reference = Callable[[str], Path]
DOWN = "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
CUTS: list[slice | range] = [
    slice(None),
    slice(0, 2),
    slice(1, 3),
    slice(-2, None),
    slice(2, 1),
    slice(1, 999),
    range(1, 3),
]


def assert_rows(checkpoint: fp4conv.Checkpoint, name: str, whole: Array) -> None:
    """`read` gives `whole`, and of it every cut."""
    got = checkpoint.read(name)
    assert got.shape == whole.shape
    assert np.array_equal(got.astype(np.float64), whole.astype(np.float64)), name
    for rows in CUTS:
        part = checkpoint.read(name, rows=rows)
        cut = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        assert np.array_equal(part.astype(np.float64), whole[cut].astype(np.float64)), (name, rows)
        assert part.dtype == got.dtype


# ---- open


def test_dense_tensors_keep_their_type(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors: dict[str, Array] = {
        "bf16": noise((5, 7)),
        "f16": rng.standard_normal((5, 7)).astype(np.float16),
        "f32": rng.standard_normal((5, 7)).astype(np.float32),
        "vector": noise((9,)),
        "ids": np.arange(12).reshape(4, 3),
        "bytes": np.arange(8, dtype=np.uint8).reshape(4, 2),
        "five axes": noise((4, 1, 2, 3, 2)),
    }
    with fp4conv.open(write_model(tmp_path / "src", tensors)) as checkpoint:
        assert set(checkpoint.names) == set(tensors)
        for name, value in tensors.items():
            assert_rows(checkpoint, name, value)
            assert checkpoint.read(name).dtype == value.dtype
    assert fp4conv.open(tmp_path / "src").read("bf16").dtype == ml_dtypes.bfloat16


def test_gpt_oss_in_each_format(reference: Reference) -> None:
    stems = [f"model.layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    for name, decode in (
        ("gptoss-mxfp4-native-like", decode_experts_mxfp4),
        ("gptoss-nvfp4-default", decode_experts_nvfp4),
        ("gptoss-nvfp4-weight-only", decode_experts_nvfp4),
    ):
        raw = read_raw(reference(name))
        with fp4conv.open(reference(name)) as checkpoint:
            assert set(stems) <= set(checkpoint.names)
            for stem in stems:
                # The product with the tensor scale is rounded to F32, as every reader of these files does.
                whole = checkpoint.read(stem)
                assert whole.dtype == np.float32
                assert np.allclose(whole, decode(raw, stem), rtol=2**-22, atol=2.0**-149)
                assert_rows(checkpoint, stem, whole)


def test_linear_layers_in_each_format(reference: Reference, tmp_path: Path) -> None:
    fp4conv.convert(reference("llama-bf16"), tmp_path / "mxfp4", to="mxfp4")
    raw = read_raw(tmp_path / "mxfp4")
    with fp4conv.open(tmp_path / "mxfp4") as checkpoint:
        for name in (f"{DOWN}.weight", "model.layers.1.self_attn.k_proj.weight"):
            stem = name.removesuffix(".weight")
            parts = array_of(raw[f"{stem}.weight_packed"]), array_of(raw[f"{stem}.weight_scale"])
            assert_rows(checkpoint, name, decode_mxfp4(*parts))
    for reference_name in ("llama-nvfp4-default", "llama-nvfp4-weight-only"):
        raw = read_raw(reference(reference_name))
        with fp4conv.open(reference(reference_name)) as checkpoint:
            whole = checkpoint.read(f"{DOWN}.weight")
            suffixes = ("weight", "weight_scale", "weight_scale_2")
            exact = decode_nvfp4(*(array_of(raw[f"{DOWN}.{suffix}"]) for suffix in suffixes))
            assert np.allclose(whole, exact, rtol=2**-22, atol=2.0**-149)
            assert_rows(checkpoint, f"{DOWN}.weight", whole)


def test_the_names_are_those_of_the_bf16_checkpoint(reference: Reference, tmp_path: Path) -> None:
    names = set(read_raw(reference("gptoss-bf16")))
    for name in ("gptoss-bf16", "gptoss-mxfp4", "gptoss-nvfp4-mlp-only", "gptoss-nvfp4-weight-only"):
        assert set(fp4conv.open(reference(name)).names) == names
    fp4conv.convert(reference("llama-bf16"), tmp_path / "mx", to="mxfp4")
    assert set(fp4conv.open(tmp_path / "mx").names) == set(read_raw(reference("llama-bf16")))


def test_stored_parts_are_given_as_they_lie(reference: Reference) -> None:
    raw = read_raw(reference("gptoss-mxfp4"))
    with fp4conv.open(reference("gptoss-mxfp4")) as checkpoint:
        for suffix in ("_blocks", "_scales"):
            name = f"{EXPERTS}{suffix}"
            assert checkpoint.read(name).tobytes() == raw[name][2]
            assert_rows(checkpoint, name, array_of(raw[name]))
    raw = read_raw(reference("llama-nvfp4-default"))
    with fp4conv.open(reference("llama-nvfp4-default")) as checkpoint:
        assert checkpoint.read(f"{DOWN}.weight_scale").dtype == ml_dtypes.float8_e4m3fn
        assert checkpoint.read(f"{DOWN}.weight_scale_2").shape == ()
        assert checkpoint.read(f"{DOWN}.input_scale").tobytes() == raw[f"{DOWN}.input_scale"][2]


def test_errors_of_open(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", {"a": noise((4, 4)), "scalar": np.ones((), np.float32)})
    with fp4conv.open(source) as checkpoint:
        with pytest.raises(SourceError, match="no tensor 'b'"):
            checkpoint.read("b")
        with pytest.raises(SourceError, match="no rows"):
            checkpoint.read("scalar", rows=slice(0, 1))
        for rows in (slice(0, 4, 2), slice(None, None, -1), range(3, 0, -1)):
            with pytest.raises(SourceError, match="steps of 1"):
                checkpoint.read("a", rows=rows)
        assert checkpoint.read("scalar") == 1
    with pytest.raises(SourceError, match="no such folder"):
        fp4conv.open(tmp_path / "nowhere")


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_tensor_scale_that_is_no_scale(tmp_path: Path, scale: float) -> None:
    tensors: dict[str, Array] = {
        f"{DOWN}.weight": np.full((4, 16), 0x21, np.uint8),
        f"{DOWN}.weight_scale": e4m3(np.ones((4, 2))),
        f"{DOWN}.weight_scale_2": np.full((), scale, np.float32),
    }
    with (
        fp4conv.open(write_model(tmp_path / "src", tensors)) as checkpoint,
        pytest.raises(ValuesError, match=r"weight_scale_2.*tensor scale"),
    ):
        checkpoint.read(f"{DOWN}.weight")


def test_nan_scales_are_named_with_their_place(tmp_path: Path) -> None:
    scales = np.full((3, 8, 2), 127, np.uint8)
    scales[2, 5, 1] = 255
    tensors: dict[str, Array] = {
        f"{EXPERTS}_blocks": np.full((3, 8, 2, 16), 0x11, np.uint8),
        f"{EXPERTS}_scales": scales,
        "model.layers.0.self_attn.sinks": noise((4,)),
    }
    with fp4conv.open(write_model(tmp_path / "src", tensors)) as checkpoint:
        for rows in (None, slice(1, 3)):
            with pytest.raises(ValuesError, match=r"experts\.down_proj.*\[2, 32, 5\]"):
                checkpoint.read(EXPERTS, rows=rows)
        assert np.all(checkpoint.read(EXPERTS, rows=slice(0, 2)) == 0.5)


# ---- inspect


def test_facts(reference: Reference) -> None:
    for name, format_name, layout, family in (
        ("gptoss-bf16", "bf16", "hf", "gpt-oss"),
        ("gptoss-mxfp4", "mxfp4", "openai", "gpt-oss"),
        ("gptoss-nvfp4-default", "nvfp4", "modelopt", "gpt-oss"),
        ("llama-bf16", "bf16", "hf", "dense"),
        ("llama-nvfp4-mlp-only", "nvfp4", "modelopt", "dense"),
        ("qwen3moe-nvfp4-default", "nvfp4", "modelopt", "moe"),
    ):
        found = fp4conv.inspect(reference(name))
        assert (found.format, found.layout, found.family, found.warnings) == (format_name, layout, family, ())
        raw = read_raw(reference(name))
        assert found.bytes == sum(len(value[2]) for value in raw.values())
        original = name.split("-")[0] + "-bf16"
        assert found.parameters == sum(array_of(value).size for value in read_raw(reference(original)).values())
        assert found.bits_per_weight == pytest.approx(8 * found.bytes / found.parameters)


def test_group_32_is_named(reference: Reference) -> None:
    found = fp4conv.inspect(reference("llama-nvfp4-weight-only"), tensor="*down_proj*")
    assert {facts.format for facts in found.tensors} == {"nvfp4 (block 32)"}


def test_globs_pick_tensors(reference: Reference) -> None:
    found = fp4conv.inspect(reference("llama-bf16"), tensor="*.q_proj.weight")
    assert [facts.name for facts in found.tensors] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert found.parameters == fp4conv.inspect(reference("llama-bf16")).parameters
    with pytest.raises(UsageError, match="matches no tensor"):
        fp4conv.inspect(reference("llama-bf16"), tensor="*.nothing")


def huge(folder: Path, tensors: int = 1) -> Path:
    """A gpt-oss-like checkpoint of 36 layers whose shards are all hole: nothing but headers can be read in time."""
    folder.mkdir()
    config = {"model_type": "gpt_oss", "num_hidden_layers": 36, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for layer in range(36):
        file, offset, header = f"model-{layer + 1:05d}-of-00036.safetensors", 0, {}
        name = f"model.layers.{layer}"
        shapes: dict[str, list[int]] = {
            f"{name}.mlp.experts.gate_up_proj": [128, 2880, 5760],
            f"{name}.mlp.experts.down_proj": [128, 2880, 2880],
            f"{name}.mlp.router.weight": [128, 2880],
            f"{name}.self_attn.sinks": [64],
        }
        shapes |= {f"{name}.self_attn.{leaf}_proj.weight": [4096, 2880] for leaf in "qkvo"}
        shapes |= {f"{name}.extra.{i}": [4] for i in range(tensors - 1)}
        for tensor, shape in shapes.items():
            nbytes = 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
            offset, weight_map[tensor] = offset + nbytes, file
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % 8)
        with (folder / file).open("wb") as shard:
            shard.write(len(content).to_bytes(8, "little") + content)
            shard.truncate(8 + len(content) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_inspect_and_dry_run_read_headers_only(tmp_path: Path) -> None:
    """230 GB of shards in well under a second of processor time, in a folder where nothing is written."""
    source = huge(tmp_path / "src", tensors=40)
    fp4conv.inspect(source, headers_only=True)
    started = time.process_time()
    found = fp4conv.inspect(source, headers_only=True)
    assert time.process_time() - started < 0.5
    assert found.bytes > 230e9
    arguments = ["convert", str(source), str(tmp_path / "dst"), "--to", "nvfp4", "--dry-run"]
    started = time.process_time()
    result = CliRunner().invoke(main, arguments)
    assert time.process_time() - started < 5
    assert result.exit_code == 0, result.output
    assert "memory" in result.stdout
    assert re.search(r"writes .* in \d+ shards", result.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_real_run_of_what_does_not_fit_the_disk_stops_before_the_first_byte(tmp_path: Path) -> None:
    source = huge(tmp_path / "src")
    if shutil.disk_usage(tmp_path).free > 400e9:
        pytest.skip("this disk is too large for the test")
    with pytest.raises(OutputError, match="disk is too small"):
        fp4conv.convert(source, tmp_path / "dst", to="f32")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_inspect_imports_no_compiler(reference: Reference) -> None:
    """Looking at headers is quick because nothing heavy is loaded for it."""
    code = (
        "import sys; from fp4conv.cli import main\n"
        f"try: main(['inspect', {str(reference('gptoss-mxfp4'))!r}, '--headers-only'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'numba', 'torch', 'llvmlite', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)


def test_values_at_the_edge_are_the_same_by_open_and_by_convert(tmp_path: Path) -> None:
    weight = bf16(np.outer(np.exp2(np.arange(-30, 34)), np.linspace(-1, 1, 96)))
    source = write_model(tmp_path / "src", {f"{DOWN}.weight": weight})
    for to in ("mxfp4", "nvfp4"):
        fp4conv.convert(source, tmp_path / to, to=to)
        fp4conv.convert(tmp_path / to, tmp_path / f"{to}-f32", to="f32")
        decoded = array_of(read_raw(tmp_path / f"{to}-f32")[f"{DOWN}.weight"])
        assert fp4conv.open(tmp_path / to).read(f"{DOWN}.weight").tobytes() == decoded.tobytes()
