"""How good a model is: held-out loss, and the share of right answers by greedy generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp4conv.qat.data import IGNORED, Example

if TYPE_CHECKING:
    import transformers

    from fp4conv.qat.settings import Settings


@dataclass(frozen=True)
class Score:
    """`loss`: mean over the held-out tokens, in nats. `passed` of `asked` answers are right; None without answers."""

    loss: float
    tokens: int
    passed: int | None = None
    asked: int | None = None

    @property
    def pass_rate(self) -> float | None:
        return None if not self.asked or self.passed is None else self.passed / self.asked


def evaluate(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    test: Sequence[Example],
    settings: Settings,
) -> Score:
    """Loss over the labels of `test`, and answers where there are any. Leaves `model` in evaluation mode."""
    model.eval()
    asked = answerable(test, settings)
    with torch.inference_mode():
        loss, tokens = _held_out_loss(model, tokenizer, test, settings)
        if not asked:
            return Score(loss, tokens)
        model.generation_config = _greedy(model, tokenizer)
        passed = sum(_right(model, tokenizer, some, settings) for some in _chunks(asked, settings.eval_batch_size))
    return Score(loss, tokens, passed, len(asked))


def answerable(test: Sequence[Example], settings: Settings) -> list[Example]:
    """Examples whose prompt and whole answer are there, the answer within max_new_tokens."""
    return [
        example
        for example in test
        if example.answered and 0 < example.start < len(example.ids) <= example.start + settings.max_new_tokens
    ]


def _held_out_loss(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    test: Sequence[Example],
    settings: Settings,
) -> tuple[float, int]:
    total, count = 0.0, 0
    for batch in batches(test, settings.eval_batch_size, tokenizer.pad_token_id, model.device):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
        total += float(loss)
        count += int((labels != IGNORED).sum())
    return total / max(1, count), count


def batches(
    examples: Sequence[Example], size: int, pad: int, place: torch.device | str
) -> Iterator[dict[str, torch.Tensor]]:
    """Examples padded on the right: input_ids, attention_mask and labels, [B, T] each."""
    for some in _chunks(examples, size):
        longest = max(len(example.ids) for example in some)
        rows = [(longest - len(example.ids), example) for example in some]
        yield {
            "input_ids": torch.tensor([[*e.ids, *[pad] * short] for short, e in rows], device=place),
            "attention_mask": torch.tensor([[1] * len(e.ids) + [0] * short for short, e in rows], device=place),
            "labels": torch.tensor([e.labels + [IGNORED] * short for short, e in rows], device=place),
        }


def _greedy(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> transformers.GenerationConfig:
    """Greedy and nothing else: a checkpoint's own settings may penalise repetition, or suppress tokens."""
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends))


def _right(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: Settings,
) -> int:
    """How many of `examples` are answered right: the words that greedy generation gives are those of the answer."""
    prompts = [example.ids[: example.start] for example in examples]
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[*[pad] * (longest - len(p)), *p] for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    limit = min(settings.max_new_tokens, max(len(e.ids) - e.start for e in examples) + 1)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, use_cache=True)
    said = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    # Decoded as well: a tokenizer may write other words than it has read, and tags that it leaves out are no words.
    wanted = tokenizer.batch_decode([list(e.ids[e.start :]) for e in examples], skip_special_tokens=True)
    return sum(one.split() == other.split() != [] for one, other in zip(said, wanted, strict=True))


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (examples[start : start + size] for start in range(0, len(examples), size))
