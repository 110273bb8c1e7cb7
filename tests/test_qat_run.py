"""`fp4conv qat`, the whole of it, on models and a task that are made here. Goldens: NumPy, transformers and peft."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("trl")

import torch
from click.testing import CliRunner
from hub_server import Hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config, TrainerCallback

import fp4conv
from fp4conv.cli import main
from fp4conv.errors import UsageError, ValuesError
from fp4conv.qat import steps
from fp4conv.qat.made import Task, tokenizer_for, write_model, write_task
from fp4conv.qat.packages import check_packages
from fp4conv.qat.quantizers import FakeQuantizer
from fp4conv.qat.run import _binding
from fp4conv.qat.scoring import Scoring, rows_of
from fp4conv.qat.settings import Settings, settings_from
from fp4conv.qat.settings_yaml import read_yaml, to_yaml
from fp4conv.qat.work import Work

TASK = Task(rules=4, prime=13, length=6, held_out=8)
QUICK: Mapping[str, object] = {
    "backend": "fp4conv",
    "sft_max_steps": 8,
    "qat_max_steps": 4,
    "batch_size": 16,
    "gradient_accumulation": 1,
    "gradient_checkpointing": False,
    "sft_learning_rate": 4e-3,
    "qat_learning_rate": 1e-3,
    "logging_steps": 2,
    "eval_batch_size": 4,
}
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True)
class Run:
    root: Path
    words: tuple[str, ...]

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def report(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.out / "report.json").read_text())
        return found


def make(root: Path, family: str = "gpt-oss") -> None:
    write_task(root / "data", TASK)
    write_model(root / "model", TASK, family=family)


def options(**settings: object) -> list[str]:
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, str(value)]
    return words


def command(root: Path, **settings: object) -> tuple[str, ...]:
    known = {"dataset": root / "data", "output": root / "out"}
    return ("qat", str(root / "model"), *options(**{**known, **QUICK, **settings}))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """gpt-oss to MXFP4, once: the first example of `fp4conv qat --help`, made quick."""
    root = tmp_path_factory.mktemp("gpt-oss")
    make(root)
    places = {"gpt-oss-20b": root / "model", "my.jsonl": root / "data", "my-run": root / "out"}
    example = next(line for line in (main.commands["qat"].epilog or "").splitlines() if "my.jsonl" in line)
    run = Run(root, (*(str(places.get(word, word)) for word in example.split()[1:]), *options(**QUICK)))
    result = CliRunner().invoke(main, run.words)
    assert result.exit_code == 0, result.output
    return run


def mxfp4(values: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float64]:
    """MXFP4 by the smallest scale that does not saturate, ties to even, in float64: what the forward pass uses."""
    blocks = np.moveaxis(values.astype(np.float64), axis, -1)
    shape = blocks.shape
    blocks = blocks.reshape(-1, 32)
    amax = np.abs(blocks).max(1, keepdims=True)
    mantissa, exponent = np.frexp(amax / 6)
    scale = np.where(amax > 0, np.exp2(np.where(mantissa == 0.5, exponent - 1, exponent)), 1.0)
    places = np.abs(blocks) / scale
    lower = np.searchsorted(GRID, places, side="right") - 1
    upper = np.minimum(lower + 1, 7)
    below, above = places - GRID[lower], GRID[upper] - places
    up = (above < below) | ((above == below) & (lower % 2 == 1))
    rounded = np.where(up, GRID[upper], GRID[lower]) * np.sign(blocks) * scale
    return np.moveaxis(rounded.reshape(shape), -1, axis)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([tokenizer_for(TASK.words())("w0 w1 w2 rule1 5 7 11")["input_ids"]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def test_the_export_in_transformers_has_the_logits_of_the_trained_masters_quantised_by_numpy(done: Run) -> None:
    masters = AutoModelForCausalLM.from_pretrained(
        done.out / "qat" / "model", dtype=torch.bfloat16, attn_implementation="eager"
    )
    for name, parameter in masters.named_parameters():
        if ".experts." in name and parameter.ndim == 3:
            quantised = mxfp4(parameter.detach().float().numpy(), axis=1)
            parameter.data.copy_(torch.from_numpy(quantised))
    exported = AutoModelForCausalLM.from_pretrained(
        done.out / "export",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    assert torch.equal(logits(masters), logits(exported))
    untrained = AutoModelForCausalLM.from_pretrained(done.root / "model", attn_implementation="eager")
    assert not torch.equal(logits(untrained).float(), logits(exported).float())


def test_the_table_has_every_model_and_the_export_scores_as_the_model_in_training(done: Run) -> None:
    rows = done.report["rows"]
    assert isinstance(rows, list)
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == ["original", "sft", "sft + ptq mxfp4", "sft + ptq nvfp4", "sft + qat", "exported"]
    assert by_name["sft + qat"]["loss"] == by_name["exported"]["loss"] < by_name["original"]["loss"]
    assert by_name["sft + qat"]["loss"] != by_name["sft"]["loss"] < by_name["original"]["loss"]
    assert all(row["asked"] == len(TASK.rows()[1]) for row in rows)
    assert all(row["pass_rate"] == row["passed"] / row["asked"] for row in rows)
    page = (done.out / "report.html").read_text()
    assert page.count("Plotly.newPlot") == 1
    assert all(f"<tr><td>{row['name']}</td><td>{row['loss']:.4f}</td>" in page for row in rows)
    assert all(f'"name":"{step}"' in page for step in ("sft", "qat"))
    card = (done.out / "export" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "| sft + qat |" in card


@pytest.mark.parametrize(
    ("skip", "rows"),
    [
        ((), ["original", "sft", "sft + ptq mxfp4", "sft + ptq nvfp4", "sft + qat", "exported"]),
        (("sft",), ["original", "ptq mxfp4", "ptq nvfp4", "qat", "exported"]),
        (("qat",), ["original", "sft", "sft + ptq mxfp4", "sft + ptq nvfp4", "exported"]),
        (("sft", "export"), ["original", "ptq mxfp4", "ptq nvfp4", "qat"]),
    ],
)
def test_the_rows_of_what_was_done(skip: tuple[str, ...], rows: list[str]) -> None:
    assert list(rows_of(settings_from({"skip": skip}), trained="qat" not in skip)) == rows


def test_the_row_of_the_export_is_measured_on_the_export(tmp_path: Path, done: Run) -> None:
    """With a head of zeros every token is as likely as any other."""
    shutil.copytree(done.out, tmp_path / "out")
    (file,) = (tmp_path / "out" / "export").glob("*.safetensors")
    tensors = load_file(file)
    vocabulary = len(tensors["lm_head.weight"].zero_())
    save_file(tensors, file, {"format": "pt"})
    places = steps.Places(tmp_path / "out")
    settings = settings_from(read_yaml(tmp_path / "out" / "qat.yaml"))
    scoring = Scoring(done.root / "model", places.sft / "model", places, settings, ())
    assert scoring.score("exported").loss == pytest.approx(np.log(vocabulary), rel=1e-3)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.1.mlp.experts.down_proj_blocks", r"experts\.down_proj: 1 of [\d,]+ values of the export"),
        ("model.layers.1.self_attn.q_proj.weight", r"self_attn\.q_proj\.weight [^$]*is not what was trained"),
    ],
)
def test_an_export_with_another_bit_than_was_trained_stops_the_run(
    tmp_path: Path, done: Run, tensor: str, message: str
) -> None:
    shutil.copytree(done.out, tmp_path / "out")
    (file,) = (tmp_path / "out" / "export").glob("*.safetensors")
    tensors = load_file(file)
    tensors[tensor].view(torch.uint8).view(-1)[4] ^= 1
    save_file(tensors, file, {"format": "pt"})
    places = steps.Places(tmp_path / "out")
    settings = settings_from(read_yaml(tmp_path / "out" / "qat.yaml"))
    with pytest.raises(ValuesError, match=message):
        Scoring(done.root / "model", places.sft / "model", places, settings, ()).compare()


def test_done_again_nothing_is_done_and_the_table_is_the_same(done: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done.report
    monkeypatch.setattr("fp4conv.qat.machine.machine", lambda: "another machine, to look at the table on")
    monkeypatch.setattr("fp4conv.qat.machine.platform.python_version", lambda: "3.99")
    monkeypatch.setattr("fp4conv.qat.steps.launch.run", None)
    monkeypatch.setattr("fp4conv.qat.steps.convert", None)
    result = CliRunner().invoke(main, [*done.words, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == before


def test_other_settings_are_refused_by_name_and_machine_settings_are_not(
    done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before_data_is_read:
        before_data_is_read.setattr(Work, "check", None)
        result = CliRunner().invoke(main, [*done.words, "--qat-learning-rate", "2e-3"])
    assert result.exit_code == 1
    assert "qat_learning_rate was 0.001, is 0.002" in result.output
    going_on = CliRunner().invoke(main, [*done.words, "--save-steps", "7"])
    assert going_on.exit_code == 0
    last = going_on.stdout.replace("\n", "")  # long names are folded
    assert last.endswith(f"checkpoint: {done.out / 'export'}page: {done.out / 'report.html'}")
    may_differ = Settings().values().keys() - _binding(Settings()).keys()
    machine = {"gpus", "sharding", "max_memory", "output"}
    assert may_differ == machine | {"save_steps", "logging_steps", "eval_batch_size"}, "all others change a result"


def test_a_log_gets_lines_of_progress_and_quiet_nothing(tmp_path: Path, done: Run) -> None:
    """Training takes hours, and its output goes to files."""
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(done.root / name)
    words = [*command(tmp_path, format="mxfp4"), "--skip", "evaluate", "--skip", "qat"]
    told = CliRunner().invoke(main, words).stderr
    assert re.search(r"^sft: step 1 of [\d,]+, loss \d+\.\d+, \S+ s a step$", told, re.MULTILINE), told
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    assert CliRunner().invoke(main, [*words, "--quiet"]).stderr == ""


def test_what_no_step_needs_any_longer_is_gone(done: Run) -> None:
    assert {place.name for place in (done.out / "sft").iterdir()} == {"model", "training.json"}
    assert {place.name for place in (done.out / "qat").iterdir()} == {"model", "training.json"}


def test_a_run_does_not_go_on_with_other_examples_or_another_model(tmp_path: Path, done: Run) -> None:
    """Told before anything is done, and put back the run goes on."""
    shutil.copytree(done.root / "data", tmp_path / "data")
    shutil.copytree(done.root / "model", tmp_path / "model")
    words = [
        *command(tmp_path, format="mxfp4", sft_max_steps=1),
        "--skip",
        "qat",
        "--skip",
        "export",
        "--skip",
        "evaluate",
    ]
    assert CliRunner().invoke(main, words).exit_code == 0
    rows = (tmp_path / "data" / "train.jsonl").read_text()
    for changed in (rows.replace("rule1", "rule2", 1), rows[: rows.rindex("{")]):
        (tmp_path / "data" / "train.jsonl").write_text(changed)
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 1
        assert "began before the examples of the dataset changed" in result.output
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    assert CliRunner().invoke(main, words).exit_code == 0
    write_model(tmp_path / "model", TASK, seed=1)
    assert "began before the model changed" in CliRunner().invoke(main, words).output


@pytest.mark.parametrize(("steps_of_sft", "message"), [(3, "after the last step"), (12, "at step [2-9]")])
def test_a_run_that_diverges_is_stopped(tmp_path: Path, done: Run, steps_of_sft: int, message: str) -> None:
    """Where the log tells it, and where only the weights that the last step left do."""
    changed = {"sft_learning_rate": 1e9, "sft_max_steps": steps_of_sft, "output": tmp_path / "out"}
    result = CliRunner().invoke(main, command(done.root, format="mxfp4", **changed))
    assert result.exit_code == 1
    assert re.search(f"{message}: training has diverged", result.output), result.output
    assert "--sft-learning-rate" in result.output
    assert not (tmp_path / "out" / "quantizers").exists()


def test_without_qat_the_export_has_the_input_scales_that_its_row_was_measured_with(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    chosen = {"quant_cfg": "NVFP4_DEFAULT_CFG", "exclude": "*o_proj"}
    words = command(tmp_path, format="nvfp4", skip="qat", eval_samples=2, **chosen)
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row["loss"] for row in json.loads(result.stdout)["rows"]}
    assert rows["exported"] == rows["sft + ptq nvfp4"]
    card = (tmp_path / "out" / "export" / "README.md").read_text()
    assert "model, quantised to NVFP4" in card
    with fp4conv.open(tmp_path / "out" / "export") as exported:
        scales = [name for name in exported.model.calibration if name.endswith("input_scale")]
        assert len(scales) == 2 * 6  # layers, and quantised ones in each


def test_what_the_conversions_warn_of_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source with quantised inputs: their scales have no place in the dense model that is trained."""
    make(tmp_path, "llama")
    shutil.move(tmp_path / "model", tmp_path / "dense")
    with fp4conv.open(tmp_path / "dense") as dense:
        modules = [weight.module for weight in dense.model.weights if "_proj" in weight.name]
    scales = {f"{module}.input_amax": torch.tensor(2.0) for module in modules}
    save_file(scales, tmp_path / "inputs.safetensors")
    fp4conv.convert(
        tmp_path / "dense", tmp_path / "model", to="nvfp4", input_scales=str(tmp_path / "inputs.safetensors")
    )
    quantise = steps.quantise
    monkeypatch.setattr(steps, "quantise", lambda *at, **options: (*quantise(*at, **options), "as for the export"))
    words = command(tmp_path, format="mxfp4", skip="qat", sft_max_steps=1, eval_samples=1)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    warned, of_export = re.findall(r"^warning: (.*)$", result.stderr, re.MULTILINE)
    assert of_export == "as for the export"
    assert warned.startswith("the input scales of 14 modules are left out")
    assert Run(tmp_path, ()).report["warnings"] == {"upcast": [warned], "export": [of_export]}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("model/run", "lies in the model"),
        ("data/run", "lies in the dataset"),
        ("out/report.json/run", "is a file"),
        ("out/qat", "holds something already, and no run of qat"),
    ],
)
def test_places_that_a_run_does_not_write_to(tmp_path: Path, done: Run, output: str, message: str) -> None:
    result = CliRunner().invoke(main, command(done.root, format="mxfp4", output=done.root / output))
    assert result.exit_code == 1
    assert message in result.output


def test_a_run_goes_on_another_day_with_the_chats_of_the_first(
    tmp_path: Path, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss's template writes the date into every example."""
    shutil.copytree(done.root / "model", tmp_path / "model")
    template = "{{ strftime_now('%d') }} {% for m in messages %}{{ m.content }} {% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": "user", "content": f"w0 {number}"}]} for number in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*command(tmp_path, format="mxfp4", dataset=tmp_path / "data.jsonl", skip="evaluate"), "--chat-date"]
    from fp4conv.qat import train

    with monkeypatch.context() as patch:
        patch.setattr(train, "progress", lambda _: Stop(1))
        assert CliRunner().invoke(main, [*words, "2031-02-03"]).exit_code == 130
    result = CliRunner().invoke(main, [*words, "2031-02-04"])
    assert "chat_date was '2031-02-03', is '2031-02-04'" in result.output
    result = CliRunner().invoke(main, words[:-1])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["chat_date"] == "2031-02-03"


class Stop(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C after a step of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == self.step:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


def test_stopped_in_training_it_goes_on_from_the_checkpoint(
    tmp_path: Path, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of SFT, and again in QAT: the same command ends with the same bytes as without a stop."""
    from fp4conv.qat import train

    (tmp_path / "model").symlink_to(done.root / "model")
    (tmp_path / "data").symlink_to(done.root / "data")
    words = [*command(tmp_path, format="mxfp4", save_steps=2), "--skip", "evaluate"]
    started: list[int] = []
    quantisers: list[FakeQuantizer] = []

    def stopped(at: int) -> None:
        monkeypatch.setattr(train, "progress", lambda _: Stop(at))
        assert CliRunner().invoke(main, words).exit_code == 130

    stopped(5)
    (state,) = (tmp_path / "out" / "sft" / "checkpoints").glob("checkpoint-4/trainer_state.json")
    facts = json.loads(state.read_text())
    facts["stateful_callbacks"]["SpentMeter"]["attributes"]["seconds"] += 1_000  # as if it had gone on for longer
    state.write_text(json.dumps(facts))
    stopped(3)  # SFT goes on from step 4, and is done; QAT is stopped at 3

    class Seen(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
            started.append(state.global_step)  # type: ignore[attr-defined]
            model = kwargs["model"]
            assert isinstance(model, torch.nn.Module)
            quantisers.extend(each for each in model.modules() if isinstance(each, FakeQuantizer))

    monkeypatch.setattr(train, "progress", lambda _: Seen())
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert started == [2]
    assert [quantiser.enabled for quantiser in quantisers] == [True] * 4  # two parameters of experts in each layer
    assert weights(tmp_path / "out" / "export") == weights(done.out / "export")
    report, undisturbed = Run(tmp_path, ()).report, done.report
    for step in ("sft", "qat"):
        for fact in ("curve", "steps", "tokens"):
            assert report["training"][step][fact] == undisturbed["training"][step][fact]  # type: ignore[index]
    assert report["training"]["sft"]["seconds"] == report["seconds"]["sft"] > 1_000  # type: ignore[index]
    assert 0 < report["training"]["qat"]["seconds_before"] < report["seconds"]["qat"] < 1_000  # type: ignore[index]


def test_stopped_in_a_conversion_it_names_the_command_that_goes_on(
    tmp_path: Path, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the run, and not the hundred words of `convert` that the step stands for."""
    settings = read_yaml(done.out / "qat.yaml") | {"output": str(tmp_path / "out"), "skip": ("evaluate",)}
    (tmp_path / "qat.yaml").write_text(to_yaml(settings_from(settings)))

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fp4conv.commands.convert.write_files", stopped)
        result = CliRunner().invoke(main, ["qat", "--config", str(tmp_path / "qat.yaml")])
    assert result.exit_code == 130
    again = result.output.splitlines()[-1].split()
    assert again == ["fp4conv", "qat", "--config", str(tmp_path / "out" / "qat.yaml")]
    result = CliRunner().invoke(main, again[1:])
    assert result.exit_code == 0, result.output
    assert weights(tmp_path / "out" / "export") == weights(done.out / "export")


def test_a_checkpoint_that_a_kill_left_half_is_not_gone_on_from(tmp_path: Path) -> None:
    from fp4conv.qat.train import _last_checkpoint

    states = {"checkpoint-2": "{}", "checkpoint-10": "{}", "checkpoint-12": '{"global_st', "checkpoint-14": None}
    for name, state in states.items():
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoints" / "checkpoint-10")
    assert _last_checkpoint(tmp_path / "none") is None


def test_a_model_on_the_hub_comes_down_without_what_is_not_read_and_stays_at_its_commit(
    hub: Hub, tmp_path: Path
) -> None:
    make(tmp_path)
    commit = hub.add("owner/tiny", tmp_path / "model")
    hub.change("owner/tiny", {"original/model.safetensors": b"x", "metal/model.bin": b"x", "model.gguf": b"x"})
    first = hub.store.repos["owner/tiny"].commit_at("main")
    assert first is not None
    assert first.sha != commit
    settings = settings_from(
        {**QUICK, "model": "owner/tiny", "dataset": str(tmp_path / "data"), "format": "mxfp4", "output": "out"}
    )
    begun = Work(settings, lambda _: None, {})
    begun.check()
    assert begun.pins == {"owner/tiny@main": first.sha}
    here = {file.name for file in begun._source.rglob("*") if file.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= here
    assert not {"model.bin", "model.gguf"} & here
    assert not (begun._source / "original").exists()

    hub.change("owner/tiny", {"config.json": b"{}"})
    later = Work(settings, lambda _: None, begun.pins)
    later.check()
    assert later._source == begun._source


def test_a_dataset_of_the_hub_stays_at_its_commit(data_hub: Hub, tmp_path: Path, done: Run) -> None:
    """All that reads it is told the commit, settings of other processes too; a run that goes on keeps to it."""
    first = data_hub.add("datasets/owner/walks", done.root / "data")
    words = command(tmp_path, format="mxfp4", sft_max_steps=1, dataset="owner/walks")
    words = ("qat", str(done.root / "model"), *words[2:], "--skip", "qat", "--skip", "export", "--skip", "evaluate")
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.output
    data_hub.change("datasets/owner/walks", {"train.jsonl": b'{"prompt": "w0", "completion": " 1"}\n' * 9})
    again = CliRunner().invoke(main, [*words, "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads(result.stdout)
    report = json.loads(result.stdout)
    assert report["commits"] == {"datasets/owner/walks@main": first}
    assert report["dataset"] == report["settings"]["dataset"] == "owner/walks"
    settings = settings_from({**QUICK, "model": str(done.root / "model"), "dataset": "owner/walks", "format": "mxfp4"})
    work = Work(replace(settings, output=str(tmp_path / "out")), None, {"datasets/owner/walks@main": first})
    work.check()
    assert work._settings.dataset == f"owner/walks@{first}"


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "there is no such file or folder"),
        ({"gpus": 2}, "--gpus 2, but torch sees 0"),
        ({"backend": "modelopt"}, "--backend fp4conv"),
        ({"quant_cfg": "MXFP4_DEFAULT_CFG"}, "only the experts are quantised"),
        ({"include": "*.nothing"}, "matches no module"),
        ({"format": "nvfp4", "quant_cfg": "NVFP4_DEFAULT_CFG", "skip": "calibrate"}, "whose scales calibration finds"),
        ({"max_memory": "200MB"}, "leaves no room for the conversions"),
        ({"lora": True, "lora_experts": False, "lora_modules": "none"}, "no layer matches lora_modules none"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    tmp_path: Path, done: Run, changed: dict[str, object], message: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the messages are those of a machine without a GPU")
    words = ["qat", str(done.root / "model"), *options(**{**QUICK, "format": "mxfp4", "dataset": done.root / "data"})]
    result = CliRunner().invoke(main, [*words, "--output", str(tmp_path / "out"), *options(**changed)])
    assert result.exit_code in (1, 2), result.output
    assert message in result.output
    assert not (tmp_path / "out" / "sft").exists()


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(
    tmp_path: Path, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4conv.qat.models.prod", lambda _: 10**9)
    result = CliRunner().invoke(main, command(done.root, format="mxfp4", output=tmp_path / "out"))
    assert result.exit_code == 1
    assert "training takes at least" in result.output
    assert "--lora" in result.output


@pytest.mark.parametrize(
    ("missing", "changed"),
    [("torch", {}), ("trl", {}), ("peft", {"lora": True}), ("modelopt", {"backend": "modelopt"})],
    ids=str,
)
def test_missing_packages_are_named_with_what_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, changed: dict[str, object]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    result = CliRunner().invoke(main, command(tmp_path, format="mxfp4", **changed))
    assert result.exit_code == 2
    assert f"training needs {missing}" in result.output
    assert "pip install 'fp4conv[qat]'" in result.output


def test_python_that_trl_does_not_run_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 10, 13))
    with pytest.raises(UsageError, match="training needs no_such_package") as caught:
        check_packages("training", ["json", "no_such_package"])
    assert caught.value.hint == "with Python 3.11 or newer, which trl needs: pip install 'fp4conv[qat]'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "MODEL is missing"),
        (["M"], "--dataset DATA is missing"),
        (["M", "--dataset", "d.jsonl"], "--format is missing"),
        (["M", "--dataset", "d.jsonl", "--format", "mxfp4"], "--output DIR is missing"),
        (
            ["M", "--dataset", "d.jsonl", "--format", "mxfp4", "--output", "o", "--skip", "sft", "--skip", "qat"],
            "fp4conv convert MODEL DIR --to mxfp4",
        ),
    ],
)
def test_words_that_are_missing_or_leave_nothing_to_train(words: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["qat", *words])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt-oss", {"format": "nvfp4"}),
        ("gpt-oss", {"format": "nvfp4", "quant_cfg": "NVFP4_DEFAULT_CFG", "dtype": "float32"}),
        ("gpt-oss", {"format": "mxfp4", "lora": True, "gradient_checkpointing": True}),
        ("llama", {"format": "mxfp4"}),
        ("llama", {"format": "nvfp4", "quant_cfg": "NVFP4_DEFAULT_CFG"}),
        ("llama", {"format": "nvfp4", "lora": True, "lora_layers": 1}),
        ("qwen3-moe", {"format": "nvfp4"}),
        ("qwen3-moe", {"format": "mxfp4", "lora": True}),
        ("llama", {"format": "mxfp4", "skip": "sft", "modules": "mlp"}),
        ("llama", {"format": "nvfp4", "skip": "qat"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_each_family_format_and_way(tmp_path: Path, family: str, settings: dict[str, object]) -> None:
    make(tmp_path, family)
    result = CliRunner().invoke(main, [*command(tmp_path, **settings), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    if "skip" not in settings:
        assert rows["sft + qat"]["loss"] == rows["exported"]["loss"]
        assert rows["sft"]["loss"] < rows["original"]["loss"]
    if settings.get("skip") != "qat":
        assert report["export"]["largest"] == 0
        assert (report["export"]["quantized_inputs"] == 0) == (settings.get("quant_cfg") == "NVFP4_DEFAULT_CFG")
    with fp4conv.open(tmp_path / "out" / "export") as exported, fp4conv.open(tmp_path / "model") as source:
        assert set(exported.names) == set(source.names)


@pytest.mark.slow
def test_merged_adapters_are_the_weights_that_the_forward_pass_had(tmp_path: Path) -> None:
    """peft's own forward pass, on the model that QAT started from, against the merged masters: the same logits."""
    from peft import PeftModel

    make(tmp_path)
    words = command(tmp_path, format="mxfp4", lora=True, lora_modules="none", skip="evaluate")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "sft" / "model", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "qat" / "saved", autocast_adapter_dtype=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "qat" / "model", attn_implementation="eager")
    assert torch.equal(logits(adapted), logits(merged))


@pytest.mark.slow
def test_a_native_mxfp4_model_is_decoded_first(tmp_path: Path, done: Run) -> None:
    """The export of one run is the model of the next."""
    result = CliRunner().invoke(
        main,
        [
            *("qat", str(done.out / "export"), "--output", str(tmp_path / "out"), "--json"),
            *options(**{**QUICK, "format": "mxfp4", "dataset": done.root / "data"}),
        ],
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    before = {row["name"]: row for row in done.report["rows"]}  # type: ignore[attr-defined]
    assert rows["original"]["loss"] == before["exported"]["loss"]


@pytest.mark.slow
def test_killed_outright_at_each_step_it_goes_on(tmp_path: Path, done: Run) -> None:
    """SIGKILL as soon as each step has begun; at last the weights are those of a run that nobody disturbed."""
    (tmp_path / "model").symlink_to(done.root / "model")
    (tmp_path / "data").symlink_to(done.root / "data")
    words = [sys.executable, "-m", "fp4conv", *command(tmp_path, format="mxfp4", save_steps=2)]
    for step in ("fine-tuning", "putting fake", "training them on", "exporting", "comparing", "evaluating: sft + ptq"):
        with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(step):
                    time.sleep(0.3)
                    os.kill(process.pid, signal.SIGKILL)
                    break
    finished = subprocess.run(words, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "fine-tuning" not in finished.stderr
    assert weights(tmp_path / "out" / "export") == weights(done.out / "export")
