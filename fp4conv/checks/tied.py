"""Does an output head that is stored differ from the embeddings to which the config ties it? Compares values.

A copy of the embeddings is harmless, and common. A head of its own is kept by programs that look at the tensors, and
replaced by the embeddings in those that go by the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fp4conv.checks.weights import Held
from fp4conv.faults import Found, Kind
from fp4conv.layouts.parts import PACKED
from fp4conv.model import JSON
from fp4conv.safetensors_io import Reader, TensorRef

_KEY = "tie_word_embeddings"
# Model types of transformers 5.23.0 that tie where config.json says nothing: the defaults of their configurations.
_TIED_UNLESS_SAID = frozenset(
    ("cohere", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "mpt", "smollm3")
)
_FLOATS: Mapping[str, npt.DTypeLike] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


@dataclass(frozen=True)
class Apart:
    """How many of two tensors' values differ, and by how much at the most (infinite where one is not finite)."""

    values: int = 0
    largest: float = 0.0


def tied_bytes(weights: Sequence[Held], config: Mapping[str, JSON]) -> int:
    """What `tied_faults` reads."""
    pair = tied_pair(weights, config)
    if pair is None or not _comparable(*pair):
        return 0
    return sum(held.parts[PACKED].spec.nbytes for held in pair)


def tied_faults(
    weights: Sequence[Held],
    config: Mapping[str, JSON],
    reader: Reader,
    *,
    chunk_bytes: int,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Found]:
    """The fault of a head that is not the embeddings, though `config` says so. Memory: some `chunk_bytes`.

    `progress` gets the bytes that were read.
    """
    pair = tied_pair(weights, config)
    if pair is None:
        return
    head, table = pair
    ref = next(iter(head.parts.values()))
    found = _difference(head, table, reader, chunk_bytes, progress)
    if found:
        expected = f"the values of {table.name}, since config.json ties the two ({_KEY})"
        yield Found(Kind.TIED_HEAD_DIFFERS, found, expected, ref.name, ref.file, head.name)


def tied_pair(weights: Sequence[Held], config: Mapping[str, JSON]) -> tuple[Held, Held] | None:
    """(output head, embeddings) where both are stored and `config` ties them."""
    if not _is_tied(config):
        return None
    outside = [weight for weight in weights if ".layers." not in weight.name]
    heads = [weight for weight in outside if weight.name.endswith("lm_head.weight")]
    tables = [weight for weight in outside if weight.name.endswith("embed_tokens.weight")]
    return (heads[0], tables[0]) if len(heads) == len(tables) == 1 else None


def _is_tied(config: Mapping[str, JSON]) -> bool:
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        if _KEY in level:
            return level[_KEY] is True
    return config.get("model_type") in _TIED_UNLESS_SAID


def _comparable(head: Held, table: Held) -> bool:
    """Whether the two are float tensors of one shape."""
    if head.quantized or table.quantized:
        return False
    one, other = head.parts[PACKED].spec, table.parts[PACKED].spec
    return one.shape == other.shape and {one.dtype, other.dtype} <= _FLOATS.keys()


def _difference(
    head: Held, table: Held, reader: Reader, chunk_bytes: int, progress: Callable[[int], object] | None
) -> str:
    """What sets the two apart, in words; '' where they are the same."""
    if head.quantized or table.quantized:
        formats = head.format_name, table.format_name
        return "" if formats[0] == formats[1] else f"in {formats[0]}, {table.name} in {formats[1]}"
    one, other = head.parts[PACKED], table.parts[PACKED]
    if one.spec.shape != other.spec.shape:
        return f"{list(one.spec.shape)}, {table.name} is {list(other.spec.shape)}"
    if not _comparable(head, table):
        return ""  # which is another fault
    apart = compare(one, other, reader, chunk_bytes=chunk_bytes, progress=progress)
    if not apart.values:
        return ""
    return (
        f"{apart.values:,} of {one.spec.elements:,} values differ from those of {table.name}, "
        f"by {apart.largest:.3g} at most"
    )


def compare(
    one: TensorRef,
    other: TensorRef,
    reader: Reader,
    *,
    chunk_bytes: int,
    progress: Callable[[int], object] | None = None,
) -> Apart:
    """How far two float tensors of one shape are apart, value by value; NaN is equal to NaN, and -0 to 0."""
    step = max(1, chunk_bytes // 32)
    apart = Apart()
    for start in range(0, one.spec.elements, step):
        count = min(step, one.spec.elements - start)
        left, right = (_values(ref, reader, start, count) for ref in (one, other))
        if progress is not None:
            progress(left.nbytes + right.nbytes)
        if left.dtype == right.dtype and left.tobytes() == right.tobytes():
            continue
        with np.errstate(invalid="ignore"):
            left, right = left.astype(np.float64), right.astype(np.float64)
            differs = (left != right) & ~(np.isnan(left) & np.isnan(right))
            distances = np.abs(left[differs] - right[differs])
        largest = float(np.nan_to_num(distances, nan=np.inf, posinf=np.inf).max(initial=0.0))
        apart = Apart(apart.values + int(np.count_nonzero(differs)), max(apart.largest, largest))
    return apart


def _values(ref: TensorRef, reader: Reader, start: int, count: int) -> npt.NDArray[np.generic]:
    held: npt.NDArray[np.generic] = np.empty(count, np.dtype(_FLOATS[ref.spec.dtype]))
    reader.read_into(ref.file, ref.offset + start * held.itemsize, held.view(np.uint8))
    return held
