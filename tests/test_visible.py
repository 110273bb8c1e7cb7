"""Names of strangers on a terminal: what would steer it shows as a mark, and machines get names as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import noise, write_model
from click.testing import CliRunner

from fp4conv.cli import main
from fp4conv.report.visible import visible

CLEARS_SCREEN = "\x1b[2J\x1b[31mq"
HOSTILE = (CLEARS_SCREEN, "c1\x9b2J", "turned\u202etxt", "bell\x07", "back\x08space", "return\rline")


def test_what_is_plain_stays() -> None:
    for text in ("model.layers.0.mlp.up_proj.weight", "日本語 é ▁▂█", "[red]x[/red] :smile:", "two\nlines", ""):
        assert visible(text) == text


def test_what_steers_shows_as_a_mark() -> None:
    assert visible("a\x1b[31mb\x9bc\u202ed\tz") == "a\ufffd[31mb\ufffdc\ufffdd\ufffdz"


@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "--headers-only"], ["verify"], ["inspect", "--tensor", "*", "--rows", "0:1"]]
)
def test_tables_cannot_steer_the_terminal(tmp_path: Path, command: list[str]) -> None:
    source = write_model(tmp_path / "src", {f"{name}.weight": noise((32, 64)) for name in HOSTILE})
    (source / "config.json").write_text(json.dumps({"model_type": CLEARS_SCREEN, "num_hidden_layers": 1}))
    done = CliRunner().invoke(main, [command[0], str(source), *command[1:], "--quiet"])
    assert not set(done.output) & set("\x1b\x9b\u202e\x07\x08\r")
    assert done.output


def test_the_other_side_of_a_comparison(tmp_path: Path) -> None:
    first = write_model(tmp_path / "one", {f"{name}.weight": noise((32, 64)) for name in HOSTILE})
    second = write_model(tmp_path / "two", {"a.weight": noise((32, 64))})
    done = CliRunner().invoke(main, ["diff", str(first), str(second), "--quiet"])
    assert done.exit_code == 1
    assert not set(done.output) & set("\x1b\x9b\u202e\x07\x08\r")


def test_errors_and_warnings(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / CLEARS_SCREEN)])
    assert done.exit_code
    assert "\x1b" not in done.output
    source = write_model(tmp_path / "src", {f"{CLEARS_SCREEN}.weight": noise((32, 60))})
    done = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--to", "mxfp4"])
    assert done.exit_code
    assert "\x1b" not in done.output


def test_machines_get_names_as_they_are(tmp_path: Path) -> None:
    source = write_model(tmp_path / "src", {f"{CLEARS_SCREEN}.weight": noise((32, 64))})
    done = CliRunner().invoke(main, ["inspect", str(source), "--headers-only", "--json"])
    assert json.loads(done.output)["tensors"][0]["name"] == f"{CLEARS_SCREEN}.weight"
