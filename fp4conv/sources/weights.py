"""Which files of a folder are its weights: the index decides, and without one the names do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fp4conv.errors import SourceError
from fp4conv.families import natural_key
from fp4conv.model import JSON
from fp4conv.safetensors_io import TensorRef
from fp4conv.sources.listing import INDEX_SUFFIX, SUFFIX, FileEntry, parse_object

ADAPTER = "adapter_model.safetensors"
_MODEL = "model.safetensors"
_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    files: tuple[str, ...]
    index: str = ""
    weight_map: Mapping[str, str] | None = None
    warnings: tuple[str, ...] = ()


class Folder(Protocol):
    """What the choice looks at: a local folder, or one on the Hub."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def incomplete(self) -> str:
        """What to do where files are missing."""

    def read(self, file: str) -> bytes:
        """The bytes of a small file; SourceError where it cannot be read."""

    def nested(self) -> Mapping[str, str]:
        """Folders inside with weights -> how to give them as a source."""


def choose_weights(folder: Folder, listed: Sequence[FileEntry]) -> WeightFiles:
    """The files to read tensors from; SourceError where there are none, or not all."""
    names = [entry.name for entry in listed]
    shards = [name for name in names if name.endswith(SUFFIX)]
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if indexes:
        return _choose_by_index(folder, shards, indexes)
    if _MODEL in shards:
        return WeightFiles((_MODEL,), warnings=_unread([name for name in shards if name != _MODEL], _MODEL))
    weights = [name for name in shards if name != ADAPTER]
    if not weights:
        raise _no_weights(folder, names)
    main = [name for name in weights if not name.startswith("consolidated")] or weights
    _check_numbering(main, folder)
    return WeightFiles(tuple(main))


def _choose_by_index(folder: Folder, shards: Sequence[str], indexes: Sequence[str]) -> WeightFiles:
    index = _MODEL + ".index.json" if _MODEL + ".index.json" in indexes else indexes[0]
    warnings = [f"{name}: not read, {index} is" for name in indexes if name != index]
    if len(indexes) > 1 and index != _MODEL + ".index.json":
        raise SourceError(
            f"several indexes and none is {_MODEL}.index.json: {', '.join(indexes)}",
            where=folder.name,
            hint="Leave just the one that names the weights.",
        )
    found = parse_object(folder.read(index), index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise SourceError("its weight_map must map tensor names to shards", where=index, hint="Download it again.")
    weight_map: dict[str, str] = {}
    for tensor, shard in found.items():
        weight_map[tensor] = _check_shard_name(shard, tensor, index)
    files = sorted(set(weight_map.values()), key=natural_key)
    missing = [file for file in files if file not in shards]
    if missing:
        raise SourceError(
            f"names {len(files)} shards, {len(missing)} are missing: {_some(missing)}",
            where=index,
            hint=folder.incomplete,
        )
    warnings += _unread([name for name in shards if name not in files], index)
    return WeightFiles(tuple(files), index, weight_map, tuple(warnings))


def _check_shard_name(shard: JSON, tensor: str, index: str) -> str:
    """A shard is a plain file name: nothing that could lead out of the folder, on any system."""
    if isinstance(shard, str) and shard.endswith(SUFFIX) and shard[0] != "." and not set(shard) & set("/\\:\0"):
        return shard
    raise SourceError(
        f"tensor {tensor!r} is said to lie in {str(shard)[:200]!r}",
        where=index,
        hint=f"A shard must be a plain *{SUFFIX} file name in the same folder: do not trust this index.",
    )


def _unread(names: Sequence[str], chosen: str) -> tuple[str, ...]:
    """A warning for weights that nothing names; adapters and Mistral's consolidated copies are well known."""
    strange = [name for name in names if name != ADAPTER and not name.startswith("consolidated")]
    return (f"not read, since {chosen} decides what the weights are: {_some(strange)}",) if strange else ()


def _check_numbering(names: Sequence[str], folder: Folder) -> None:
    """Without an index only the names can tell that a shard is missing: NUMBER-of-TOTAL, counted from 1 or 0."""
    sets: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = _SHARD_NAME.fullmatch(name)
        if match:
            sets.setdefault((match["stem"], int(match["total"])), set()).add(int(match["number"]))
    for (stem, total), found in sets.items():
        # gpt-oss counts from zero and calls the last number the total: 00000-of-00002 is one of three.
        expected = range(total) if 0 in found else range(1, total + 1)
        missing = len(expected) - sum(number in expected for number in found)
        if missing:
            first = next(number for number in expected if number not in found)
            raise SourceError(
                f"of {total} shards {missing} are missing, number {first} for one",
                where=f"{stem}-*{SUFFIX}",
                hint=folder.incomplete,
            )


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _no_weights(folder: Folder, names: Sequence[str]) -> SourceError:
    where = folder.name
    if ADAPTER in names or "adapter_config.json" in names:
        return SourceError(
            "this is a LoRA adapter: it has no model weights of its own",
            where=where,
            hint="Give the base model; to merge the adapter into it: fp4conv merge-lora BASE ADAPTER DST",
        )
    for inside, source in sorted(folder.nested().items()):
        hint = f"The folder {inside} in it has some: give {source}"
        return SourceError("there are no safetensors files at the top of the folder", where=where, hint=hint)
    for suffixes, kind, hint in (
        ((".gguf",), "GGUF files, which fp4conv does not read", "Get the safetensors release of the model."),
        (
            (".bin", ".pt", ".pth"),
            "PyTorch pickles, which can run code and are never opened",
            "Save the model as safetensors first: model.save_pretrained(FOLDER, safe_serialization=True)",
        ),
    ):
        pickles = [name for name in names if name.endswith(suffixes)]
        if pickles:
            return SourceError(f"there are no safetensors files, only {kind}: {_some(pickles)}", where=where, hint=hint)
    holds = f"it holds {_some(names)}" if names else "it has no files"
    hint = "Give the folder that has config.json and the safetensors files."
    return SourceError(f"there are no safetensors files in the folder; {holds}", where=where, hint=hint)


def compare_index(chosen: WeightFiles, tensors: Mapping[str, TensorRef]) -> tuple[str, ...]:
    """Warnings; SourceError where the index promises what the shards do not hold."""
    if chosen.weight_map is None:
        return ()
    for name, shard in chosen.weight_map.items():
        ref = tensors.get(name)
        if ref is None or ref.file != shard:
            found = "no shard has it" if ref is None else f"it is in {ref.file}"
            raise SourceError(
                f"tensor {name!r} should be in {shard}, but {found}",
                where=chosen.index,
                hint="The index and the shards are not of one download: download both again.",
            )
    extra = [name for name in tensors if name not in chosen.weight_map]
    if not extra:
        return ()
    return (f"{chosen.index}: does not name {len(extra)} tensors that its shards hold, taken along: {_some(extra)}",)
