"""What a checkpoint holds, as values: from its headers, a row a tensor, and folded over layers that look the same."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fp4conv.model import JSON, Decoded, Model


@dataclass(frozen=True)
class ErrorFacts:
    """How far values are from those of a reference, in float64 over every value.

    `signal`, `noise`: sums of squares of the reference and of the difference; `dot`, `power`: sum of the products with
    the reference, and of the squares of the values themselves. Figures of several tensors add up.
    `max_rel_error`: largest |difference| / |reference| over values that are not zero in the reference.
    """

    values: int
    signal: float
    noise: float
    dot: float
    power: float
    max_abs_error: float
    max_rel_error: float

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise); +inf where nothing differs, -inf where noise stands against no signal."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def mse(self) -> float:
        return self.noise / self.values if self.values else 0.0

    @property
    def cosine(self) -> float:
        """1 for the same direction; 1 too where both are zero throughout."""
        if not self.noise:
            return 1.0
        scale = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.dot / scale if scale else 0.0


@dataclass(frozen=True)
class Estimate:
    """The error that a conversion to `format` by `rule` would make."""

    format: str
    rule: str
    error: ErrorFacts


@dataclass(frozen=True)
class ValueFacts:
    """What the values of one tensor are. `smallest`, `largest`: over finite values, None where there are none.

    For block formats: `codes` counts each of the 16 codes; `scales` has (exponent, blocks) for E8M0 and
    (E4M3 value, blocks) for NVFP4, rising; `saturated` counts blocks with a code of magnitude 6, `unused_range` those
    with values but none of magnitude 4 or 6: half the scale would have held them.
    """

    smallest: float | None
    largest: float | None
    zeros: int
    nan: int
    blocks: int = 0
    zero_blocks: int = 0
    saturated: int = 0
    unused_range: int = 0
    codes: tuple[int, ...] = ()
    scales: tuple[tuple[float, int], ...] = ()
    tensor_scale: float | None = None


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of the model. `bits_per_weight` counts codes and scales.

    `layer`: its number among the decoder layers. `kind`: what its module is called without layer and expert, 'q_proj'.
    `values`, `error` and `estimates` where values were read, against a reference, or for conversions to choose from.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    bits_per_weight: float
    role: str
    file: str
    count: int = 1  # how many tensors a folded row stands for
    layer: int | None = None
    kind: str = ""
    values: ValueFacts | None = None
    error: ErrorFacts | None = None
    estimates: tuple[Estimate, ...] = ()


@dataclass(frozen=True)
class Inspected:
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


def describe(model: Model) -> Inspected:
    tensors = tuple(
        TensorFacts(
            name=weight.name,
            format=_format_name(weight.base.format_name, weight.base.block)
            if isinstance(weight.base, Decoded)
            else weight.format_name,
            shape=weight.shape,
            bytes=weight.nbytes,
            bits_per_weight=8 * weight.nbytes / weight.elements if weight.elements else 0.0,
            role=weight.role.value,
            file=weight.value.refs[0].file,
        )
        for weight in model.weights
    )
    return Inspected(
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


_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")


def fold(tensors: Sequence[TensorFacts]) -> tuple[TensorFacts, ...]:
    """One row for tensors that differ in the numbers of layers and experts alone: 'layers.{0..35}.q_proj.weight'."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorFacts]] = {}
    for facts in tensors:
        groups.setdefault((_NUMBER.sub("*", facts.name), facts.format, facts.shape), []).append(facts)
    return tuple(_folded(members) for members in groups.values())


def _folded(members: Sequence[TensorFacts]) -> TensorFacts:
    if len(members) == 1:
        return members[0]
    numbers = [[int(n) for n in _NUMBER.findall(facts.name)] for facts in members]
    spans = iter([_span(sorted(set(column))) for column in zip(*numbers, strict=True)])
    name = _NUMBER.sub(lambda _: next(spans), members[0].name)
    return replace(members[0], name=name, bytes=sum(facts.bytes for facts in members), count=len(members))


def _span(numbers: Sequence[int]) -> str:
    """'7', '{0..35}', or '{0,2,..}' where there are gaps."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if last - first + 1 == len(numbers):
        return f"{{{first}..{last}}}"
    shown = ",".join(map(str, numbers[:3]))
    return f"{{{shown}{',..' if len(numbers) > 3 else ''}}}"
