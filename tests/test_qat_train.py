"""One training run: the steps that it takes, and the learning rate of each, by the published schedule."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM

from fp4conv.errors import ValuesError
from fp4conv.qat import steps
from fp4conv.qat.adamw import Float32AdamW
from fp4conv.qat.made import Task, tokenizer_for, write_model
from fp4conv.qat.settings import settings_from
from fp4conv.qat.sharing import OptimizerCheck
from fp4conv.qat.train import CHECKPOINTS, Job, train

EXAMPLES, STEPS, WARM_UP = 24, 12, 3


def published(step: int, peak: float) -> float:
    """A line up to `peak` over the warm-up, then half a cosine down to a tenth of it."""
    if step < WARM_UP:
        return peak * step / WARM_UP
    progress = (step - WARM_UP) / (STEPS - WARM_UP)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


@pytest.mark.parametrize(("kind", "peak"), [("sft", 3e-4), ("qat", 7e-5)])
def test_steps_and_rates_are_those_of_the_settings(tmp_path: Path, kind: str, peak: float) -> None:
    task = Task(rules=2, prime=7, length=2)
    write_model(tmp_path / "model", task, family="llama")
    rows = [{"prompt": f"rule1 {i % 7}", "completion": f" {i % 5} {i % 3}"} for i in range(EXAMPLES)]
    (tmp_path / "data").mkdir()
    for split, some in (("train", rows), ("test", rows[:2])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = settings_from(
        {
            **{"dataset": str(tmp_path / "data"), "format": "mxfp4", "backend": "fp4conv"},
            **{"batch_size": 2, "gradient_accumulation": 3, "warmup": WARM_UP / STEPS, "logging_steps": 1},
            **{"sft_learning_rate": 3e-4, "qat_learning_rate": 7e-5, "sft_epochs": 3, "qat_epochs": 3},
            "save_steps": STEPS,
        }
    )
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
