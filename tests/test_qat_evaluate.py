"""How a model is judged: the loss beside torch's own, and right answers counted as right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM

from fp4conv.qat.data import Example
from fp4conv.qat.evaluate import evaluate
from fp4conv.qat.made import Task, tokenizer_for, write_model
from fp4conv.qat.settings import settings_from

WORDS = [*map(str, range(50)), "rule1"]
TOKENIZER = tokenizer_for(WORDS)


def example(prompt: str, answer: str) -> Example:
    start = TOKENIZER(prompt)["input_ids"]
    rest = TOKENIZER(answer, add_special_tokens=False)["input_ids"]
    return Example((*start, *rest, TOKENIZER.eos_token_id), len(start), f" {answer}")


class Scripted:
    """Says what it was told to after each prompt, as `generate` does; its logits are all the same."""

    device = torch.device("cpu")

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def eval(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(TOKENIZER)))

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object) -> torch.Tensor:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert not mask[: int((mask == 0).sum())].any(), "padded on the left"
            said = self.answers[TOKENIZER.decode(ids[mask.bool()], skip_special_tokens=True)]
            rows.append(
                [*ids.tolist(), *TOKENIZER(said, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
            )
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[TOKENIZER.pad_token_id] * (longest - len(row))] for row in rows])


@pytest.mark.parametrize(("said", "passed"), [("7 12", 2), ("7 21", 1), ("7", 1), ("7 12 12", 1), ("712", 1)], ids=str)
def test_an_answer_is_right_when_every_word_is(said: str, passed: int) -> None:
    test = (example("rule1 3 4", "7 12"), example("9", "1"))
    model = Scripted({"rule1 3 4": said, "9": "1"})
    score = evaluate(model, TOKENIZER, test, settings_from({"eval_batch_size": 2}))
    assert (score.passed, score.asked) == (passed, 2)
    assert score.loss == pytest.approx(float(torch.log(torch.tensor(len(TOKENIZER)))))
    assert score.tokens == 5


def test_the_loss_is_that_of_the_model_itself_one_by_one(tmp_path: Path) -> None:

    folder = tmp_path / "model"
    write_model(folder, Task(rules=2, prime=5))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    examples = tuple(Example(ids, start) for ids, start in (((1, 5, 6, 7, 2), 2), ((1, 8, 2), 0)))
    score = evaluate(model, TOKENIZER, examples, settings_from({}))
    total = count = 0.0
    for one in examples:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([one.ids])).logits[0].double().numpy()
        for place in range(max(1, one.start), len(one.ids)):
            total += np.log(np.exp(logits[place - 1]).sum()) - logits[place - 1, one.ids[place]]
            count += 1
    assert score.loss == pytest.approx(total / count, rel=1e-5)
