"""What the servers are given: reference checkpoints that other tools wrote, and what fp4conv makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fp4conv
from fp4conv.synthetic import write_checkpoint


@dataclass(frozen=True)
class Made:
    """A conversion: of the reference checkpoint, or (`of_made`) of another conversion, named `source`."""

    name: str
    source: str
    to: str
    layout: str | None = None
    of_made: bool = False
    exclude: tuple[str, ...] = ()


CT = "compressed-tensors"
MADE = (
    Made("gptoss-bf16", "gptoss-mxfp4", "bf16"),
    Made("gptoss-mxfp4", "gptoss-qat-fakequant-mxfp4", "mxfp4"),
    Made("gptoss-mxfp4-bf16", "gptoss-mxfp4", "bf16", of_made=True),
    Made("gptoss-original", "gptoss-mxfp4", "mxfp4", "openai-original"),
    Made("gptoss-nvfp4", "gptoss-bf16", "nvfp4"),
    Made("gptoss-mxfp4-in-part", "gptoss-layers-bf16", "mxfp4", of_made=True, exclude=("model.layers.0.*",)),
    Made("llama-nvfp4-w4a4", "llama-qat-fakequant-nvfp4-default", "nvfp4"),
    Made("llama-nvfp4-w4a4-ct", "llama-nvfp4-w4a4", "nvfp4", CT, of_made=True),
    Made("llama-nvfp4-w4a16", "llama-bf16", "nvfp4"),
    Made("llama-nvfp4-w4a16-ct", "llama-nvfp4-w4a16", "nvfp4", CT, of_made=True),
    Made("llama-mxfp4", "llama-bf16", "mxfp4"),
    Made("llama-mxfp4-bf16", "llama-mxfp4", "bf16", of_made=True),
    Made("llama-mxfp4-nvfp4", "llama-mxfp4", "nvfp4", of_made=True),
    Made("qwen3moe-nvfp4-w4a4-ct", "qwen3moe-nvfp4-default", "nvfp4", CT),
    Made("qwen3moe-nvfp4-w4a16", "qwen3moe-bf16", "nvfp4"),
    Made("qwen3moe-nvfp4-w4a16-ct", "qwen3moe-nvfp4-w4a16", "nvfp4", CT, of_made=True),
    Made("qwen3moe-mxfp4", "qwen3moe-bf16", "mxfp4"),
    Made("qwen3moe-mxfp4-bf16", "qwen3moe-mxfp4", "bf16", of_made=True),
    # Experts in every layer, as published Qwen3-MoE models have them; the reference one has a dense first layer.
    Made("qwen3moe-sparse-nvfp4-w4a16", "qwen3moe-sparse-bf16", "nvfp4", of_made=True),
    Made("qwen3moe-sparse-nvfp4-w4a16-ct", "qwen3moe-sparse-nvfp4-w4a16", "nvfp4", CT, of_made=True),
)


@dataclass(frozen=True)
class Checkpoints:
    """Folders by name: `reference` holds other tools' checkpoints, `scratch` gets ours."""

    reference: Path
    scratch: Path

    def theirs(self, name: str) -> Path:
        return self.reference / name

    def ours(self, name: str) -> Path:
        return self.scratch / name

    def make(self) -> None:
        write_checkpoint(self.ours("qwen3moe-sparse-bf16"), nbytes=5_000_000, family="qwen3-moe")
        write_checkpoint(self.ours("gptoss-layers-bf16"), nbytes=6_000_000, family="gpt-oss")
        for made in MADE:
            source = self.ours(made.source) if made.of_made else self.theirs(made.source)
            fp4conv.convert(source, self.ours(made.name), to=made.to, layout=made.layout, exclude=made.exclude)
