"""The model card and the page of a run: what they say beside the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from fp4conv.model import JSON
from fp4conv.qat.evaluate import Score
from fp4conv.qat.machine import machine, noted, over_steps, versions
from fp4conv.qat.report import Report
from fp4conv.qat.settings import Settings
from fp4conv.qat.train import Trained
from fp4conv.qat.written import card, page

NOTE = "model.layers.0.mlp.experts.down_proj: 3 blocks have other values in training than any file can give them"


def report(**settings: object) -> Report:
    made = Settings(**{"model": "org/tiny", "dataset": "d.jsonl", "format": "nvfp4", **settings})  # type: ignore[arg-type]
    calibration = {"names": ["a"], "values": 96, "notes": [NOTE]}
    return Report(made, {"original": (Score(1.5, 8, 1, 2), 0.1)}, {}, calibration, None, {}, "a GPU", {"torch": "2.0"})  # type: ignore[arg-type]


def front(text: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(text.split("---")[1])
    return found


def test_what_is_told_below_is_below() -> None:
    """The table's facts speak of notes; a reader of the card or the page has nothing else to find them in."""
    pytest.importorskip("plotly")
    for text in (card(report()), page(report())):
        assert "but for what is told below" in text
        assert text.index(NOTE) > text.index("but for what is told below")
        assert "a GPU; torch 2.0" in text


def test_the_table_in_the_card() -> None:
    made = replace(report(), rows={"original": (Score(1.5, 8, 1, 2), 0.1), "sft": (Score(0.25, 8), 0.1)})
    _, rows = card(made).split("|---|---:|---:|---:|\n")
    assert rows.splitlines()[:2] == ["| original | 1.5000 | 1 of 2 | 50.0 % |", "| sft | 0.2500 |  |  |"]


def test_what_a_conversion_warned_of_is_in_the_card_the_page_and_the_json() -> None:
    pytest.importorskip("plotly")
    warned = replace(report(), warnings={"upcast": ["input scales of 14 modules have no place"]})
    for text in (card(warned), page(warned)):
        assert "upcast: warning: input scales of 14 modules have no place" in text
    assert warned.to_json()["warnings"] == {"upcast": ["input scales of 14 modules have no place"]}


@pytest.mark.parametrize("model", ["org/tiny", "org/tiny@v1.0", "hf://org/tiny@main/inner"])
def test_the_base_is_named_as_the_hub_names_it(model: str) -> None:
    assert front(card(report(model=model)))["base_model"] == "org/tiny"
    assert "# tiny, trained for NVFP4" in card(report(model=model))


def test_a_model_of_a_folder_has_no_base_and_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = card(report(model="."))
    assert "base_model" not in front(text)
    assert f"# {tmp_path.name}, trained for NVFP4" in text


def test_a_model_that_was_not_trained_on_quantisers_does_not_say_so() -> None:
    text = card(report(skip=("qat",)))
    assert front(text)["tags"] == ["fp4conv", "nvfp4"]
    assert "# tiny, quantised to NVFP4" in text
    assert front(card(report()))["tags"] == ["fp4conv", "nvfp4", "qat"]


def test_commits_of_the_hub_are_told() -> None:
    pytest.importorskip("plotly")
    commits = {"org/tiny@v1": "1" * 40, "datasets/org/rows@main": "2" * 40}
    made = replace(report(model="org/tiny@v1", dataset="org/rows"), commits=commits)
    for text in (card(made), page(made)):
        assert f"model: org/tiny@v1, commit {'1' * 40}" in text
        assert f"dataset: org/rows@main, commit {'2' * 40}" in text
    assert front(card(made))["datasets"] == ["org/rows"]
    assert made.to_json()["commits"] == commits
    assert "datasets" not in front(card(report()))


def test_a_run_that_went_on_elsewhere_names_each_machine_and_release_once() -> None:
    def step(machine: str, torch: str) -> dict[str, JSON]:
        return {"seconds": 1.0, "on": {"machine": machine, "versions": {"torch": torch, "trl": "1.16"}}}

    steps = [step("a GPU", "2.12"), step("a GPU", "2.13"), step("a processor", "2.13"), step("a GPU", "2.12")]
    assert over_steps(steps) == ("a GPU; then a processor", {"torch": "2.12, then 2.13", "trl": "1.16"})
    here = noted({"values": 7})
    assert here["values"] == 7
    assert over_steps([here]) == (machine(), versions())


def test_notes_say_which_comparison_found_them() -> None:
    made = replace(report(), comparison={"notes": [NOTE], "largest": 0.1, "values": 1, "logits": 1})
    assert made.notes() == [f"before training: {NOTE}", f"after export: {NOTE}"]


def test_a_peak_that_nobody_has_measured_is_not_told() -> None:
    trained = Trained(((1, 0.5),), 1, 9, 3.0, 0)
    assert replace(report(), training={"sft": trained}).facts()[0] == "sft: 1 steps, 9 tokens, 3 s"
    measured = replace(trained, peak_bytes=2_000_000)
    assert replace(report(), training={"sft": measured}).facts()[0].endswith(", 3 s, peak memory 2.00 MB")
