"""What a checkpoint holds, as values: from its headers, a row a tensor, and folded over layers that look the same."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fp4conv.families import layer_of, module_of
from fp4conv.model import JSON, Decoded, Model
from fp4conv.report.folding import folded


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no Infinity: they are null."""
    return value if value is not None and math.isfinite(value) else None


def exact_sum(terms: Iterable[float]) -> float:
    """Rounded once, so that it does not depend on the order; NaN where it is beyond float64."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # ValueError: of Inf and -Inf
        return math.nan


@dataclass(frozen=True)
class ErrorFacts:
    """How far values are from those of a reference, in float64 over every pair that is finite on both sides.

    `signal`, `noise`: sums of squares of the reference and of the difference; `dot`, `power`: sum of the products with
    the reference, and of the squares of the values themselves. Figures of several tensors add up.
    `max_rel_error`: largest |difference| / |reference| over values that are not zero in the reference.
    `values` are those counted, `left_out` those that are NaN or Inf on a side, `left_out_differ` those of them that are
    not so on both. `differ`: how many values are not the same number, of all; -0.0 is 0.0, and NaN is NaN.
    """

    values: int
    signal: float
    noise: float
    dot: float
    power: float
    max_abs_error: float
    max_rel_error: float
    differ: int = 0
    left_out: int = 0
    left_out_differ: int = 0

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise); +inf where nothing differs, -inf where noise stands against no signal.

        NaN where squares are beyond float64, as those of values of 1e200 are.
        """
        if not self.noise:
            return math.inf
        if not (math.isfinite(self.signal) and math.isfinite(self.noise)):
            return math.nan
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def nearness(self) -> float:
        """The SQNR as something to sort by: what is no number comes first."""
        return -math.inf if math.isnan(self.sqnr_db) else self.sqnr_db

    @property
    def mse(self) -> float:
        return self.noise / self.values if self.values else 0.0

    @property
    def cosine(self) -> float:
        """1 for the same direction; 1 too where both are zero throughout."""
        if not self.noise:
            return 1.0
        scale = math.sqrt(self.signal) * math.sqrt(self.power)
        if not (math.isfinite(scale) and math.isfinite(self.dot)):
            return math.nan
        return min(1.0, max(-1.0, self.dot / scale)) if scale else 0.0

    def to_json(self) -> dict[str, JSON]:
        """dB and the rest; what is no number (nothing differs, no signal, squares beyond float64) is null."""
        return {
            "sqnr_db": finite(self.sqnr_db),
            "mse": finite(self.mse),
            "max_abs_error": finite(self.max_abs_error),
            "max_rel_error": finite(self.max_rel_error),
            "cosine": finite(self.cosine),
            "differ": self.differ,
            "left_out": self.left_out,
            "left_out_differ": self.left_out_differ,
        }


def add_errors(errors: Iterable[ErrorFacts]) -> ErrorFacts:
    """The figures of several tensors as those of one; in any order the same."""
    known = list(errors)
    return ErrorFacts(
        values=sum(e.values for e in known),
        signal=exact_sum(e.signal for e in known),
        noise=exact_sum(e.noise for e in known),
        dot=exact_sum(e.dot for e in known),
        power=exact_sum(e.power for e in known),
        max_abs_error=max((e.max_abs_error for e in known), default=0.0),
        max_rel_error=max((e.max_rel_error for e in known), default=0.0),
        differ=sum(e.differ for e in known),
        left_out=sum(e.left_out for e in known),
        left_out_differ=sum(e.left_out_differ for e in known),
    )


@dataclass(frozen=True)
class Estimate:
    """The error that a conversion to `format` by `rule` would make."""

    format: str
    rule: str
    error: ErrorFacts


@dataclass(frozen=True)
class ValueFacts:
    """What the values of one tensor are. `smallest`, `largest`: over finite values, None where there are none.
    `zeros`, `nan`: values that are zero, and that are NaN or Inf.

    For block formats: `codes` counts each of the 16 codes; `scales` has (exponent, blocks) for E8M0 and
    (E4M3 value, blocks) for NVFP4, rising, without NaN; `zero_blocks` counts blocks of nothing but zero codes,
    `saturated` those with a code of magnitude 6, `unused_range` those with values but none of magnitude 4 or 6: half
    the scale would have held them. `nan_scales`, `negative_scales`: blocks under such a scale, counted in none of these
    three; `dead_blocks`: with codes that are not zero under a scale that makes them zero.
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
    nan_scales: int = 0
    negative_scales: int = 0
    dead_blocks: int = 0

    def to_json(self) -> dict[str, JSON]:
        facts: dict[str, JSON] = {
            "smallest": self.smallest,
            "largest": self.largest,
            "zeros": self.zeros,
            "nan": self.nan,
        }
        if not self.codes:
            return facts
        return facts | {
            "blocks": self.blocks,
            "zero_blocks": self.zero_blocks,
            "saturated": self.saturated,
            "unused_range": self.unused_range,
            "nan_scales": self.nan_scales,
            "negative_scales": self.negative_scales,
            "dead_blocks": self.dead_blocks,
            "code_histogram": list(self.codes),
            "scale_histogram": [[value, count] for value, count in self.scales],
            "tensor_scale": finite(self.tensor_scale),
        }


def add_values(facts: Iterable[ValueFacts]) -> ValueFacts:
    """The figures of several tensors of one format as those of one; `tensor_scale` where they share it."""
    known = list(facts)
    scales: Counter[float] = Counter()
    for each in known:
        scales.update(dict(each.scales))
    shared = {each.tensor_scale for each in known}
    return ValueFacts(
        smallest=min((each.smallest for each in known if each.smallest is not None), default=None),
        largest=max((each.largest for each in known if each.largest is not None), default=None),
        zeros=sum(each.zeros for each in known),
        nan=sum(each.nan for each in known),
        blocks=sum(each.blocks for each in known),
        zero_blocks=sum(each.zero_blocks for each in known),
        saturated=sum(each.saturated for each in known),
        unused_range=sum(each.unused_range for each in known),
        codes=tuple(map(sum, zip(*(each.codes for each in known if each.codes), strict=True))),
        scales=tuple(sorted(scales.items())),
        tensor_scale=shared.pop() if len(shared) == 1 else None,
        nan_scales=sum(each.nan_scales for each in known),
        negative_scales=sum(each.negative_scales for each in known),
        dead_blocks=sum(each.dead_blocks for each in known),
    )


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

    def to_json(self) -> dict[str, JSON]:
        facts: dict[str, JSON] = {
            "name": self.name,
            "format": self.format,
            "shape": list(self.shape),
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "role": self.role,
            "layer": self.layer,
            "kind": self.kind,
            "file": self.file,
        }
        if self.values is not None:
            facts |= self.values.to_json()
        if self.error is not None:
            facts |= self.error.to_json()
        if self.estimates:
            facts["estimates"] = _estimates_json(self.estimates)
        return facts


def _estimates_json(estimates: Iterable[Estimate]) -> list[JSON]:
    return [{"format": each.format, "rule": each.rule, **each.error.to_json()} for each in estimates]


@dataclass(frozen=True)
class Inspected:
    """A checkpoint. `reference`: what its values were compared with.

    `only_in_source`, `only_in_reference`: names that the other side lacks. `shapes_apart`: (name, shape here, shape
    there) of tensors that both have in other shapes. `without_estimate`: for which formats there is none, and why.
    """

    source: str
    format: str
    layout: str
    family: str
    parameters: int
    bytes: int
    tensors: tuple[TensorFacts, ...]
    warnings: tuple[str, ...]
    reference: str | None = None
    only_in_source: tuple[str, ...] = ()
    only_in_reference: tuple[str, ...] = ()
    shapes_apart: tuple[tuple[str, str, str], ...] = ()
    without_estimate: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0

    @property
    def error(self) -> ErrorFacts | None:
        """Over all tensors that were compared; None where none was."""
        return error_of(self.tensors)

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """Over all tensors that a conversion would quantise, a format and rule each."""
        return estimates_of(self.tensors)

    def to_json(self) -> dict[str, JSON]:
        compared: dict[str, JSON] = {}
        if self.reference is not None:
            compared = {
                "reference": self.reference,
                "only_in_source": list(self.only_in_source),
                "only_in_reference": list(self.only_in_reference),
                "shapes_apart": [list(each) for each in self.shapes_apart],
            }
        if self.error is not None:
            compared["total"] = self.error.to_json()
            compared["layers"] = [
                {"layer": layer, **error.to_json()}
                for layer, members in by_layer(self.tensors)
                if (error := error_of(members)) is not None
            ]
        if self.estimates:
            compared["estimates"] = _estimates_json(self.estimates)
        return {
            "source": self.source,
            "format": self.format,
            "layout": self.layout,
            "family": self.family,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            **compared,
            "without_estimate": list(self.without_estimate),
            "tensors": [facts.to_json() for facts in self.tensors],
            "warnings": list(self.warnings),
        }


def error_of(tensors: Iterable[TensorFacts]) -> ErrorFacts | None:
    """The error over all of `tensors` that were compared; None where none was."""
    known = [facts.error for facts in tensors if facts.error is not None]
    return add_errors(known) if known else None


def estimates_of(tensors: Iterable[TensorFacts]) -> tuple[Estimate, ...]:
    """The estimates of all of `tensors` added up, a format and rule each."""
    found: dict[tuple[str, str], list[ErrorFacts]] = {}
    for facts in tensors:
        for each in facts.estimates:
            found.setdefault((each.format, each.rule), []).append(each.error)
    return tuple(Estimate(name, rule, add_errors(errors)) for (name, rule), errors in found.items())


def by_layer(tensors: Iterable[TensorFacts]) -> list[tuple[int | None, list[TensorFacts]]]:
    """The tensors of each layer in its order, those of none last."""
    found: dict[int | None, list[TensorFacts]] = {}
    for facts in tensors:
        found.setdefault(facts.layer, []).append(facts)
    return sorted(found.items(), key=lambda item: (item[0] is None, item[0] or 0))


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
            layer=layer_of(weight.module),
            kind=_kind(weight.name),
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


def _kind(name: str) -> str:
    """'q_proj' of 'model.layers.0.self_attn.q_proj.weight'; the last part that is no number."""
    parts = [part for part in module_of(name).split(".") if part and not part.isdigit()]
    return parts[-1] if parts else name


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
    values = [facts.values for facts in members if facts.values is not None]
    layers = {facts.layer for facts in members}
    return replace(
        members[0],
        name=folded([facts.name for facts in members], _NUMBER),
        bytes=sum(facts.bytes for facts in members),
        count=len(members),
        layer=layers.pop() if len(layers) == 1 else None,
        values=add_values(values) if values else None,
        error=error_of(members),
        estimates=estimates_of(members),
    )
