"""`diff`, and the forms of `inspect`: tables at any width, CSV, JSON, and the numbers of a few rows."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Array, array_of, noise, read_raw, tree, unpack, write_model
from click.testing import CliRunner, Result
from rich.console import Console

import fp4conv
from fp4conv.cli import main
from fp4conv.commands.show import show
from fp4conv.errors import SourceError, UsageError
from fp4conv.report.facts import ErrorFacts, add_errors, fold
from fp4conv.report.inspected import bars

Reference = Callable[[str], Path]
DOWN = "model.layers.0.mlp.down_proj"


def run(*words: object, columns: int = 120) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": str(columns)})


# ---- diff


def test_the_same_values_in_other_formats_and_layouts_do_not_differ(reference: Reference, tmp_path: Path) -> None:
    source = reference("gptoss-mxfp4-native-like")
    for to, layout in (("bf16", "hf"), ("f32", "hf"), ("mxfp4", "openai-original")):
        fp4conv.convert(source, tmp_path / to, to=to, layout=layout)
        result = run("diff", source, tmp_path / to)
        assert result.exit_code == 0, result.stdout
        assert "the same: every value" in result.stdout
    assert "config.json differs in" in run("diff", source, tmp_path / "f32").stdout


def test_one_value_decides(reference: Reference, tmp_path: Path) -> None:
    """A bit of a code, the sign of a zero (which is none), and NaN."""
    source = shutil.copytree(reference("gptoss-mxfp4"), tmp_path / "src")
    found = fp4conv.diff(source, reference("gptoss-mxfp4"))
    assert found.same
    file = source / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(content[8:start])["model.layers.0.mlp.experts.down_proj_blocks"]
    place = start + entry["data_offsets"][0] + 77
    content[place] ^= 0x01
    file.write_bytes(content)
    found = fp4conv.diff(source, reference("gptoss-mxfp4"))
    assert [(name, error.differ) for name, error in found.differing] == [("model.layers.0.mlp.experts.down_proj", 1)]
    result = run("diff", source, reference("gptoss-mxfp4"), "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["failing"] == ["model.layers.0.mlp.experts.down_proj"]
    assert not report["same"]


def test_tolerance_is_in_decibels_of_every_tensor(reference: Reference) -> None:
    found = fp4conv.diff(reference("llama-nvfp4-default"), reference("llama-bf16"))
    lowest = min(error.sqnr_db for _, error in found.tensors)
    assert not found.same
    pair = (reference("llama-nvfp4-default"), reference("llama-bf16"))
    assert run("diff", *pair, "--tolerance", lowest - 0.01).exit_code == 0
    above = fp4conv.diff(*pair, tolerance=lowest + 0.01)
    assert [name for name, _ in above.failing] == [found.differing[0][0]]
    assert run("diff", *pair, "--tolerance", lowest + 0.01).exit_code == 1
    assert run("diff", *pair, "--tolerance", "nan").exit_code == 2
    assert run("diff", *pair, "--tolerance", "loud").exit_code == 2


def test_what_is_missing_or_nan_fails_whatever_the_tolerance(tmp_path: Path) -> None:
    whole: dict[str, Array] = {"a": noise((64, 64)), "b": noise((4,)), "zero": np.array([0.0, 1], np.float32)}
    source = write_model(tmp_path / "whole", whole)
    minus = write_model(tmp_path / "minus", {**whole, "zero": np.array([-0.0, 1], np.float32)})
    assert fp4conv.diff(source, minus).same
    spoiled = np.array(whole["a"])
    spoiled[3, 3] = np.nan
    cases: dict[str, dict[str, Array]] = {
        "less": {"a": whole["a"], "zero": whole["zero"]},
        "more": {**whole, "c": noise((2,))},
        "shape": {**whole, "b": noise((5,))},
        "nan": {**whole, "a": spoiled},
    }
    for name, tensors in cases.items():
        other = write_model(tmp_path / name, tensors)
        for pair in ((source, other), (other, source)):
            assert not fp4conv.diff(*pair, tolerance=-1000).same, name
            assert run("diff", *pair).exit_code == 1
    assert "c" in run("diff", source, tmp_path / "more").stdout
    assert "b: [4] and [5]" in run("diff", source, tmp_path / "shape").stdout
    assert fp4conv.diff(tmp_path / "nan", tmp_path / "nan").same


def test_diff_writes_nothing_and_says_what_is_wrong(reference: Reference, tmp_path: Path) -> None:
    source = shutil.copytree(reference("llama-bf16"), tmp_path / "src")
    before = tree(tmp_path)
    run("diff", source, source)
    run("inspect", source)
    assert tree(tmp_path) == before
    assert run("diff", source).exit_code == 2
    assert run("diff", source, tmp_path / "none").exit_code == 1
    with pytest.raises(SourceError, match="no such folder"):
        fp4conv.diff(tmp_path / "none", source)
    assert run("diff", source, source, "--max-memory", "1MB").exit_code == 1


# ---- the forms of inspect


def test_json_has_the_keys_that_were_promised(reference: Reference) -> None:
    result = run("inspect", reference("gptoss-nvfp4-default"), "--reference", reference("gptoss-bf16"), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {"format", "family", "parameters", "bytes", "bits_per_weight", "tensors", "total", "layers"} <= set(report)
    promised = {"name", "format", "shape", "bytes", "sqnr_db", "mse", "max_abs_error", "nan"}
    blocks = {"scale_histogram", "code_histogram", "zero_blocks", "saturated", "tensor_scale"}
    for tensor in report["tensors"]:
        assert promised | (blocks if tensor["format"] == "nvfp4" else set()) <= set(tensor)
    assert "NaN" not in result.stdout
    assert "Infinity" not in result.stdout
    assert json.loads(run("inspect", reference("llama-bf16"), "--json").stdout)["estimates"]


@pytest.mark.parametrize("columns", [60, 80, 120, 160])
def test_tables_fit_the_terminal(reference: Reference, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4conv.report import terminal

    plain = terminal.console

    def narrow(stderr: bool = False) -> object:
        made = plain(stderr)
        made.width = columns
        return made

    monkeypatch.setattr(terminal, "console", narrow)
    for words in (
        ("inspect", reference("gptoss-mxfp4"), "--reference", reference("gptoss-bf16")),
        ("inspect", reference("llama-bf16")),
        ("inspect", reference("qwen3moe-nvfp4-default"), "--sort", "zeros"),
        ("diff", reference("llama-bf16"), reference("llama-nvfp4-default")),
    ):
        shown = run(*words).stdout
        assert max(map(len, shown.splitlines())) <= columns
        assert "proj" in shown
    shown = run("inspect", reference("llama-nvfp4-default"), "--reference", reference("llama-bf16")).stdout
    assert "SQNR" in shown
    assert "total" in shown
    assert "by layer" in shown


@pytest.mark.parametrize(
    ("columns", "sort"), [(80, "name"), (120, "name"), (160, "name"), (120, "sqnr"), (160, "sqnr")]
)
def test_columns_make_room_for_whole_names(
    reference: Reference, columns: int, sort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4conv.report import terminal

    monkeypatch.setattr(terminal, "console", lambda stderr=False: Console(width=columns, highlight=False))
    for layers, *words in (
        (2, reference("llama-nvfp4-default"), "--reference", reference("llama-bf16")),
        (3, reference("gptoss-mxfp4"), "--reference", reference("gptoss-bf16")),
        (2, reference("llama-bf16")),
    ):
        lines = run("inspect", *words, "--sort", sort).stdout.splitlines()
        shown = {line.split()[0] for line in lines if line.strip()}
        above = "" if sort == "name" else f"model.layers.{{0..{layers - 1}}}."
        assert {f"{above}post_attention_layernorm.weight", f"{above}self_attn.o_proj.weight"} <= shown


def test_sorting_puts_the_worst_first(reference: Reference) -> None:
    words = ("inspect", reference("llama-nvfp4-default"), "--reference", reference("llama-bf16"), "--csv")
    for sort, column, sign in (("sqnr", "sqnr_db", 1), ("mse", "mse", -1), ("max-error", "max_abs_error", -1)):
        lines = list(csv.DictReader(io.StringIO(run(*words, "--sort", sort).stdout)))
        known = [sign * float(line[column]) for line in lines if line[column]]
        assert known == sorted(known)
        assert len(known) > 10


def test_csv_and_json_are_two_outputs(reference: Reference) -> None:
    refused = CliRunner().invoke(main, ["inspect", str(reference("llama-bf16")), "--csv", "--json"])
    assert refused.exit_code == 2
    assert "give one of them" in refused.output


def test_csv_has_a_line_a_tensor(reference: Reference) -> None:
    shown = run("inspect", reference("llama-bf16"), "--csv", "--as", "nvfp4").stdout
    lines = list(csv.DictReader(io.StringIO(shown)))
    found = fp4conv.inspect(reference("llama-bf16"), estimate=["nvfp4"])
    assert [line["name"] for line in lines] == [facts.name for facts in found.tensors]
    for line, facts in zip(lines, found.tensors, strict=True):
        assert line["shape"] == "x".join(map(str, facts.shape))
        assert facts.values is not None
        assert float(line["largest"]) == facts.values.largest
        for each in facts.estimates:
            assert float(line[f"sqnr_db nvfp4 {each.rule}"]) == each.error.sqnr_db


def test_folded_rows_add_their_figures_up(reference: Reference) -> None:
    found = fp4conv.inspect(reference("llama-nvfp4-default"), reference=reference("llama-bf16"))
    for row in fold(found.tensors):
        members = [f for f in found.tensors if (f.kind, f.shape) == (row.kind, row.shape)][: row.count]
        if row.count == 2 and row.values is not None and row.values.codes:
            values = [facts.values for facts in members if facts.values is not None]
            assert row.values.codes == tuple(a + b for a, b in zip(values[0].codes, values[1].codes, strict=True))
            assert sum(dict(row.values.scales).values()) == row.values.blocks == sum(v.blocks for v in values)
            errors = [facts.error for facts in members if facts.error is not None]
            assert row.error == add_errors(errors)
            mse = sum(error.mse * error.values for error in errors) / sum(error.values for error in errors)
            assert row.error is not None
            assert row.error.mse == pytest.approx(mse)


def test_error_figures_at_the_edges() -> None:
    none = ErrorFacts(4, 2.0, 0.0, 2.0, 2.0, 0.0, 0.0)
    assert (none.sqnr_db, none.cosine, none.to_json()["sqnr_db"]) == (math.inf, 1.0, None)
    silent = ErrorFacts(4, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, differ=1)
    assert (silent.sqnr_db, silent.cosine) == (-math.inf, 0.0)
    assert add_errors([]).mse == 0.0
    assert bars([0, 1, 50, 100]) == " ▁▄█"
    assert bars([]) == bars([0, 0]) == ""


# ---- the numbers themselves


def test_squares_beyond_float64_are_no_figures(tmp_path: Path) -> None:
    """F64 can hold what no sum of squares can: null in JSON, worst in a table, and never within a tolerance."""
    huge = np.tile(np.array([1e300, -1e300, 1e-320]), 5000)
    folders = [
        write_model(tmp_path / name, {"a": values, "b": noise((8, 8))})
        for name, values in (("one", huge), ("two", -huge), ("three", np.roll(huge, 1)))
    ]
    for other in folders[1:]:
        done = CliRunner().invoke(main, ["diff", str(folders[0]), str(other), "--json", "--tolerance=-500"])
        found = json.loads(done.output, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert done.exit_code == 1
        assert found["tensors"][0]["sqnr_db"] is None
        assert found["failing"] == ["a"]
        shown = CliRunner().invoke(main, ["inspect", str(folders[0]), "--reference", str(other), "--sort", "sqnr"])
        assert shown.exit_code == 0
        assert "SQNR ? dB" in shown.output


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama-nvfp4-default", f"{DOWN}.weight"),
        ("gptoss-mxfp4", "model.layers.0.mlp.experts.down_proj"),
        ("gptoss-nvfp4-default", "model.layers.0.mlp.experts.down_proj"),
        ("gptoss-bf16", "model.layers.0.mlp.experts.down_proj"),
        ("llama-bf16", f"{DOWN}.weight"),
        ("llama-bf16", "model.norm.weight"),
    ],
)
def test_rows_are_those_that_open_reads(reference: Reference, name: str, tensor: str) -> None:
    (shown,) = show(reference(name), tensor, (1, 3))
    whole = fp4conv.open(reference(name)).read(tensor).astype(np.float64)
    if whole.ndim == 3:
        whole = whole.swapaxes(1, 2).reshape(-1, whole.shape[1])
    assert [row.place[-1] for row in shown.rows] == [1, 2]
    for row in shown.rows:
        assert np.array_equal(np.array(row.values), np.atleast_1d(whole[row.place[-1]]))


def test_codes_and_scales_are_those_on_disk(reference: Reference) -> None:
    (shown,) = show(reference("llama-nvfp4-default"), f"{DOWN}.weight", (5, 6))
    raw = read_raw(reference("llama-nvfp4-default"))
    packed, scales = array_of(raw[f"{DOWN}.weight"])[5], array_of(raw[f"{DOWN}.weight_scale"])[5]
    row = shown.rows[0]
    assert np.array_equal(unpack(packed), unpack(np.array(row.codes[0::2]) | np.array(row.codes[1::2]) << 4))
    assert row.scales == tuple(scales.astype(np.float64))
    assert (row.block, shown.tensor_scale) == (16, float(array_of(raw[f"{DOWN}.weight_scale_2"])))
    result = run("inspect", reference("llama-nvfp4-default"), "--tensor", f"{DOWN}.weight", "--rows", "5", "--codes")
    assert result.exit_code == 0
    assert "[0:16] scale" in result.stdout
    (shown,) = show(reference("gptoss-mxfp4"), "model.layers.0.mlp.experts.gate_up_proj", (-1, None))
    raw = read_raw(reference("gptoss-mxfp4"))
    stored = array_of(raw["model.layers.0.mlp.experts.gate_up_proj_scales"])[-1, -1]
    values = np.exp2(np.array(shown.rows[0].scales)).astype(ml_dtypes.float8_e8m0fnu)
    assert np.array_equal(values.view(np.uint8), stored)


def test_wrong_rows_are_refused(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    source = reference("llama-bf16")
    assert run("inspect", source, "--rows", "0:2").exit_code == 2
    assert run("inspect", source, "--tensor", "*", "--rows", "a:b").exit_code == 2
    assert run("inspect", source, "--tensor", "*", "--rows", "1:2:3").exit_code == 2
    assert run("inspect", source, "--tensor", "nothing", "--rows", "1").exit_code == 2
    for rows in ("5:2", "1000:2000", "3:3"):
        assert run("inspect", source, "--tensor", f"{DOWN}.weight", "--rows", rows).exit_code == 2
    assert "[]" not in run("inspect", source, "--tensor", f"{DOWN}.weight", "--rows", "0:1", "--json").stdout
    monkeypatch.setattr("fp4conv.commands.show.MOST_VALUES", 1000)
    with pytest.raises(UsageError, match="too many"):
        show(source, "*", (None, None))


def test_estimates_need_a_dense_source(reference: Reference) -> None:
    result = run("inspect", reference("gptoss-mxfp4"), "--as", "nvfp4")
    assert result.exit_code == 2
    assert "--reference" in result.stderr
    assert run("inspect", reference("gptoss-mxfp4"), "--headers-only", "--as", "nvfp4").exit_code == 2
    with pytest.raises(UsageError, match="none of mxfp4, nvfp4"):
        fp4conv.inspect(reference("llama-bf16"), estimate=["int4"])
