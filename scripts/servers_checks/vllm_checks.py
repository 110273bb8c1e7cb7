"""vLLM: the same tokens from checkpoints that must mean the same, every byte in its place, and the planted faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from servers_checks import placement, vllm_engine
from servers_checks.checkpoints import Checkpoints
from servers_checks.results import Row
from servers_checks.vllm_engine import Outcome


@dataclass(frozen=True)
class Pair:
    """Two checkpoints that must mean the same: one of ours, and one of ours or (`theirs`) of another tool.

    With `rounded` a tensor scale went through its reciprocal, and log-probabilities may differ in their last places.
    """

    what: str
    ours: str
    other: str
    theirs: bool = False
    rounded: bool = False


PAIRS = (
    Pair("our BF16 of gpt-oss MXFP4, and the MXFP4", "gptoss-bf16", "gptoss-mxfp4", theirs=True),
    Pair("our BF16 of gpt-oss MXFP4, and transformers'", "gptoss-bf16", "gptoss-bf16-from-mxfp4", theirs=True),
    Pair("our MXFP4 of gpt-oss QAT, and its BF16 decoding", "gptoss-mxfp4", "gptoss-mxfp4-bf16"),
    Pair(
        "our W4A4 NVFP4 of Llama QAT, and ModelOpt's", "llama-nvfp4-w4a4", "llama-nvfp4-from-qat-default", theirs=True
    ),
    Pair("the same as compressed-tensors, and as ModelOpt", "llama-nvfp4-w4a4-ct", "llama-nvfp4-w4a4", rounded=True),
    Pair("our W4A16 NVFP4 Llama, in both layouts", "llama-nvfp4-w4a16-ct", "llama-nvfp4-w4a16", rounded=True),
    Pair("our MXFP4 Llama (compressed-tensors), and its BF16 decoding", "llama-mxfp4", "llama-mxfp4-bf16"),
    Pair("our NVFP4 of that MXFP4, and the MXFP4", "llama-mxfp4-nvfp4", "llama-mxfp4"),
    Pair(
        "W4A4 NVFP4 Qwen3-MoE as compressed-tensors, and ModelOpt's",
        "qwen3moe-nvfp4-w4a4-ct",
        "qwen3moe-nvfp4-default",
        theirs=True,
        rounded=True,
    ),
    Pair("our W4A16 NVFP4 Qwen3-MoE, in both layouts", "qwen3moe-nvfp4-w4a16-ct", "qwen3moe-nvfp4-w4a16", rounded=True),
    Pair("our MXFP4 Qwen3-MoE, and its BF16 decoding", "qwen3moe-mxfp4", "qwen3moe-mxfp4-bf16"),
)
LOADS = (
    "gptoss-bf16",
    "gptoss-mxfp4",
    "llama-nvfp4-w4a4",
    "llama-nvfp4-w4a4-ct",
    "llama-nvfp4-w4a16",
    "llama-nvfp4-w4a16-ct",
    "llama-mxfp4",
    "llama-mxfp4-nvfp4",
    "qwen3moe-nvfp4-w4a4-ct",
    "qwen3moe-nvfp4-w4a16",
    "qwen3moe-nvfp4-w4a16-ct",
    "qwen3moe-mxfp4",
    "qwen3moe-sparse-nvfp4-w4a16",
)
REFUSED = {
    "gptoss-nvfp4": "_bias'",
    "gptoss-original": "Should have a `model_type` key",
    "gptoss-mxfp4-in-part": "must match the size",
}
ROUNDED = 0.01  # log-probabilities that a reciprocal's rounding may move


@dataclass
class Server:
    """vLLM, and what it generated so far: a checkpoint is run once."""

    version: str
    _generated: dict[Path, Outcome] = field(default_factory=dict)

    def generated(self, folder: Path) -> Outcome:
        if folder not in self._generated:
            self._generated[folder] = vllm_engine.generate(folder)
        return self._generated[folder]

    def row(self, what: str, result: str, ok: bool) -> Row:
        return Row("vLLM", self.version, what, result, ok)

    def same(self, pair: Pair, ours: Path, other: Path) -> Row:
        one, two = self.generated(ours), self.generated(other)
        what = f"generation: {pair.what}"
        for outcome in (one, two):
            if outcome.error:
                return self.row(what, f"{outcome.error} ({outcome.where})", False)
        count = sum(len(row) for row in one.tokens)
        if one.tokens != two.tokens:
            return self.row(what, f"other tokens: {_shared(one, two)} of {count} the same", False)
        apart = _apart(one, two)
        words = f"the same {count} tokens, log-probabilities " + ("equal" if not apart else f"{apart:.1e} apart")
        return self.row(what, words, apart <= (ROUNDED if pair.rounded else 0))

    def loads(self, name: str, folder: Path) -> Row:
        outcome = vllm_engine.load(folder)
        what = f"load_weights of our {name}"
        if outcome.error:
            return self.row(what, f"{outcome.error} ({outcome.where})", False)
        placed = placement.compare(folder, outcome.parameters, placement.VLLM)
        return self.row(what, str(placed), not placed.wrong)

    def refuses(self, name: str, folder: Path, words: str) -> Row:
        outcome = vllm_engine.load(folder)
        what = f"our {name}, which the table says it refuses"
        return self.row(what, outcome.error or "loads", words in outcome.error)

    def sees_a_changed_byte(self, folder: Path, changed: Path) -> Row:
        placed = placement.compare(folder, vllm_engine.load(changed).parameters, placement.VLLM)
        what = "control: one byte of llama-nvfp4-w4a4 changed"
        return self.row(what, f"{placed}: the comparison sees it", len(placed.wrong) == 1)

    def sees_a_changed_model(self, folder: Path, other: Path) -> Row:
        one, two = self.generated(folder), self.generated(other)
        shared, count = _shared(one, two), sum(len(row) for row in one.tokens)
        what = "control: llama-bf16 and our MXFP4 of it"
        return self.row(what, f"{shared} of {count} tokens the same: the comparison sees it", shared < count)


def checks(server: Server, checkpoints: Checkpoints, changed: Path) -> Iterator[Row]:
    """`changed`: our llama-nvfp4-w4a4 with one byte of a weight changed."""
    for pair in PAIRS:
        other = checkpoints.theirs(pair.other) if pair.theirs else checkpoints.ours(pair.other)
        yield server.same(pair, checkpoints.ours(pair.ours), other)
    for name in LOADS:
        yield server.loads(name, checkpoints.ours(name))
    for name, words in REFUSED.items():
        yield server.refuses(name, checkpoints.ours(name), words)
    yield server.sees_a_changed_byte(checkpoints.ours("llama-nvfp4-w4a4"), changed)
    yield server.sees_a_changed_model(checkpoints.theirs("llama-bf16"), checkpoints.ours("llama-mxfp4"))


def _shared(one: Outcome, two: Outcome) -> int:
    pairs = zip(one.tokens, two.tokens, strict=False)
    return sum(a == b for row, other in pairs for a, b in zip(row, other, strict=False))


def _apart(one: Outcome, two: Outcome) -> float:
    pairs = zip(one.logprobs, two.logprobs, strict=True)
    return max(abs(a - b) for row, other in pairs for a, b in zip(row, other, strict=True))
