"""A model as a tuple of lazy weights: what each tensor is and where its bits lie, before any is read.

Owns `Weight`, `Model`, the values a weight can have, and the `Source` Protocol that they are parsed
from. It refuses to own names on disk (`layouts/`) and the choice of what to do (`plan.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

from fp4conv.deltas import Delta, LowRank
from fp4conv.families import Family, Role
from fp4conv.formats import BLOCK_FORMATS, DENSE_FORMATS, BlockFormat, MergeRounding
from fp4conv.safetensors_io import Reader, TensorRef

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

FLOAT_DTYPES = tuple(name.upper() for name in DENSE_FORMATS)
FP8 = "fp8"  # format_name of a BlockScaled weight


class SourceFile(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def weights(self) -> bool: ...


@dataclass(frozen=True)
class RemoteFile:
    """Size of a file on the Hub, and the SHA-256 of its bytes where the Hub knows it (large files)."""

    nbytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Pinned:
    """A folder of a repository on the Hub at one commit.

    `revision`: the branch, tag or commit that was asked for. `folder` is '' or a path without slashes at its ends.
    `files`: name within the folder -> what the Hub says of it.
    """

    repo: str
    commit: str
    revision: str
    folder: str
    files: Mapping[str, RemoteFile]

    @property
    def asked(self) -> str:
        """What was asked for: repository@revision."""
        return f"{self.repo}@{self.revision}"

    def path(self, name: str) -> str:
        """The file's path in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


class Source(Protocol):
    """A checkpoint to read from: a local folder, or a repository on the Hub, which then is `pinned` to a commit."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> Path: ...
    @property
    def pinned(self) -> Pinned | None: ...
    @property
    def tensors(self) -> Mapping[str, TensorRef]: ...
    @property
    def files(self) -> tuple[SourceFile, ...]: ...
    @property
    def folders(self) -> tuple[str, ...]: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...
    def json(self, name: str) -> dict[str, JSON] | None: ...
    def read_bytes(self, name: str, limit: int = ...) -> bytes: ...
    def reader(self) -> Reader: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Stored:
    """A dense tensor as it lies on disk."""

    ref: TensorRef

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.ref,)


@dataclass(frozen=True)
class Decoded:
    """A weight in a block format: its codes and scales as they lie on disk.

    `packed` holds K/2 bytes a row, `block_scale` K/block bytes a row; both row-major over N, or over K
    when `kn` (ModelOpt's 3-D experts). `tensor_scale` is the F32 scalar of NVFP4. `block` is the length
    that the stored scales imply: 32 for MXFP4, 16 or (ModelOpt's weight-only recipes) 32 for NVFP4.
    `inverse`: `tensor_scale`, and the input scale that goes with it, are stored as reciprocals
    (compressed-tensors' global scales), and a value is code x F32(block scale / stored scalar).
    """

    format_name: str
    block: int
    packed: TensorRef
    block_scale: TensorRef
    tensor_scale: TensorRef | None = None
    kn: bool = False
    inverse: bool = False

    @property
    def format(self) -> BlockFormat:
        return BLOCK_FORMATS[self.format_name]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        parts = (self.packed, self.block_scale, self.tensor_scale)
        return tuple(part for part in parts if part is not None)


@dataclass(frozen=True)
class BlockScaled:
    """A linear layer in FP8: `values` F8_E4M3 [N, K] and one `scale`, F32 or BF16, a tile of `block` = (rows, columns).

    A value is F32(code x scale); the last tile of a row or column may be cut short. Read only, never written.
    """

    values: TensorRef
    scale: TensorRef
    block: tuple[int, int]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return (self.values, self.scale)


OnDisk: TypeAlias = Stored | Decoded | BlockScaled


@dataclass(frozen=True)
class LoraMerged:
    """A weight with adapters merged into it, one delta after the other; without deltas, one that an adapter replaces.

    `base` is what lies on disk beneath. `dtype` is that of the weight in a dense checkpoint, to which `rounding` may
    round between; a block format's is BF16, as models are trained on it. `beside`: training quantised the base alone
    and ran the adapter beside it, Q(W) x + B A x, so that no merged weight has the values of its forward pass.
    """

    base: OnDisk
    deltas: tuple[Delta, ...]
    rounding: MergeRounding
    dtype: str
    beside: bool = False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return self.base.refs

    @property
    def delta_refs(self) -> tuple[TensorRef, ...]:
        """Every tensor of an adapter that the deltas take."""
        return tuple(ref for delta in self.deltas for ref in delta.refs)

    @property
    def by_rows(self) -> bool:
        """Whether it takes whole rows to compute; else it is value by value."""
        return any(isinstance(delta, LowRank) for delta in self.deltas)


@dataclass(frozen=True)
class Adapter:
    """An adapter that was merged. `trained`: its folder has the state of quantisation-aware training.

    `pinned`: where on the Hub its files are, which then have to be under `root` before they are read.
    """

    name: str
    root: Path
    fingerprint: str
    trained: bool
    pinned: Pinned | None = None


@dataclass(frozen=True)
class Weight:
    """One tensor of the model, under the name and shape that the HF BF16 checkpoint gives it.

    `kn`: that shape is [..., K, N] (the 3-D experts of gpt-oss) rather than [..., N, K].
    """

    name: str
    module: str
    role: Role
    shape: tuple[int, ...]
    value: OnDisk | LoraMerged
    kn: bool = False

    @property
    def base(self) -> OnDisk:
        """What lies on disk, beneath adapters."""
        return self.value.base if isinstance(self.value, LoraMerged) else self.value

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """How many [N, K] matrices there are: the experts of a 3-D parameter, else 1."""
        return math.prod(self.shape[:-2])

    @property
    def n(self) -> int:
        return self.shape[-1] if self.kn else self.shape[-2]

    @property
    def k(self) -> int:
        return self.shape[-2] if self.kn else self.shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(ref.spec.nbytes for ref in self.value.refs)

    @property
    def format_name(self) -> str:
        match self.base:
            case Decoded(format_name=name):
                return name
            case BlockScaled():
                return FP8
            case Stored(ref=ref):
                return ref.spec.dtype.lower()

    @property
    def has_matrix(self) -> bool:
        """Floating-point values of two axes or more: what a server may ask about, whether or not a codec takes it."""
        return not isinstance(self.base, Stored) or (
            len(self.shape) >= 2
            and not self.name.endswith("bias")  # experts have biases of two axes
            and self.base.ref.spec.dtype in (*FLOAT_DTYPES, "F64")
        )

    @property
    def is_matrix(self) -> bool:
        """A weight that a block format could hold: a linear layer's, or an expert parameter's."""
        if not isinstance(self.base, Stored):
            return True
        if self.base.ref.spec.dtype not in FLOAT_DTYPES or not self.elements:
            return False
        linear = len(self.shape) == 2 and self.name.endswith(".weight")
        return linear or (len(self.shape) == 3 and self.role is Role.EXPERT)


@dataclass(frozen=True)
class Trained:
    """How the forward pass of quantisation-aware training saw a weight.

    `amax`, `input_amax`: scalars that calibration froze (NVFP4); None where scales follow from the values (MXFP4)
    or inputs were not quantised.
    """

    format_name: str
    amax: TensorRef | None = None
    input_amax: TensorRef | None = None


@dataclass(frozen=True)
class Model:
    """A parsed checkpoint. `calibration`: scale tensors that belong to activations (input_scale, k_scale, v_scale).

    `trained`: weight name -> how training quantised it; `trained_kv`: name of an FP8 KV scale -> its amax.
    """

    source: Source
    family: Family
    layout: str
    weights: tuple[Weight, ...]
    config: Mapping[str, JSON]
    calibration: Mapping[str, TensorRef] = field(default_factory=dict)
    trained: Mapping[str, Trained] = field(default_factory=dict)
    trained_kv: Mapping[str, TensorRef] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()

    @property
    def format_name(self) -> str:
        """The block format of its quantised weights, or the dense dtype of most bytes: 'mxfp4', 'bf16'."""
        quantized = {weight.format_name for weight in self.weights if not isinstance(weight.base, Stored)}
        return "+".join(sorted(quantized)) if quantized else self.main_dtype.lower()

    @cached_property
    def main_dtype(self) -> str:
        """The floating dtype that most dense bytes have; BF16 when there are none."""
        sizes = dict.fromkeys(FLOAT_DTYPES, 0)
        for weight in self.weights:
            if isinstance(weight.base, Stored) and weight.base.ref.spec.dtype in sizes:
                sizes[weight.base.ref.spec.dtype] += weight.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def pins(self) -> dict[str, str]:
        """Repository@revision -> commit, of the source and of adapters that come from the Hub."""
        places = (self.source.pinned, *(adapter.pinned for adapter in self.adapters))
        return {place.asked: place.commit for place in places if place is not None}

    @property
    def parameters(self) -> int:
        return sum(weight.elements for weight in self.weights)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights) + sum(ref.spec.nbytes for ref in self.calibration.values())
