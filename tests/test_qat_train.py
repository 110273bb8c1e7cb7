"""One training run: the steps that it takes, and the learning rate of each, by the published schedule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from fp4conv.errors import ValuesError
from fp4conv.qat import launch, steps
from fp4conv.qat import train as train_module
from fp4conv.qat.adamw import Float32AdamW
from fp4conv.qat.backend import open_backend
from fp4conv.qat.made import Task, tokenizer_for, write_model
from fp4conv.qat.models import load_model
from fp4conv.qat.settings import Settings, settings_from
from fp4conv.qat.sharing import OptimizerCheck
from fp4conv.qat.train import CHECKPOINTS, Job, train

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES, STEPS, WARM_UP = 24, 12, 3


def published(step: int, peak: float) -> float:
    """A line up to `peak` over the warm-up, then half a cosine down to a tenth of it."""
    if step < WARM_UP:
        return peak * step / WARM_UP
    progress = (step - WARM_UP) / (STEPS - WARM_UP)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def made(root: Path, **more: object) -> Settings:
    """A model and a dataset in `root`, and settings by which twelve steps see each example three times."""
    write_model(root / "model", Task(rules=2, prime=7, length=2), family="llama")
    rows = [{"prompt": f"rule1 {i % 7}", "completion": f" {i % 5} {i % 3}"} for i in range(EXAMPLES)]
    (root / "data").mkdir()
    for split, some in (("train", rows), ("test", rows[:2])):
        (root / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return settings_from(
        {
            **{"dataset": str(root / "data"), "format": "mxfp4", "backend": "fp4conv"},
            **{"batch_size": 2, "gradient_accumulation": 3, "warmup": WARM_UP / STEPS, "logging_steps": 1},
            **{"sft_learning_rate": 3e-4, "qat_learning_rate": 7e-5, "sft_epochs": 3, "qat_epochs": 3},
            "save_steps": STEPS,
        },
        more,
    )


@pytest.mark.parametrize(("kind", "peak"), [("sft", 3e-4), ("qat", 7e-5)])
def test_steps_and_rates_are_those_of_the_settings(tmp_path: Path, kind: str, peak: float) -> None:
    other = {"sft": "qat", "qat": "sft"}[kind]
    settings = made(tmp_path, **{f"{other}_epochs": 1})
    places = steps.Places(tmp_path / "out")
    steps.calibrate(tmp_path / "model", places, settings)
    out = tmp_path / kind
    out.mkdir()
    quantizers = str(places.quantizers) if kind == "qat" else None
    trained = train(Job(kind, str(tmp_path / "model"), str(out), quantizers), settings)
    assert trained.steps == STEPS
    # A prompt is <s>, a rule and a start, a completion two numbers and </s>.
    assert trained.tokens == 3 * EXAMPLES * 6
    state = json.loads((out / CHECKPOINTS / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates == pytest.approx([published(step, peak) for step in range(STEPS)])


def test_every_setting_of_training_reaches_the_trainer(tmp_path: Path) -> None:
    settings = settings_from(
        {"batch_size": 3, "gradient_accumulation": 5, "sft_max_steps": 7, "qat_max_steps": 9, "sft_epochs": 4},
        {"scheduler": "linear", "warmup": 6, "weight_decay": 0.25, "max_grad_norm": 0.5, "seed": 11},
        {"packing": True, "max_length": 99, "save_steps": 13, "logging_steps": 17, "qat_epochs": 8},
    )
    for kind, limit, epochs in (("sft", 7, 4), ("qat", 9, 8)):
        told = train_module._arguments(Job(kind, "", str(tmp_path)), settings)
        assert (told.per_device_train_batch_size, told.gradient_accumulation_steps) == (3, 5)
        assert (told.max_steps, told.num_train_epochs) == (limit, epochs)
        assert (told.lr_scheduler_type, told.warmup_steps) == ("linear", 6)
        assert (told.weight_decay, told.max_grad_norm, told.seed) == (0.25, 0.5, 11)
        assert (told.packing, told.max_length) == (True, 99)
        assert (told.save_steps, told.logging_steps) == (13, 17)


class Logits(TrainerCallback):  # type: ignore[misc]
    """Those of the model as training leaves it."""

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.found = logits(kwargs["model"])


def logits(model: object) -> torch.Tensor:
    assert isinstance(model, torch.nn.Module)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(12)[None] + 4).logits
    return found


@pytest.mark.parametrize(("kind", "layers"), [("fp4conv", ()), ("fp4conv", (1,)), ("modelopt", ())])
@pytest.mark.usefixtures("kernels_on_cpu")
def test_the_merged_model_under_its_quantisers_is_the_one_that_adapters_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, layers: tuple[int, ...]
) -> None:
    """The same logits, bit for bit: an adapter beside a quantised weight would give others, and none would fail."""
    settings = made(tmp_path, backend=kind, lora=True, lora_layers=layers, qat_learning_rate=1e-2, qat_max_steps=3)
    places, trained = steps.Places(tmp_path / "out"), Logits()
    steps.calibrate(tmp_path / "model", places, settings)
    monkeypatch.setattr(train_module, "progress", lambda _: trained)
    steps.qat(tmp_path / "model", places, settings)
    masters, merged = (load_model(folder, settings) for folder in (tmp_path / "model", places.qat / "model"))
    values = dict(masters.named_parameters())
    other = {name for name, value in merged.named_parameters() if not torch.equal(value, values[name])}
    linear = {f"{name}.weight" for name, each in masters.named_modules() if isinstance(each, torch.nn.Linear)}
    assert other == {name for name in linear - {"lm_head.weight"} if not layers or "layers.1." in name}
    open_backend(kind).load(merged, places.quantizers)
    assert torch.equal(logits(merged), trained.found)


class Second(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Each step takes one; Ctrl-C after step `last`."""

    def __init__(self, clock: list[float], last: int = 0) -> None:
        self._clock, self._last = clock, last

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        self._clock[0] += 1

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == self._last:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


def test_what_was_stopped_counts_all_that_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each step moves on by a second, loading by ten and writing a checkpoint by a hundred."""
    clock, held = [0.0], [7]

    def takes(seconds: float, work: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **options: object) -> object:
            clock[0] += seconds
            return work(*args, **options)

        return timed

    settings = made(tmp_path, save_steps=2)
    monkeypatch.setattr("fp4conv.qat.spent.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(train_module, "peak_bytes", lambda: held[0])
    monkeypatch.setattr(train_module, "load_model", takes(10, load_model))
    monkeypatch.setattr(Trainer, "_save_rng_state", takes(100, Trainer._save_rng_state))
    monkeypatch.setattr(train_module, "progress", lambda _: Second(clock, last=5))
    job = Job("sft", str(tmp_path / "model"), str(tmp_path / "sft"))
    with pytest.raises(KeyboardInterrupt):
        launch.run(job, settings)
    monkeypatch.setattr(train_module, "progress", lambda _: Second(clock))
    held[0] = 5
    trained = launch.run(job, settings)
    assert trained.seconds_before == 10 + 4 + 2 * 100  # step 5 is in no checkpoint
    assert trained.seconds == trained.seconds_before + 10 + 8 + 4 * 100
    assert trained.peak_bytes == 7
    undisturbed = launch.run(replace(job, out=str(tmp_path / "other")), settings)
    assert (undisturbed.seconds, undisturbed.seconds_before) == (10 + 12 + 6 * 100, 0)
    assert (trained.curve, trained.steps, trained.tokens) == (undisturbed.curve, STEPS, undisturbed.tokens)

    # Stopped once more, before the journal had it: only copying is left to do.
    finished = launch.run(job, settings)
    assert (finished.seconds, finished.seconds_before) == (trained.seconds, trained.seconds)
    assert (finished.peak_bytes, finished.curve) == (7, trained.curve)


def test_an_optimizer_on_other_parameters_does_not_begin() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    arguments = SimpleNamespace(deepspeed_plugin=None)
    for held in (model, other):
        optimizer = torch.optim.SGD(held.parameters(), lr=1.0)
        with nullcontext() if held is model else pytest.raises(ValuesError, match="other parameters than those"):
            OptimizerCheck().on_train_begin(arguments, None, None, model=model, optimizer=optimizer)


class Elsewhere(Float32AdamW):
    """An optimizer of parameters that the model has not, as after accelerate has replaced them."""

    def __init__(self, params: object, lr: float, **_: object) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], lr)


def test_training_with_such_an_optimizer_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", Task(rules=2, prime=5), family="llama")
    (tmp_path / "d.jsonl").write_text('{"text": "1 2 3"}\n' * 4)
    monkeypatch.setattr("fp4conv.qat.train.Float32AdamW", Elsewhere)
    with pytest.raises(ValuesError, match="other parameters than those"):
        train(
            Job("sft", str(tmp_path / "model"), str(tmp_path / "sft")),
            settings_from({"dataset": str(tmp_path / "d.jsonl")}),
        )


def test_the_loss_of_a_row_with_a_prompt_is_over_its_completion_alone(tmp_path: Path) -> None:
    """Rows that are all the same, so that the first loss is known: the mean over completion and end."""
    task = Task(rules=2, prime=7)
    write_model(tmp_path / "model", task, family="llama")
    row = {"prompt": "rule1 3 w2 w5", "completion": " 4 6"}
    (tmp_path / "d.jsonl").write_text((json.dumps(row) + "\n") * 8)
    words = {"dataset": str(tmp_path / "d.jsonl"), "dtype": "float32", "sft_max_steps": 1}
    trained = train(Job("sft", str(tmp_path / "model"), str(tmp_path / "sft")), settings_from(words))
    tokenizer = tokenizer_for(task.words())
    start = tokenizer(row["prompt"])["input_ids"]
    rest = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([start + rest])).logits[0, len(start) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(rest))
    assert trained.curve[0][1] == pytest.approx(float(expected), rel=1e-4)
