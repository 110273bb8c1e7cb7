"""A task with right answers that a tiny model learns in a minute, a tokenizer for it, and the tiny models themselves.

A rule names a step x -> a x + b modulo a prime. The prompt gives a rule and a start, the completion is the walk from
there: every number follows from the one before, so one wrong number anywhere fails the answer. Starts are held out,
rules are not. Which rules there are follows from the seed of the task, so that a model can be asked about them in
another run. To hold the table of all steps a small model needs much of its experts' precision: that is what makes it
a test of four bits.
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


@dataclass(frozen=True)
class Task:
    """`rules` rules on the numbers below `prime`, walks of `length` steps; every `held_out`-th start is kept back."""

    rules: int = 16
    prime: int = 61
    length: int = 12
    held_out: int = 10
    seed: int = 7

    def rows(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """(training rows, held-out rows), each with prompt and completion; shuffled."""
        source = random.Random(self.seed)
        made: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
        for rule in range(self.rules):
            a, b = source.randrange(2, self.prime), source.randrange(self.prime)
            for start in range(self.prime):
                walk = [start]
                for _ in range(self.length):
                    walk.append((a * walk[-1] + b) % self.prime)
                row = {"prompt": f"rule{rule} {start}", "completion": " " + " ".join(map(str, walk[1:]))}
                made[(start + rule) % self.held_out == 0].append(row)
        for rows in made:
            source.shuffle(rows)
        return made

    def words(self) -> list[str]:
        return [*map(str, range(self.prime)), *(f"rule{rule}" for rule in range(self.rules))]


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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Sequence([decoders.Replace("\n", " ")])
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
