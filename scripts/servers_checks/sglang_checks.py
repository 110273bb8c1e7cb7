"""SGLang: its config parsers, its choice of layers and its `load_weights`, on each kind of result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from servers_checks import placement, sglang_engine
from servers_checks.checkpoints import Checkpoints
from servers_checks.results import Row

LOADS = {  # what, and the class that reads its config
    "gptoss-bf16": "none",
    "gptoss-mxfp4": "Mxfp4Config",
    "llama-mxfp4-bf16": "none",
    "llama-nvfp4-w4a4": "ModelOptFp4Config",
    "llama-nvfp4-w4a4-ct": "CompressedTensorsConfig",
    "llama-nvfp4-w4a16": "ModelOptFp4Config",
    "llama-nvfp4-w4a16-ct": "CompressedTensorsConfig",
    "llama-mxfp4-nvfp4": "ModelOptFp4Config",
    "qwen3moe-sparse-bf16": "none",
    "qwen3moe-sparse-nvfp4-w4a16": "ModelOptFp4Config",
    "qwen3moe-sparse-nvfp4-w4a16-ct": "CompressedTensorsConfig",
}
REFUSED = {
    "gptoss-nvfp4": "Expected 2D tensors",
    "gptoss-original": "Should have a `model_type` key",
    "llama-mxfp4": "No compressed-tensors compatible scheme was found",
    "qwen3moe-mxfp4": "No compressed-tensors compatible scheme was found",
}


@dataclass(frozen=True)
class _Reader:
    version: str

    def row(self, what: str, result: str, ok: bool) -> Row:
        return Row("SGLang", self.version, what, result, ok)

    def loads(self, name: str, folder: Path, reader: str) -> Row:
        found = sglang_engine.load(folder)
        what = f"load_weights of our {name}"
        if found.error:
            return self.row(what, f"{found.error} ({found.where})", False)
        placed = placement.compare(folder, found.parameters, placement.SGLANG)
        return self.row(what, f"read by {found.reader}; {placed}", not placed.wrong and found.reader == reader)

    def refuses(self, name: str, folder: Path, words: str) -> Row:
        found = sglang_engine.load(folder)
        return self.row(f"our {name}, which the table says it refuses", found.error or "loads", words in found.error)

    def drops_dense_layers(self, folder: Path) -> Row:
        """A finding about SGLang, whatever wrote the checkpoint: it is not told about `mlp_only_layers`."""
        found = sglang_engine.load(folder)
        placed = placement.compare(folder, found.parameters, placement.SGLANG)
        result = f"no error, and the layer's MLP is dropped: {placed}"
        return self.row("a Qwen3-MoE with a dense layer (mlp_only_layers), as published in BF16", result,
                        not found.error and any("layers.0.mlp" in line for line in placed.wrong))  # fmt: skip

    def passes_dense_experts_over(self, folder: Path) -> Row:
        """Experts of one layer in BF16 beside MXFP4, which the table says go wrong in silence."""
        found = sglang_engine.load(folder)
        placed = placement.compare(folder, found.parameters, placement.SGLANG)
        result = f"no error, and the dense experts are passed over: {placed}"
        return self.row("our gptoss-mxfp4-in-part, with the experts of layer 0 in BF16", result,
                        not found.error and all("layers.0.mlp.experts" in line for line in placed.wrong)
                        and bool(placed.wrong))  # fmt: skip

    def control(self, folder: Path, changed: Path) -> Row:
        found = sglang_engine.load(changed)
        placed = placement.compare(folder, found.parameters, placement.SGLANG)
        what = "control: one byte of llama-nvfp4-w4a4 changed"
        return self.row(what, f"{placed}: the comparison sees it", len(placed.wrong) == 1)


def checks(checkpoints: Checkpoints, changed: Path) -> Iterator[Row]:
    """`changed`: our llama-nvfp4-w4a4 with one byte of a weight changed."""
    reader = _Reader(sglang_engine.prepare())
    for name, config in LOADS.items():
        yield reader.loads(name, checkpoints.ours(name), config)
    for name, words in REFUSED.items():
        yield reader.refuses(name, checkpoints.ours(name), words)
    yield reader.drops_dense_layers(checkpoints.theirs("qwen3moe-bf16"))
    yield reader.passes_dense_experts_over(checkpoints.ours("gptoss-mxfp4-in-part"))
    yield reader.control(checkpoints.ours("llama-nvfp4-w4a4"), changed)
