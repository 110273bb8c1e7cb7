"""Text that tools choke on: half characters, numbers beyond all bounds, names of no module; each refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import noise, read_raw, write_model
from click.testing import CliRunner, Result

from fp4conv.cli import main
from fp4conv.families import natural_key, role_of

DOWN = "model.layers.0.mlp.down_proj.weight"


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "src", {DOWN: noise((8, 32))})


def header_rewritten(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = content[8:start].replace(old, new)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (r'{"model_type": "x\ud800"}', "model_type"),
        (r'{"a": {"b": ["\udc00"]}}', "a.b"),
        (r'{"x\ud800": 1}', "surrogate"),
        ('{"rope_scaling": {"factor": 1e999}}', "rope_scaling.factor"),
        ('{"factor": [1, -1e999]}', "factor"),
        ('{"factor": NaN}', "factor"),
        ('{"num_hidden_layers": 1000000000000}', "num_hidden_layers"),
        ('{"text_config": {"num_hidden_layers": 1e300}}', "num_hidden_layers"),
        ('{"factor": ' + "1" * 5_000 + "}", "config.json"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_configs_that_could_not_be_written_again(
    source: Path, tmp_path: Path, config: str, says: str, command: str
) -> None:
    (source / "config.json").write_text(config)
    words = ("convert", source, tmp_path / "dst", "--to", "mxfp4") if command == "convert" else ("inspect", source)
    result = run(*words)
    assert result.exit_code == 1
    assert "config.json" in result.stderr
    assert says in result.stderr
    assert not (tmp_path / "dst").exists()


def test_pairs_of_surrogates_and_infinity_come_along(source: Path, tmp_path: Path) -> None:
    """transformers 4 writes Mamba-2's time_step_limit with the word Infinity."""
    text = r'{"model_type": "x\ud83d\ude00", "dtype": "bfloat16", "time_step_limit": [0.0, Infinity], "large": 1e308}'
    (source / "config.json").write_text(text)
    assert run("convert", source, tmp_path / "dst", "--to", "bf16").exit_code == 0
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == json.loads(text)


def test_tensors_named_with_half_a_character(source: Path, tmp_path: Path) -> None:
    header_rewritten(source / "model.safetensors", b"down_proj", rb"down\ud800")
    result = run("convert", source, tmp_path / "dst", "--to", "mxfp4")
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr
    assert r"down\ud800" in result.stderr


@pytest.mark.parametrize("name", [".weight", ".bias", ""])
@pytest.mark.parametrize("to", ["nvfp4", "bf16"])
def test_tensors_of_no_module(tmp_path: Path, name: str, to: str) -> None:
    source = write_model(tmp_path / "src", {DOWN: noise((8, 32)), name: noise((8, 32))})
    result = run("convert", source, tmp_path / "dst", "--to", to)
    assert result.exit_code == 1
    assert repr(name) in result.stderr
    assert "names no module" in result.stderr


@pytest.mark.parametrize("digits", ["10²3", "٣", "9" * 5_000, "0" * 5_000])
def test_odd_digits_in_names_of_tensors(tmp_path: Path, digits: str) -> None:
    names = [DOWN, f"model.layers.{digits}.mlp.down_proj.weight", f"model.layers.{digits}1.mlp.down_proj.weight"]
    source = write_model(tmp_path / "src", {name: noise((8, 32)) for name in names})
    assert run("inspect", source).exit_code == 0
    result = run("convert", source, tmp_path / "dst", "--to", "mxfp4")
    assert result.exit_code == 0, result.stderr
    assert role_of(names[1], layers=1)


def test_odd_digits_in_names_of_files(source: Path, tmp_path: Path) -> None:
    (source / "10²3.txt").write_text("x")
    (source / f"{'1' * 200}.txt").write_text("x")
    assert run("convert", source, tmp_path / "dst", "--to", "mxfp4").exit_code == 0
    assert (tmp_path / "dst" / "10²3.txt").exists()


def test_natural_order_of_long_numbers() -> None:
    names = [f"x{number}" for number in ("1", "02", "10", "9" * 5_000, "1" + "0" * 5_000)]
    shuffled = [names[i] for i in (3, 1, 4, 0, 2)]
    assert sorted(shuffled, key=natural_key) == names
    assert natural_key("x²") > natural_key("x1")


@pytest.mark.parametrize("option", ["--max-shard-size", "--max-memory"])
@pytest.mark.parametrize("size", ["9" * 400, "9" * 5_000 + "GB", "10000000TB", "٣GB"])
def test_sizes_beyond_all_bounds(source: Path, tmp_path: Path, option: str, size: str) -> None:
    result = run("convert", source, tmp_path / "dst", "--to", "mxfp4", option, size)
    assert result.exit_code == 2
    assert "is not a size" in result.stderr


@pytest.mark.parametrize("name", ["s" * 300, "s/" * 2_500])
def test_paths_too_long(source: Path, tmp_path: Path, name: str) -> None:
    for words in (("inspect", name), ("convert", name, tmp_path / "dst", "--to", "bf16")):
        result = run(*words)
        assert result.exit_code == 1
        assert "cannot be opened" in result.stderr
    for destination in (tmp_path / name, tmp_path / ("d" * 250)):
        result = run("convert", source, destination, "--to", "bf16")
        assert result.exit_code == 1
        assert "cannot be made" in result.stderr
    assert run("convert", source, tmp_path / "d", "--to", "nvfp4", "--input-scales", name).exit_code == 2
    assert run("demo", name).exit_code == 1


# ---- folders of the source


def test_chat_templates_come_along_and_other_folders_are_named(source: Path, tmp_path: Path) -> None:
    for file in (
        "additional_chat_templates/rag.jinja",
        "onnx/model.onnx",
        "original/params.json",
        "assets/a.png",
        "1_Pooling/config.json",
        "1_Pooling/deep/x",
        ".cache/x",
    ):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_text("{}")
    result = run("convert", source, tmp_path / "dst", "--to", "mxfp4")
    assert result.exit_code == 0
    kept = {str(path.relative_to(tmp_path / "dst")) for path in (tmp_path / "dst").rglob("*") if path.is_file()}
    assert kept == {
        "config.json",
        "model.safetensors",
        "additional_chat_templates/rag.jinja",
        "1_Pooling/config.json",
    }
    assert "not copied: 1_Pooling/deep/, assets/, onnx/, original/" in result.stderr
    assert ".cache" not in result.stderr


def test_values_survive_beside_odd_names(tmp_path: Path) -> None:
    tensors = {DOWN: noise((8, 32)), "x²": np.ones(3, np.float32)}
    source = write_model(tmp_path / "src", tensors)
    assert run("convert", source, tmp_path / "dst", "--to", "bf16").exit_code == 0
    assert read_raw(tmp_path / "dst") == read_raw(source)
