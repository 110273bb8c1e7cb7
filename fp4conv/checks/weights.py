"""The weights of a source, whole or not: which parts of each are there, and do they fit together?

Like `layouts.parts.collect`, which stops at the first weight that is not whole; both go by the same tables of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fp4conv.families import Family, Role, module_of, role_of
from fp4conv.faults import Found, Kind
from fp4conv.formats import NVFP4
from fp4conv.layouts.parts import (
    BLOCK_SCALE,
    DENSE_SUFFIX,
    INPUT_SCALE,
    PACKED,
    TENSOR_SCALE,
    PartNames,
    looks_packed,
)
from fp4conv.safetensors_io import TensorRef

Shape = tuple[int, ...]
KV_SCALES = (".k_scale", ".v_scale")  # what names of an FP8 KV cache's scales end in
_WORDS = {PACKED: "codes", BLOCK_SCALE: "block scales", TENSOR_SCALE: "tensor scale", INPUT_SCALE: "input scale"}


@dataclass(frozen=True)
class Held:
    """A weight as it lies on disk. `name`, `shape`: those of the BF16 checkpoint, shape None where parts do not tell.

    `table`: how its parts are named, None for a dense tensor. `block`: the length that codes and scales imply.
    """

    name: str
    module: str
    role: Role
    parts: Mapping[str, TensorRef]
    table: PartNames | None = None
    shape: Shape | None = None
    block: int | None = None
    faults: tuple[Found, ...] = field(default=(), repr=False)

    @property
    def quantized(self) -> bool:
        return self.table is not None

    @property
    def format_name(self) -> str:
        return self.table.format.name if self.table else self.parts[PACKED].spec.dtype.lower()


def held_weights(
    tensors: Mapping[str, TensorRef], family: Family, tables: Sequence[PartNames], layers: int | None
) -> tuple[Held, ...]:
    """Every weight that `tensors` hold in whole or in part, quantised ones by `tables`; each with its own faults."""
    stems = _stems(tensors, tables)
    usual = _usual(tensors, tables)
    found: list[Held] = []
    used: set[str] = set()
    for stem, experts in stems:
        table = _table(tensors, stem, [table for table in tables if table.experts is experts], usual)
        weight = _assembled(tensors, stem, table, family, layers)
        found.append(weight)
        used |= {ref.name for ref in weight.parts.values()}
    for name, ref in tensors.items():
        if name not in used:
            module = module_of(name)
            found.append(Held(name, module, role_of(module, layers), {PACKED: ref}, shape=ref.spec.shape))
    return tuple(found)


def _stems(tensors: Mapping[str, TensorRef], tables: Sequence[PartNames]) -> list[tuple[str, bool]]:
    """(stem, whether it is of 3-D experts) of everything that has some part of a quantised weight."""
    found: dict[tuple[str, bool], None] = {}
    for name, ref in tensors.items():
        for table in tables:
            suffix = next((s for s in (table.tensor_scale, table.block_scale) if s and name.endswith(s)), None)
            if suffix is None and looks_packed(ref, table):
                suffix = table.packed
            if suffix is not None and (stem := name.removesuffix(suffix)):
                found[stem, table.experts] = None
                break
    return list(found)


def _usual(tensors: Mapping[str, TensorRef], tables: Sequence[PartNames]) -> str:
    """The format of most block scales, for weights that do not tell theirs."""
    counts = {table.format.name: 0 for table in tables}
    for name, ref in tensors.items():
        for table in tables:
            if name.endswith(table.block_scale) and ref.spec.dtype == table.scale_dtype:
                counts[table.format.name] += 1
    return max(counts, key=lambda format_name: counts[format_name], default="")


def _table(tensors: Mapping[str, TensorRef], stem: str, tables: Sequence[PartNames], usual: str) -> PartNames:
    """Which of `tables`, that share names, a weight goes by: its tensor scale tells, else its block scales' dtype."""
    for table in tables:
        if table.tensor_scale and stem + table.tensor_scale in tensors:
            return table
    for table in tables:
        scale = tensors.get(stem + table.block_scale)
        if scale is not None and scale.spec.dtype == table.scale_dtype:
            return table
    return next((table for table in tables if table.format.name == usual), tables[0])


def _assembled(
    tensors: Mapping[str, TensorRef], stem: str, table: PartNames, family: Family, layers: int | None
) -> Held:
    suffixes = {
        PACKED: table.packed,
        BLOCK_SCALE: table.block_scale,
        TENSOR_SCALE: table.tensor_scale,
        INPUT_SCALE: table.input_scale,
    }
    parts = {
        kind: tensors[stem + suffix]
        for kind, suffix in suffixes.items()
        if suffix is not None and stem + suffix in tensors
    }
    name = table.canonical(stem)
    module = module_of(name)
    faults = list(_part_faults(name, stem, table, parts, suffixes))
    shape, block = None, None
    if not faults:
        shape, block, wrong = _fitted(name, table, parts, family)
        faults += wrong
    return Held(name, module, role_of(module, layers), parts, table, shape, block, tuple(faults))


def _part_faults(
    name: str, stem: str, table: PartNames, parts: Mapping[str, TensorRef], suffixes: Mapping[str, str | None]
) -> Iterator[Found]:
    """Parts that are not there, and parts of another type than their names say."""
    experts = ".experts." in name
    there = next(iter(parts.values()))
    for kind in (PACKED, BLOCK_SCALE, TENSOR_SCALE):
        suffix = suffixes[kind]
        if suffix is not None and kind not in parts:
            found = f"it is not there, though {there.name} is"
            expected = f"the {_WORDS[kind]} of an {table.format.name.upper()} weight"
            yield Found(Kind.INCOMPLETE_WEIGHT, found, expected, stem + suffix, there.file, name, experts=experts)
    for kind, ref in parts.items():
        wanted = {PACKED: "U8", BLOCK_SCALE: table.scale_dtype}.get(kind, "F32")
        if ref.spec.dtype != wanted:
            expected = f"{wanted}, for the {_WORDS[kind]} of an {table.format.name.upper()} weight"
            yield Found(Kind.WRONG_DTYPE, ref.spec.dtype, expected, ref.name, ref.file, name, experts=experts)
        elif wanted == "F32" and ref.spec.elements != 1:
            found = f"{list(ref.spec.shape)}"
            yield Found(Kind.WRONG_SHAPE, found, "one value", ref.name, ref.file, name, experts=experts)


def _fitted(
    name: str, table: PartNames, parts: Mapping[str, TensorRef], family: Family
) -> tuple[Shape | None, int | None, list[Found]]:
    """(shape in the BF16 checkpoint, block length, faults) of a weight whose parts are all there."""
    packed, scale = parts[PACKED], parts[BLOCK_SCALE]
    fit = _fit(table, packed.spec.shape, scale.spec.shape, table.kn)
    experts = ".experts." in name
    if fit is None:
        other = _fit(table, packed.spec.shape, scale.spec.shape, not table.kn) if table.experts else None
        found = f"codes {list(packed.spec.shape)} and block scales {list(scale.spec.shape)}"
        if other is not None and not table.grouped:
            expected = "blocks along axis 1, the in-features, which this layout does not turn"
            kind = Kind.TRANSPOSED_EXPERTS
        else:
            expected = f"shapes that fit together in blocks of {table.format.block}"
            kind = Kind.WRONG_SHAPE
        return None, None, [Found(kind, found, expected, packed.name, packed.file, name, experts=experts)]
    batch, n, k, block = fit
    shape = (*batch, k, n) if table.experts and family.experts_kn else (*batch, n, k)
    if block == table.format.block:
        return shape, block, []
    found, expected = f"blocks of {block}", f"blocks of {table.format.block}"
    return (
        shape,
        block,
        [Found(Kind.BLOCK_LENGTH, found, expected, scale.name, scale.file, name, experts=experts)],
    )


def _fit(table: PartNames, packed: Shape, scale: Shape, kn: bool) -> tuple[Shape, int, int, int] | None:
    """(batch, N, K, block) of codes and block scales that fit together; None where they do not."""
    if table.grouped:
        if len(packed) < 3 or packed[-1] != table.format.block // 2 or packed[:-1] != scale:
            return None
        packed = (*packed[:-2], packed[-2] * packed[-1])
    if len(packed) != (3 if table.experts else 2) or len(scale) != len(packed) or packed[:-2] != scale[:-2]:
        return None
    n, half, per_row = (packed[-1], packed[-2], scale[-2]) if kn else (packed[-2], packed[-1], scale[-1])
    if n != (scale[-1] if kn else scale[-2]) or not per_row or (2 * half) % per_row:
        return None
    block = 2 * half // per_row
    lengths = (16, 32) if table.format is NVFP4 else (table.format.block,)
    return (packed[:-2], n, 2 * half, block) if block in lengths else None


def by_name(weights: Iterable[Held]) -> dict[str, Held]:
    return {weight.name: weight for weight in weights}


__all__ = ["DENSE_SUFFIX", "KV_SCALES", "Held", "by_name", "held_weights"]
