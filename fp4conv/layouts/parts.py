"""How a layout spells the parts of a quantised weight: one table from which reading and writing derive.

`PartNames` is that table's row; `collect` finds the weights of a source by it, `spell` gives the names,
dtypes and shapes of a weight to be written. No layout's own facts live here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fp4conv.errors import PlanError, SourceError
from fp4conv.families import Family, Role, module_of, role_of
from fp4conv.formats import BlockFormat
from fp4conv.model import Decoded, Source, Stored, Weight
from fp4conv.patterns import exclude
from fp4conv.safetensors_io import TensorRef, TensorSpec

PACKED, BLOCK_SCALE, TENSOR_SCALE, INPUT_SCALE = "packed", "block_scale", "tensor_scale", "input_scale"
DENSE_SUFFIX = ".weight"  # of a linear layer's dense tensor


@dataclass(frozen=True)
class PartNames:
    """Suffixes after the stem of one kind of weight, and how its parts lie.

    A linear layer's stem is its module ('…q_proj', canonical tensor '…q_proj.weight'); the stem of a 3-D
    expert parameter is the parameter itself. `kn`: packed along axis -2. `grouped`: the codes have an
    axis of blocks, [..., N, K/32, 16]. `scalar`: the shape of tensor and input scales; `inverse`: those two
    are stored as reciprocals.
    """

    format: BlockFormat
    experts: bool
    packed: str
    block_scale: str
    scale_dtype: str
    tensor_scale: str | None = None
    input_scale: str | None = None
    kn: bool = False
    grouped: bool = False
    scalar: tuple[int, ...] = ()
    inverse: bool = False

    def canonical(self, stem: str) -> str:
        return stem if self.experts else stem + DENSE_SUFFIX

    def stem(self, weight: Weight) -> str:
        return self.stem_of(weight.name)

    def stem_of(self, canonical: str) -> str:
        return canonical if self.experts else canonical.removesuffix(DENSE_SUFFIX)


@dataclass(frozen=True)
class Part:
    """One tensor to be written. `kn`: its matrix lies K-major, whatever its shape says of groups.

    `inverse`: a scale that is written as its reciprocal. `stack` = (index, count): this is one of `count` parts of
    the same name that make one tensor, stacked along axis 0.
    """

    kind: str
    name: str
    spec: TensorSpec
    kn: bool = False
    inverse: bool = False
    stack: tuple[int, int] | None = None


def dense_part(weight: Weight, dtype: str) -> Part:
    """`weight` as one dense tensor under its own name."""
    return Part(PACKED, weight.name, TensorSpec(dtype, weight.shape), weight.kn)


def spell(names: PartNames, weight: Weight, input_scale: bool) -> tuple[Part, ...]:
    """The tensors that hold `weight` in this layout; PlanError when K is no multiple of the block."""
    block = names.format.block
    if weight.k % block:
        raise PlanError(
            f"K = {weight.k} (of {list(weight.shape)}) is not a multiple of the {names.format.name} block of {block}",
            where=weight.name,
            hint=f"leave it as it is with: {exclude(weight.module)}",
        )
    stem, batch = names.stem(weight), weight.shape[:-2]

    def matrix(per_row: int) -> tuple[int, ...]:
        return (*batch, per_row, weight.n) if names.kn else (*batch, weight.n, per_row)

    packed = (*batch, weight.n, weight.k // block, block // 2) if names.grouped else matrix(weight.k // 2)
    parts = [
        Part(PACKED, stem + names.packed, TensorSpec("U8", packed), names.kn),
        Part(BLOCK_SCALE, stem + names.block_scale, TensorSpec(names.scale_dtype, matrix(weight.k // block)), names.kn),
    ]
    scalar = TensorSpec("F32", names.scalar)
    if names.tensor_scale is not None:
        parts.append(Part(TENSOR_SCALE, stem + names.tensor_scale, scalar, inverse=names.inverse))
    if input_scale and names.input_scale is not None:
        parts.append(Part(INPUT_SCALE, stem + names.input_scale, scalar, inverse=names.inverse))
    return tuple(parts)


@dataclass(frozen=True)
class Collected:
    """What a source holds by one or more tables: quantised weights, input scales by module, and the names used."""

    weights: tuple[Weight, ...]
    input_scales: Mapping[str, TensorRef]
    used: frozenset[str]


def collect(source: Source, family: Family, tables: Iterable[PartNames], layers: int | None) -> Collected:
    """Find every weight whose block scales or codes are there; a part without its partner is a SourceError.

    Tables that share the suffix of block scales are told apart by those scales' dtype.
    """
    tables = tuple(tables)
    weights: list[Weight] = []
    input_scales: dict[str, TensorRef] = {}
    used: set[str] = set()
    for names in tables:
        for name in source.tensors:
            if not name.endswith(names.block_scale):
                continue
            stem = name.removesuffix(names.block_scale)
            if (stem.endswith("]") or not stem) or source.tensors[name].spec.dtype != names.scale_dtype:
                continue
            weight, refs = _assemble(source, names, stem, family, layers)
            weights.append(weight)
            used.update(ref.name for ref in refs)
            if names.input_scale and (found := source.tensors.get(stem + names.input_scale)):
                input_scales[weight.module] = _scalar(found, "input scale", names)
                used.add(found.name)
    for names in tables:
        _refuse_orphans(source, names, used)
    return Collected(tuple(weights), input_scales, frozenset(used))


def _assemble(
    source: Source, names: PartNames, stem: str, family: Family, layers: int | None
) -> tuple[Weight, tuple[TensorRef, ...]]:
    def need(suffix: str, dtype: str, what: str) -> TensorRef:
        ref = source.tensors.get(stem + suffix)
        if ref is None:
            raise SourceError(
                f"{stem + names.block_scale} is there but its {what} is not",
                where=stem + suffix,
                hint="the checkpoint is incomplete: download or export it again",
            )
        if ref.spec.dtype != dtype:
            raise _wrong_kind(ref, f"dtype {ref.spec.dtype}, expected {dtype} for the {what} of {names.format.name}")
        return ref

    scale = need(names.block_scale, names.scale_dtype, "block scales")
    packed = need(names.packed, "U8", "packed codes")
    tensor_scale = None
    if names.tensor_scale:
        tensor_scale = _scalar(need(names.tensor_scale, "F32", "tensor scale"), "tensor scale", names)
    batch, n, k, block = _shape_of(names, packed, scale)
    canonical = names.canonical(stem)
    module = module_of(canonical)
    if names.experts and not family.experts_kn:
        raise SourceError(
            f"quantised 3-D experts of a model of family {family.name}: whether the dense parameter is [in, out] or "
            "[out, in] is known of gpt-oss alone",
            where=f"{packed.name} ({packed.file})",
            hint="convert from the BF16 checkpoint instead",
        )
    kn = names.experts and family.experts_kn
    value = Decoded(names.format.name, block, packed, scale, tensor_scale, names.kn, names.inverse)
    shape = (*batch, k, n) if kn else (*batch, n, k)
    weight = Weight(canonical, module, role_of(module, layers), shape, value, kn)
    return weight, value.refs


def _scalar(ref: TensorRef, what: str, names: PartNames) -> TensorRef:
    if ref.spec.dtype != "F32" or ref.spec.elements != 1:
        found = f"{ref.spec.dtype} {list(ref.spec.shape)}, expected one F32 value for the {what} of {names.format.name}"
        raise _wrong_kind(ref, found)
    return ref


def _wrong_kind(ref: TensorRef, found: str) -> SourceError:
    hint = "this tensor is not what its name says: the tool that wrote the checkpoint damaged it"
    return SourceError(found, where=f"{ref.name} ({ref.file})", hint=hint)


def _shape_of(names: PartNames, packed: TensorRef, scale: TensorRef) -> tuple[tuple[int, ...], int, int, int]:
    """(batch, N, K, block) from the shapes of the codes and the block scales, which must agree."""
    p, s = packed.spec.shape, scale.spec.shape
    if names.grouped and len(p) >= 3:
        p = (*p[:-2], p[-2] * p[-1])
    if len(p) >= 2 and len(s) == len(p) and (len(p) == 3) == names.experts and p[:-2] == s[:-2]:
        n, half, per_row = (p[-1], p[-2], s[-2]) if names.kn else (p[-2], p[-1], s[-1])
        rows_agree = n == (s[-1] if names.kn else s[-2])
        k = 2 * half
        allowed = (names.format.block,) if names.tensor_scale is None else (16, 32)
        if rows_agree and packed.spec.elements and per_row and k % per_row == 0 and k // per_row in allowed:
            return p[:-2], n, k, k // per_row
    raise SourceError(
        f"codes {list(packed.spec.shape)} and block scales {list(s)} ({scale.name}) do not fit together as "
        f"{names.format.name} in blocks of {names.format.block}",
        where=f"{packed.name} ({packed.file})",
        hint="the checkpoint is damaged or in a layout that fp4conv does not know",
    )


def _refuse_orphans(source: Source, names: PartNames, used: set[str]) -> None:
    """Codes without block scales, tensor scales without either. Where dense tensors share a suffix, only U8 counts."""
    what = f"packed {names.format.name} codes"
    for name, ref in source.tensors.items():
        if name in used:
            continue
        if names.tensor_scale and name.endswith(names.tensor_scale):
            stem = name.removesuffix(names.tensor_scale)
            raise _incomplete(ref, f"a tensor scale of {names.format.name} without {stem + names.block_scale}")
        if not looks_packed(ref, names):
            continue
        if ref.spec.dtype != "U8":
            raise _wrong_kind(ref, f"{ref.spec.dtype} {list(ref.spec.shape)} under the name of {what}, expected U8")
        scales = name.removesuffix(names.packed) + names.block_scale
        raise _incomplete(ref, f"{what} without their block scales {scales}")


def looks_packed(ref: TensorRef, names: PartNames) -> bool:
    """Whether the tensor is named like codes of this table; where dense tensors have such names, it must be U8 too."""
    if not names.packed:
        return ref.spec.dtype == "U8" and len(ref.spec.shape) == 3 and role_of(module_of(ref.name)) is Role.EXPERT
    return ref.name.endswith(names.packed) and (ref.spec.dtype == "U8" or names.packed != DENSE_SUFFIX)


def _incomplete(ref: TensorRef, found: str) -> SourceError:
    hint = "the checkpoint is incomplete: download or export it again"
    return SourceError(found, where=f"{ref.name} ({ref.file})", hint=hint)


def dense_weight(ref: TensorRef, family: Family, layers: int | None) -> Weight:
    """The weight that a dense tensor is."""
    module = module_of(ref.name)
    role = role_of(module, layers)
    kn = len(ref.spec.shape) == 3 and role is Role.EXPERT and family.experts_kn
    return Weight(ref.name, module, role, ref.spec.shape, Stored(ref), kn)
