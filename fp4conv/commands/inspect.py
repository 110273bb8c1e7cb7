"""`inspect`: what a checkpoint holds, from its headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fp4conv.layouts import parse
from fp4conv.model import JSON, Decoded, Model
from fp4conv.sources import open_source


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of the model. `bits_per_weight` counts codes and scales."""

    name: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    bits_per_weight: float
    role: str
    file: str


@dataclass(frozen=True)
class InspectResult:
    source: str
    format: str
    layout: str
    family: str
    parameters: int
    bytes: int
    tensors: tuple[TensorFacts, ...]
    warnings: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0

    def to_json(self) -> dict[str, JSON]:
        tensors: list[JSON] = [
            {
                "name": t.name,
                "format": t.format,
                "shape": list(t.shape),
                "bytes": t.bytes,
                "bits_per_weight": t.bits_per_weight,
                "role": t.role,
                "file": t.file,
            }
            for t in self.tensors
        ]
        return {
            "source": self.source,
            "format": self.format,
            "layout": self.layout,
            "family": self.family,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "tensors": tensors,
            "warnings": list(self.warnings),
        }


def inspect(source: str | Path) -> InspectResult:
    """Formats, shapes and sizes of every tensor in folder `source`. Reads headers and configs only."""
    return describe(parse(open_source(source)))


def describe(model: Model) -> InspectResult:
    tensors = tuple(
        TensorFacts(
            name=weight.name,
            format=_format_name(weight.value.format_name, weight.value.block)
            if isinstance(weight.value, Decoded)
            else weight.format_name,
            shape=weight.shape,
            bytes=weight.nbytes,
            bits_per_weight=8 * weight.nbytes / weight.elements if weight.elements else 0.0,
            role=weight.role.value,
            file=weight.value.refs[0].file,
        )
        for weight in model.weights
    )
    return InspectResult(
        source=model.source.name,
        format=model.format_name,
        layout=model.layout,
        family=model.family.name,
        parameters=model.parameters,
        bytes=model.nbytes,
        tensors=tensors,
        warnings=model.warnings,
    )


def _format_name(name: str, block: int) -> str:
    """'nvfp4', or with the block length where it is not the format's own: 'nvfp4 (block 32)'."""
    return f"{name} (block {block})" if (name, block) == ("nvfp4", 32) else name
