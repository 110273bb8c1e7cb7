"""A task with right answers that a tiny model learns in a minute, a tokenizer for it, and the tiny models themselves.

A rule names a step x -> a x + b modulo a prime. The prompt gives a rule and a start, after words that mean nothing; the
completion is the walk from there: 'w3 w0 w7 rule5 12' -> '40 7 33'. Every number follows from the one before, so one
wrong number anywhere fails the answer. Held-out prompts have other words before a walk than training had: the task
asks how much a model holds, not how it generalises. To hold the table of all steps, a small model needs much of its
experts' precision, which makes it a test of four bits. The rules follow from the task's own seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

FAMILIES = ("gpt-oss", "llama", "qwen3-moe")
WORDS = tuple(f"w{number}" for number in range(8))


@dataclass(frozen=True)
class Task:
    """`rules` rules on the numbers below `prime`, walks of `length` steps, each after `fillers` words of WORDS.

    Each walk is in training `copies` times, after other words; `held_out` prompts more are kept back.
    """

    rules: int = 16
    prime: int = 61
    length: int = 12
    fillers: int = 3
    copies: int = 4
    held_out: int = 512
    seed: int = 7

    def rows(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """(training rows, held-out rows), each with prompt and completion; shuffled, and no prompt twice."""
        source = random.Random(self.seed)
        steps = [(source.randrange(2, self.prime), source.randrange(self.prime)) for _ in range(self.rules)]
        walks = [(rule, start) for rule in range(self.rules) for start in range(self.prime)]
        seen: set[str] = set()
        train = [self._row(walk, steps, source, seen) for _ in range(self.copies) for walk in walks]
        test = [self._row(source.choice(walks), steps, source, seen) for _ in range(self.held_out)]
        source.shuffle(train)
        return train, test

    def _row(
        self, walk: tuple[int, int], steps: Sequence[tuple[int, int]], source: random.Random, seen: set[str]
    ) -> dict[str, str]:
        rule, start = walk
        while (prompt := f"{' '.join(source.choices(WORDS, k=self.fillers))} rule{rule} {start}") in seen:
            pass
        seen.add(prompt)
        numbers = [start]
        for _ in range(self.length):
            numbers.append((steps[rule][0] * numbers[-1] + steps[rule][1]) % self.prime)
        return {"prompt": prompt, "completion": " " + " ".join(map(str, numbers[1:]))}

    def words(self) -> list[str]:
        return [*map(str, range(self.prime)), *(f"rule{rule}" for rule in range(self.rules)), *WORDS]


@dataclass(frozen=True)
class Size:
    """Of a tiny model. `hidden` and `intermediate` are whole blocks of 32."""

    hidden: int = 32
    intermediate: int = 32
    layers: int = 2
    experts: int = 4
    active: int = 2
    heads: int = 4
    head_dim: int = 16


def write_task(folder: Path, task: Task) -> None:
    """Write `train.jsonl` and `test.jsonl` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), task.rows(), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokenizer_for(words: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words, with <s>, </s> and <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_model(folder: Path, task: Task, *, family: str = "gpt-oss", size: Size | None = None, seed: int = 0) -> None:
    """Write a randomly initialised model of `family` with the task's tokenizer into `folder`, in BF16."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_for(task.words())
    torch.manual_seed(seed)
    config = _config(family, len(tokenizer), size or Size())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(family: str, vocabulary: int, size: Size) -> transformers.PreTrainedConfig:
    import transformers

    common = {
        "vocab_size": vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "head_dim": size.head_dim,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    experts = {"num_experts_per_tok": size.active, "router_aux_loss_coef": 0.0}
    if family == "gpt-oss":
        return transformers.GptOssConfig(
            **common,
            **experts,
            num_local_experts=size.experts,
            sliding_window=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    if family == "qwen3-moe":
        return transformers.Qwen3MoeConfig(
            **common, **experts, num_experts=size.experts, moe_intermediate_size=size.intermediate, norm_topk_prob=True
        )
    return transformers.LlamaConfig(**common)
