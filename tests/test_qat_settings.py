"""The settings of qat: one table, from which the YAML, its checks and the options follow."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import fp4conv
from fp4conv.cli import main
from fp4conv.commands.qat import qat, settings_of
from fp4conv.errors import UsageError
from fp4conv.qat.settings import PRESETS, Settings, settings_from
from fp4conv.qat.settings_yaml import to_yaml


def test_printed_config_is_yaml_that_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    chosen = replace(
        Settings(), dataset="a: b#c.jsonl", sft_learning_rate=2e-5, lora_layers=(0, 7), include=("*.q_proj",)
    )
    file = tmp_path / "qat.yaml"
    file.write_text(to_yaml(chosen))
    assert settings_of({}, config=file) == chosen


def test_every_setting_has_its_comment_in_the_config_and_an_option() -> None:
    printed = CliRunner().invoke(main, ["qat", "--print-config"]).output
    assert set(yaml.safe_load(printed)) == {one.name for one in fields(Settings)}
    assert all("  # " in line for line in printed.splitlines() if line and not line.startswith("#"))
    options = {option for parameter in main.commands["qat"].params for option in parameter.opts}
    assert {f"--{one.name.replace('_', '-')}" for one in fields(Settings)} - options == {"--model"}


def test_options_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "qat.yaml"
    file.write_text("lora_rank: 4\ngpus: 2\n")
    made = settings_of({"gpus": 1}, config=file, preset_name="gpt-oss-120b-lora")
    assert (made.gpus, made.lora_rank, made.model, made.lora) == (1, 4, "openai/gpt-oss-120b", True)


def test_python_can_call_the_command_though_its_room_was_imported() -> None:
    """Importing fp4conv.qat.settings puts the package where `fp4conv.qat` was the function."""
    for _ in range(2):
        with pytest.raises(UsageError, match="no preset 'none'"):
            fp4conv.qat(preset_name="none")


def test_an_option_reaches_the_settings() -> None:
    words = [
        "qat",
        "M",
        "--print-config",
        "--lora",
        "--lora-layers",
        "1",
        "--lora-layers",
        "2",
        "--qat-learning-rate",
        "3e-6",
    ]
    found = yaml.safe_load(CliRunner().invoke(main, words).output)
    assert (found["model"], found["lora"], found["lora_layers"], found["qat_learning_rate"]) == (
        "M",
        True,
        [1, 2],
        3e-6,
    )


def test_the_published_learning_rates_are_the_defaults() -> None:
    assert (Settings().sft_rate, Settings().qat_rate) == (2e-5, 1e-5)
    assert (Settings(lora=True).sft_rate, Settings(lora=True).qat_rate) == (2e-4, 2e-4)
    assert (Settings().scheduler, Settings().min_lr_rate, Settings().dtype) == ("cosine_with_min_lr", 0.1, "bfloat16")
    assert (Settings().warmup, Settings().calib_samples) == (0.03, 128)
    assert Settings().gradient_checkpointing


@pytest.mark.parametrize(("name", "examples"), [("gpt-oss-20b", 2 * 2 * 8), ("gpt-oss-120b-lora", 1 * 16 * 1)])
def test_presets_take_the_published_examples_a_step(name: str, examples: int) -> None:
    """Examples a device, accumulation and processes of NVIDIA's sft_full.yaml with zero3.yaml, and of sft_lora.yaml."""
    made = settings_of({}, preset_name=name)
    assert made.batch_size * made.gradient_accumulation * made.gpus == examples
    assert (made.format, made.modules, made.quant_cfg) == ("mxfp4", None, None), "the experts, as the model comes"
    assert (made.attn_implementation, made.max_length) == ("eager", 4096)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str) -> None:
    made = settings_of({}, preset_name=name)
    assert made.format in {"mxfp4", "nvfp4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qat_learning_rat: 1e-5", "did you mean 'qat_learning_rate'"),
        ("Format: mxfp4", "did you mean 'format'"),
        ("format: mxfp5", "did you mean 'mxfp4'"),
        ("sft_epochs: much", "expected a number"),
        ("batch_size: 0", "at least 1"),
        ("batch_size: 1.5", "expected a whole number"),
        ("lora: 1", "expected true or false"),
        ("skip: [sft, bake]", "'bake'"),
        ("qat_learning_rate: -1", "expected more than 0"),
        ("test_size: 1", "between 0 and 1"),
        ("qat_learning_rate: .inf", "expected a finite number"),
        ("weight_decay: .nan", "expected a finite number"),
        ("seed: -1", "at least 0"),
        ("min_lr_rate: 2", "at most 1"),
        ("sft_max_steps: 0", "at least 1, or -1"),
        ("lora_alpha: 0", "expected more than 0"),
        ("chat_date: tomorrow", "expected a day such as 2026-01-31"),
        ("chat_date: 20260131", "expected text"),
        ("chat_date: 2026-02-30", "holds what YAML cannot read: day"),
        ("max_memory: much", "'much' is not a size"),
        ("seed: 1\nformat: mxfp4\nseed: 2", "says seed more than once"),
        ("\tseed: 1", "is not YAML"),
        ("- a list", "holds no settings"),
        ("a: b: c", "is not YAML"),
        ("{lora: true, lora_dropout: 0.1}", "--no-lora-experts"),
    ],
)
def test_a_wrong_config_is_an_error_that_says_what(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "qat.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        settings_of({}, config=file)
    assert message in str(error.value)


def test_numbers_as_yaml_1_1_reads_them_are_numbers() -> None:
    """1e-5 without a point is a string to YAML 1.1; people write it."""
    assert settings_from({"qat_learning_rate": yaml.safe_load("1e-5")}).qat_learning_rate == 1e-5


def test_a_day_as_yaml_reads_it_is_a_day(tmp_path: Path) -> None:
    (tmp_path / "qat.yaml").write_text("chat_date: 2026-01-31\n")
    made = settings_of({}, config=tmp_path / "qat.yaml")
    assert made.chat_date == "2026-01-31"
    (tmp_path / "qat.yaml").write_text(to_yaml(made))
    assert settings_of({}, config=tmp_path / "qat.yaml") == made


def test_home_is_expanded_in_a_file_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "qat.yaml"
    file.write_text("model: ~/models/m\ndataset: org/name\noutput: ~/run\nsubset: ~\nexclude: ['~/x']\n")
    made = settings_of({"dataset": "~/chats.jsonl"}, config=file)
    assert (made.model, made.dataset, made.output) == (
        f"{tmp_path}/models/m",
        f"{tmp_path}/chats.jsonl",
        f"{tmp_path}/run",
    )
    assert (made.subset, made.exclude) == (None, ("~/x",))
    assert settings_of({}, config=file).dataset == "org/name"


def test_the_help_of_what_may_be_given_several_times() -> None:
    shown = " ".join(CliRunner().invoke(main, ["qat", "--help"], terminal_width=100).output.split())
    assert "(q_proj), all-linear, or none. Repeatable [all-linear] --" in shown.replace("all- linear", "all-linear")
    assert "Steps to leave out. Repeatable." in shown
    assert "Rank [8] --" in shown


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UsageError, match="there is no preset 'tiny'"):
        settings_of({}, preset_name="tiny")


def test_the_command_that_a_call_from_python_is_told_by_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of a stopped run say to give it again."""
    called: list[tuple[Settings, str]] = []
    monkeypatch.setattr("fp4conv.qat.run.run", lambda settings, command, _: called.append((settings, command)))
    (tmp_path / "q.yaml").write_text("seed: 7\n")
    qat(
        "my model",
        config=tmp_path / "q.yaml",
        preset_name="small",
        dataset="d.jsonl",
        skip=["sft", "export"],
        lora_layers=(1, 2),
        include="*.a b",
        lora=True,
        gradient_checkpointing=False,
        qat_learning_rate=3e-5,
    )
    (settings, told) = called[0]
    assert (settings.seed, settings.batch_size, settings.skip) == (7, 8, ("sft", "export"))
    result = CliRunner().invoke(main, [*shlex.split(told)[1:], "--print-config"])
    assert result.stdout == to_yaml(settings)


def test_a_home_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    assert settings_from({"output": "out"}).output == "out"
    with pytest.raises(UsageError, match=r"output is ~/out, and there is no home[^$]*the whole path"):
        settings_from({"output": "~/out"})
