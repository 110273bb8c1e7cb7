"""How a model is judged: the loss beside torch's own, and right answers counted as right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from fp4conv.qat.backend import Recipe, open_backend
from fp4conv.qat.data import Example, load_data
from fp4conv.qat.evaluate import answerable, evaluate
from fp4conv.qat.made import Task, tokenizer_for, write_model
from fp4conv.qat.settings import settings_from

WORDS = [*map(str, range(50)), "rule1"]
TOKENIZER = tokenizer_for(WORDS)


def example(prompt: str, answer: str) -> Example:
    start = TOKENIZER(prompt)["input_ids"]
    rest = TOKENIZER(answer, add_special_tokens=False)["input_ids"]
    return Example((*start, *rest, TOKENIZER.eos_token_id), len(start), answered=True)


class Scripted:
    """Says what it was told to after each prompt, as `generate` does; its logits are all the same."""

    device = torch.device("cpu")

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.generation_config = GenerationConfig(eos_token_id=[5, 7], repetition_penalty=1.3)

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


def test_tags_in_an_answer_that_decoding_leaves_out_do_not_fail_it(tmp_path: Path) -> None:
    """Chats written out as text have them: gpt-oss's channels are special tokens."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "9", "completion": " 7 <s> 12"}\n' * 2)
    test = load_data(settings_from({"dataset": str(tmp_path / "d.jsonl")}), TOKENIZER).test
    assert evaluate(Scripted({"9": "7 <s> 12"}), TOKENIZER, test, settings_from({})).passed == 1
    assert evaluate(Scripted({"9": "7 <s> 13"}), TOKENIZER, test, settings_from({})).passed == 0


def test_no_words_are_no_right_answer() -> None:
    test = (example("9", "not known"),)  # decoding leaves out what stands for unknown words
    assert evaluate(Scripted({"9": ""}), TOKENIZER, test, settings_from({})).passed == 0


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


def test_generation_ends_at_the_ends_of_model_and_tokenizer_and_penalises_nothing() -> None:
    model = Scripted({"9": "1"})
    evaluate(model, TOKENIZER, (example("9", "1"),), settings_from({}))
    assert model.generation_config.eos_token_id == sorted({5, 7, TOKENIZER.eos_token_id})
    assert model.generation_config.repetition_penalty in (None, 1.0)


def test_only_whole_answers_to_whole_prompts_are_asked_for() -> None:
    whole = example("rule1 3", "7 12")
    cut, empty = replace(whole, ids=whole.ids[: whole.start]), Example(whole.ids, 0, answered=True)
    examples = (whole, cut, empty, replace(whole, answered=False), example("9", "1 2 3 4"))
    assert answerable(examples, settings_from({"max_new_tokens": 4})) == [whole]
    score = evaluate(Scripted({"rule1 3": "7 12"}), TOKENIZER, examples, settings_from({"max_new_tokens": 4}))
    assert (score.passed, score.asked) == (1, 1)


@pytest.mark.parametrize("family", ["gpt-oss", "llama"])
def test_answers_in_batches_are_those_of_the_largest_logit_one_by_one(tmp_path: Path, family: str) -> None:
    """Prompts of all lengths, a cache and fake quantisers, against a loop without padding or cache."""
    task = Task(rules=2, prime=11)
    write_model(tmp_path / "model", task, family=family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data *= 8  # else the largest logit is near the next
    model.generation_config.repetition_penalty = 3.0
    open_backend("fp4conv").prepare(model, Recipe("mxfp4"))
    model.eval()
    tokenizer, settings = tokenizer_for(task.words()), settings_from({"max_new_tokens": 5, "eval_batch_size": 4})
    examples = []
    for number in range(6):
        prompt = tokenizer("rule1 " + " ".join(map(str, range(number))))["input_ids"]
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 5 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True):
            examples.append(Example(tuple(ids), len(prompt), answered=True))
    score = evaluate(model, tokenizer, examples, settings)
    assert score.passed == score.asked == len(examples) >= 5
    some, other = tokenizer("3 4", add_special_tokens=False)["input_ids"]
    wrong = [replace(each, ids=(*each.ids[:-1], other if each.ids[-1] == some else some)) for each in examples]
    assert evaluate(model, tokenizer, wrong, settings).passed == 0
