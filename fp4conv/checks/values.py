"""Do the values decode? NaN, zero and overflowing scales, and values that are not finite.

Streams over block scales and dense tensors, a chunk at a time on several threads; codes are read only of chunks that
have a scale with which some codes would be wrong. Counts do not depend on chunks or threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fp4conv.checks.weights import KV_SCALES, Held
from fp4conv.families import Role, shared_set_of
from fp4conv.faults import Found, Kind
from fp4conv.formats import MXFP4, NVFP4
from fp4conv.kernels.contract import F32
from fp4conv.kernels.small_floats import E2M1_VALUES, E4M3_VALUES, block_factors
from fp4conv.layouts.parts import BLOCK_SCALE, INPUT_SCALE, PACKED, TENSOR_SCALE
from fp4conv.safetensors_io import DTYPE_BYTES, Reader, TensorRef

Bytes = npt.NDArray[np.uint8]
# Float dtype -> (the integer that holds it, the bits of its exponent, all of which NaN and Inf set)
_EXPONENTS = {
    "F8_E4M3": (np.uint8, 0x7F),  # which has no Inf, and NaN with all bits of its magnitude set
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_KV_SCALE = "kv_scale"
_BESIDE = ("_quantizer", ".masked_bias", ".attn.bias", ".rotary_emb.")  # not finite is all right, or nobody's business


@dataclass(frozen=True)
class Counts:
    """What a chunk of block scales has: how many blocks of each fault; `blank`: every byte is zero."""

    nan: int = 0
    zero: int = 0
    negative: int = 0
    overflow: int = 0
    vanishing: int = 0
    blank: bool = True

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.nan + other.nan,
            self.zero + other.zero,
            self.negative + other.negative,
            self.overflow + other.overflow,
            self.vanishing + other.vanishing,
            self.blank and other.blank,
        )


def value_faults(
    weights: Sequence[Held],
    reader: Reader,
    *,
    chunk_bytes: int,
    workers: int,
    progress: Callable[[int], object] | None = None,
) -> list[Found]:
    """Faults of the values of `weights`, in their order. Memory: `workers` times `chunk_bytes`."""
    whole = [weight for weight in weights if not weight.faults or weight.table is None or weight.block]
    scalars = {weight.name: _scalars(weight, reader) for weight in whole}
    faults = list(_scalar_faults(whole, scalars))
    tasks = [task for weight in whole for task in _tasks(weight, scalars[weight.name].get(TENSOR_SCALE), chunk_bytes)]
    totals: dict[str, Counts] = {}

    def run(task: _Task) -> tuple[_Task, Counts]:
        counts = task.count(reader)
        if progress:
            progress(task.nbytes)
        return task, counts

    with ThreadPoolExecutor(max_workers=workers) as pool:
        for task, counts in pool.map(run, tasks):
            totals[task.weight.name] = totals.get(task.weight.name, Counts()) + counts
    for weight in whole:
        faults += _count_faults(weight, totals.get(weight.name, Counts()))
    return faults


def bytes_to_read(weights: Iterable[Held]) -> int:
    """What `value_faults` reads at the least: block scales and dense floats."""
    return sum(ref.spec.nbytes for weight in weights if (ref := _main(weight)) is not None)


def _main(weight: Held) -> TensorRef | None:
    """The tensor that is read whole."""
    if weight.table is not None:
        return weight.parts.get(BLOCK_SCALE) if weight.block else None
    ref = weight.parts[PACKED]
    return ref if ref.spec.dtype in _EXPONENTS else None


# ---- scalars


def _scalars(weight: Held, reader: Reader) -> dict[str, float]:
    if weight.table is not None:
        parts = {kind: weight.parts.get(kind) for kind in (TENSOR_SCALE, INPUT_SCALE)}
    else:
        parts = {_KV_SCALE: weight.parts[PACKED] if weight.name.endswith(KV_SCALES) else None}
    found = {}
    for kind, ref in parts.items():
        if ref is not None and ref.spec.dtype == "F32" and ref.spec.elements == 1:
            held = np.empty(1, np.float32)
            reader.read_into(ref.file, ref.offset, held)
            found[kind] = float(held[0])
    return found


def _is_subnormal(value: float, weight: Held) -> bool:
    scale = 1 / value if weight.table is not None and weight.table.inverse else value
    return scale < _SMALLEST_NORMAL


def _scalar_faults(weights: Sequence[Held], scalars: dict[str, dict[str, float]]) -> Iterator[Found]:
    kinds = ((TENSOR_SCALE, Kind.BAD_TENSOR_SCALE), (INPUT_SCALE, Kind.BAD_INPUT_SCALE))
    for weight in weights:
        for part, kind in kinds:
            value = scalars[weight.name].get(part)
            if value is not None and not (math.isfinite(value) and value > 0):
                ref = weight.parts[part]
                experts = weight.role is Role.EXPERT
                yield Found(
                    kind, f"{value:g}", "a finite number above zero", ref.name, ref.file, weight.name, experts=experts
                )
            elif value is not None and _is_subnormal(value, weight):
                ref = weight.parts[part]
                words = f"{value:g}" + (", a reciprocal" if weight.table and weight.table.inverse else "")
                yield Found(Kind.SUBNORMAL_SCALE, words, "a scale of 1.2e-38 or more", ref.name, ref.file, weight.name)
        kv_scale = scalars[weight.name].get(_KV_SCALE)
        if kv_scale is not None and kv_scale <= 0:
            ref = weight.parts[PACKED]
            yield Found(Kind.BAD_KV_SCALE, f"{kv_scale:g}", "a number above zero", ref.name, ref.file, weight.name)
    yield from _differing(weights, scalars, TENSOR_SCALE, Kind.TENSOR_SCALES_DIFFER)
    yield from _differing(weights, scalars, INPUT_SCALE, Kind.INPUT_SCALES_DIFFER)


def _differing(weights: Sequence[Held], scalars: dict[str, dict[str, float]], part: str, kind: Kind) -> Iterator[Found]:
    """Sets that servers fuse whose members have different scalars."""
    sets: dict[str, list[Held]] = {}
    for weight in weights:
        key = shared_set_of(weight.module)
        value = scalars[weight.name].get(part)
        if key and value is not None and math.isfinite(value):
            sets.setdefault(key, []).append(weight)
    for key, members in sets.items():
        values = {member.module.rpartition(".")[2]: scalars[member.name][part] for member in members}
        if len(set(values.values())) > 1:
            ref = members[0].parts[part]
            found = ", ".join(f"{leaf} {value:.6g}" for leaf, value in values.items())
            experts = members[0].role is Role.EXPERT
            yield Found(kind, found, "one value for the set", ref.name, ref.file, key, experts=experts)


# ---- blocks and dense values


@dataclass(frozen=True)
class _Task:
    """Elements `start` to `stop` of the tensor that is read whole: block scales, or dense values."""

    weight: Held
    ref: TensorRef
    start: int
    stop: int
    tensor_scale: float | None

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * DTYPE_BYTES[self.ref.spec.dtype]

    def count(self, reader: Reader) -> Counts:
        held = np.empty(self.nbytes, np.uint8)
        reader.read_into(self.ref.file, self.ref.offset + self.start * DTYPE_BYTES[self.ref.spec.dtype], held)
        if self.weight.table is None:
            kind, exponent = _EXPONENTS[self.ref.spec.dtype]
            bits = held.view(kind)
            nan = int(np.count_nonzero((bits & kind(exponent)) == kind(exponent)))
            return Counts(nan=nan, blank=not bits.any())
        if self.weight.table.format is MXFP4:
            return self._count_e8m0(held, reader)
        return self._count_e4m3(held, reader)

    def _count_e8m0(self, scales: Bytes, reader: Reader) -> Counts:
        overflow = 0
        if (scales >= 253).any():
            largest, _ = _extremes(self._codes(reader, scales.size))
            # 4 x 2^126 (code 6) and 2 x 2^127 (code 4) are 2^128: the first that F32 does not hold.
            hit = ((scales == 253) & (largest >= 6)) | ((scales == 254) & (largest >= 4))
            overflow = int(np.count_nonzero(hit))
        return Counts(nan=int(np.count_nonzero(scales == 255)), overflow=overflow, blank=not scales.any())

    def _count_e4m3(self, scales: Bytes, reader: Reader) -> Counts:
        factors = np.abs(self._factors())
        zero, nan = E4M3_VALUES[scales] == 0, np.isnan(E4M3_VALUES[scales])
        negative = int(np.count_nonzero((scales >= 0x80) & ~nan & ~zero))
        zeros = overflow = vanishing = 0
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            doubtful = zero | np.isinf(factors * 6)[scales] | (factors / 2 == 0)[scales]
            if doubtful.any():
                largest, smallest = _extremes(self._codes(reader, scales.size))
                zeros = int(np.count_nonzero(zero & (largest > 0)))
                overflow = int(np.count_nonzero(np.isinf(factors[scales] * E2M1_VALUES[largest])))
                lost = ~zero & (smallest > 0) & (factors[scales] * E2M1_VALUES[smallest] == 0)
                vanishing = int(np.count_nonzero(lost))
        return Counts(int(np.count_nonzero(nan)), zeros, negative, overflow, vanishing, blank=not scales.any())

    def _factors(self) -> F32:
        """What codes are multiplied by under each scale byte; the scales alone where the tensor's is no scale."""
        scale = self.tensor_scale
        if scale is None or not math.isfinite(scale) or not scale or self.weight.table is None:
            return E4M3_VALUES
        return block_factors(NVFP4.name, scale, inverse=self.weight.table.inverse)

    def _codes(self, reader: Reader, blocks: int) -> Bytes:
        """The packed codes of the blocks, a row a block; those of a K-major matrix are gathered."""
        table, packed = self.weight.table, self.weight.parts[PACKED]
        assert table is not None
        assert self.weight.block is not None
        width = self.weight.block // 2
        if not table.kn:
            out = np.empty((blocks, width), np.uint8)
            reader.read_into(packed.file, packed.offset + self.start * width, out)
            return out
        columns = packed.spec.shape[-1]
        assert self.start % columns == 0
        assert blocks % columns == 0
        rows = np.empty((blocks // columns, width, columns), np.uint8)
        reader.read_into(packed.file, packed.offset + self.start * width, rows)
        return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(blocks, width)


def _extremes(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The largest magnitude code of each block, and the smallest that is not zero; 0 where all are."""
    low, high = packed & np.uint8(0x07), (packed >> 4) & np.uint8(0x07)
    largest = np.maximum(low, high).max(axis=1)
    # One less than a code, as an unsigned byte: zero comes last.
    smallest = np.minimum(low - np.uint8(1), high - np.uint8(1)).min(axis=1) + np.uint8(1)
    return largest, smallest


def _tasks(weight: Held, tensor_scale: float | None, chunk_bytes: int) -> Iterator[_Task]:
    ref = _main(weight)
    if ref is None:
        return
    # A chunk of scales may need its codes, eight or sixteen times as many bytes, and masks as large as those.
    item = DTYPE_BYTES[ref.spec.dtype] * 2 if weight.table is None else 4 * (weight.block or 32)
    step = max(1, chunk_bytes // item)
    if weight.table is not None and weight.table.kn:
        columns = ref.spec.shape[-1]
        step = max(columns, step // columns * columns)
    for start in range(0, ref.spec.elements, step):
        yield _Task(weight, ref, start, min(start + step, ref.spec.elements), tensor_scale)


def _count_faults(weight: Held, counts: Counts) -> Iterator[Found]:
    ref = _main(weight)
    if ref is None:
        return
    experts = weight.role is Role.EXPERT
    if counts.blank and ref.spec.elements and len(ref.spec.shape) > 1:
        found = f"every {'value' if weight.table is None else 'byte of its block scales'} is zero"
        yield Found(Kind.ALL_ZERO, found, "some that are not", ref.name, ref.file, weight.name, experts=experts)
    if weight.table is None:
        if counts.nan and not any(word in weight.name for word in _BESIDE):
            found = f"{counts.nan:,} of {ref.spec.elements:,} values are NaN or infinite"
            yield Found(Kind.NONFINITE_VALUES, found, "finite values", ref.name, ref.file, weight.name, counts.nan)
        return
    name = weight.table.format.name.upper()
    for kind, count, words, expected in (
        (Kind.NAN_BLOCK_SCALE, counts.nan, "are NaN", "numbers"),
        (Kind.ZERO_BLOCK_SCALE, counts.zero, "are zero under codes that are not", "a scale above zero"),
        (Kind.NEGATIVE_BLOCK_SCALE, counts.negative, "are negative", "scales above zero"),
        (Kind.OVERFLOWING_BLOCK, counts.overflow, "make values that no F32 holds", "finite values"),
        (Kind.VANISHING_BLOCK, counts.vanishing, "make zeros of codes that are not", "values that F32 can hold"),
    ):
        if count:
            found = f"{count:,} of {ref.spec.elements:,} block scales {words}"
            yield Found(kind, found, f"{expected}, in {name}", ref.name, ref.file, weight.name, count, experts=experts)
