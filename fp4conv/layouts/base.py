"""The Protocol that every on-disk convention implements, and the two values it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fp4conv.families import Family
from fp4conv.formats import BlockFormat
from fp4conv.layouts.parts import Part
from fp4conv.model import JSON, Source, Weight
from fp4conv.safetensors_io import TensorRef


@dataclass(frozen=True)
class Parsed:
    """`calibration`: every activation scale, by the name that ModelOpt gives it (input_scale, k_scale, v_scale).

    `config`: what Hugging Face's config.json would say, where the source's own says it otherwise.
    """

    weights: tuple[Weight, ...]
    calibration: Mapping[str, TensorRef] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    config: Mapping[str, JSON] | None = None


@dataclass(frozen=True)
class Written:
    """What a layout needs to know of a result to write its configs.

    `config`: the model's config.json without any quantisation. `quantized`, `unquantized`: modules of
    matrices, in natural order. `input_scales`: activations are quantised too (W4A4). `format_name`: 'mxfp4',
    'nvfp4', or a dense dtype in lower case. `parts`: every tensor, in natural order of the weights.
    """

    config: Mapping[str, JSON]
    quantized: tuple[str, ...]
    unquantized: tuple[str, ...]
    input_scales: bool
    kv_scales: bool
    version: str
    format_name: str
    parts: tuple[Part, ...] = ()


class Layout(Protocol):
    """One on-disk convention: how to tell it, read it, and write it."""

    @property
    def name(self) -> str: ...
    @property
    def formats(self) -> tuple[str, ...]:
        """The block formats that it can hold."""
        ...

    @property
    def kv_scales(self) -> bool:
        """Whether FP8 KV-cache scales have a place in it."""
        ...

    def recognises(self, source: Source) -> bool: ...
    def parse(self, source: Source, family: Family) -> Parsed: ...
    def refusal(self, weight: Weight, family: Family) -> str | None:
        """Why this layout cannot hold `weight` quantised, or None."""
        ...

    def place(self, weight: Weight, target: BlockFormat, input_scale: bool) -> tuple[Part, ...]: ...
    def place_dense(self, weight: Weight, dtype: str) -> Part: ...
    def config(self, written: Written) -> Mapping[str, JSON]:
        """File name -> JSON value of every config that this layout writes."""
        ...


def layer_count(source: Source) -> int | None:
    """num_hidden_layers of config.json (or of its text_config), which tells MTP layers from ordinary ones."""
    config = source.json("config.json") or {}
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    return found if type(found) is int and found > 0 else None  # type(): True is an int by isinstance
