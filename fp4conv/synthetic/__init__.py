"""A random checkpoint of any size in the layer shapes of a real family: for the demo, benchmarks and tests.

Owns how such a checkpoint is put on disk. Its shapes are in `shapes`, its values in `values`, its configs in
`companions`. The bytes follow from the arguments alone: same on any machine, whatever NumPy's release.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fp4conv.errors import OutputError
from fp4conv.safetensors_io import Writer, lay_out
from fp4conv.synthetic.adapter import adapter_tensors, write_config
from fp4conv.synthetic.companions import companion_files
from fp4conv.synthetic.shapes import FAMILIES, FORMATS, Geometry, Tensor, fit, model_tensors
from fp4conv.synthetic.values import Values

__all__ = ["FAMILIES", "FORMATS", "write_adapter", "write_checkpoint"]

MAX_SHARD_BYTES = 5_000_000_000
SHARDS = 4  # at least, so that a small checkpoint is a sharded one too


def write_checkpoint(
    out: Path, *, nbytes: int, family: str, seed: int = 0, format: str = "bf16", max_shard_bytes: int | None = None
) -> Geometry:
    """Write a checkpoint of about `nbytes` bytes of tensors to the new folder `out`; returns its shape.

    `family` is one of FAMILIES, `format` of FORMATS. Memory stays at some 50 MB for any size. Below about 5 MB the
    smallest model is larger than asked. Raises UsageError for an unknown family or format, OutputError where `out`
    holds something already or cannot be written.
    """
    geometry = fit(family, format, nbytes)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError("holds something already", where=str(out), hint="Name a folder that does not exist yet.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be created: {error.strerror}", where=str(out)) from error
    tensors = model_tensors(geometry)
    shards = share_out(tensors, min(MAX_SHARD_BYTES, nbytes // SHARDS) if max_shard_bytes is None else max_shard_bytes)
    values = Values(seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(out / file, shard, values)
        weight_map.update((tensor.name, file) for tensor in shard)
    total = sum(tensor.spec.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files = {"model.safetensors.index.json": json.dumps(index, indent=2) + "\n", **companion_files(geometry)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return geometry


def write_adapter(out: Path, geometry: Geometry, *, rank: int = 8, seed: int = 0) -> None:
    """Write to the new folder `out` a LoRA adapter of attention and experts that fits a gpt-oss checkpoint."""
    out.mkdir(parents=True)
    write_shard(out / "adapter_model.safetensors", adapter_tensors(geometry, rank), Values(seed))
    write_config(out, rank)


def share_out(tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    """Cut `tensors`, in order, into shards of at most `max_shard_bytes`; the parts of one weight stay together."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for position, tensor in enumerate(tensors):
        parts = [part for part in tensors[position : position + 2] if part.weight == tensor.weight]
        opens_weight = position == 0 or tensors[position - 1].weight != tensor.weight
        needed = sum(part.spec.nbytes for part in parts)
        if opens_weight and shards[-1] and filled + needed > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.spec.nbytes
    return shards


def write_shard(path: Path, tensors: Sequence[Tensor], values: Values) -> None:
    by_name = {tensor.name: tensor for tensor in tensors}
    layout = lay_out([(tensor.name, tensor.spec) for tensor in tensors])
    with Writer(path, layout.nbytes) as writer:
        writer.write(0, layout.header)
        for ref in layout.tensors:
            offset = ref.offset
            for chunk in values.chunks(by_name[ref.name]):
                writer.write(offset, chunk)
                offset += chunk.nbytes
            assert offset == ref.offset + ref.spec.nbytes, ref.name
