"""What a round-trip hint is, and where it lies: in the folder fp4conv/ beside the dense weights.

No loader looks there: those that glob for *.safetensors do so at the top of the folder, and the index never names
these files. Every size but that of `RECORDS` follows from headers; of that one `Kept` has the upper bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from fp4conv.formats import BLOCK_FORMATS, BlockFormat
from fp4conv.model import JSON
from fp4conv.safetensors_io import TensorRef

FOLDER = "fp4conv"
FACTS = f"{FOLDER}/hints.json"  # what there is, and the digests of the other two
PARTS = f"{FOLDER}/parts.safetensors"  # copies: NVFP4's scales, scales of activations
RECORDS = f"{FOLDER}/records.safetensors"  # block scales and codes that had to be noted, as many as there were
RECIPROCALS = f"{FOLDER}/reciprocals.json"  # of an NVFP4 result: scales as they were before they were turned over
LOG = f"{FOLDER}/records.log"  # the same while they are collected; never in a finished folder
FACTS_VERSION = 1
BESIDE = FOLDER + "/"  # keys of steps that copy no part of the model begin with it

# A sparse record of a block scale: its number and its byte.
INDEX_BYTES = 4
SPARSE_BYTES = INDEX_BYTES + 1


@dataclass(frozen=True)
class Hint:
    """How one weight was held before it was decoded to `dtype` ('BF16', 'F16' or 'F32').

    `block` values shared a scale. NVFP4: `block_scale` and `tensor_scale` are copies of what was stored, K-major when
    `kn`, a reciprocal when `inverse`. MXFP4: `scales` holds the bytes that are not implied; with `index` those of
    the blocks numbered there, rising, else a byte a block. Both: `codes` [C, block / 2] of the blocks in `code_index`,
    rising, whose values do not tell them. Blocks are numbered (matrix x N + n) x K / g + k / g, where g is 32 for
    MXFP4 and 16 for NVFP4, whatever its `block`.
    """

    format_name: str
    block: int
    dtype: str
    kn: bool = False
    inverse: bool = False
    block_scale: TensorRef | None = None
    tensor_scale: TensorRef | None = None
    scales: TensorRef | None = None
    index: TensorRef | None = None
    codes: TensorRef | None = None
    code_index: TensorRef | None = None

    @property
    def format(self) -> BlockFormat:
        return BLOCK_FORMATS[self.format_name]


@dataclass(frozen=True)
class HintFile:
    """A data file of hints: what FACTS says that it must be."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Hints:
    """The hints of a dense source that fit it. Empty where there are none.

    `weights`: weight name -> hint. `calibration`: scales of activations under the names that they had. `dense`:
    name -> dtype of every tensor that was dense before. `config_dtype`: what config.json said. `merged`: weights
    that were quantised as well, and have no hint because an adapter was merged into them. `inverse`: `calibration`
    holds reciprocals.
    """

    weights: Mapping[str, Hint] = field(default_factory=dict)
    calibration: Mapping[str, TensorRef] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    config_dtype: str | None = None
    merged: frozenset[str] = frozenset()
    files: tuple[HintFile, ...] = ()
    inverse: bool = False

    @property
    def selection(self) -> frozenset[str]:
        """Every weight that was quantised."""
        return frozenset(self.weights) | self.merged

    def __bool__(self) -> bool:
        return bool(self.weights or self.merged)


@dataclass(frozen=True)
class Kept:
    """The hints that a dense result will have. `weights`: keys of the steps that note records.

    `facts`: FACTS but for the digests. `record_bytes`: the most that noted block scales can take; `code_bytes`: the
    most that noted codes can, which is next to nothing unless scales are far outside the range of the dense type.
    """

    weights: Mapping[str, BlockFormat]
    facts: Mapping[str, JSON]
    record_bytes: int
    code_bytes: int


# ---- names of tensors in PARTS


def block_scale_name(weight: str) -> str:
    return f"{weight}.block_scale"


def tensor_scale_name(weight: str) -> str:
    return f"{weight}.tensor_scale"


def calibration_name(name: str) -> str:
    return f"calibration.{name}"


def facts_bytes(facts: Mapping[str, JSON]) -> bytes:
    """FACTS in its one spelling, of which `digest` is made."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
