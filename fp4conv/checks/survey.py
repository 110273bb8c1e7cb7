"""A folder as a source to read from, however broken: what cannot be read is a fault, and the rest is read.

`sources` stops at the first thing that is wrong with a folder, as a conversion must. Here every file is opened that
can be, so that one damaged shard does not hide what is wrong in the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fp4conv.checks.configs import marked_faults
from fp4conv.errors import SourceError
from fp4conv.families import module_of, natural_key
from fp4conv.faults import Found, Kind
from fp4conv.model import JSON, Pinned
from fp4conv.safetensors_io import Reader, TensorRef, read_header
from fp4conv.sources.listing import INDEX_SUFFIX, SUFFIX, FileEntry, list_files, parse_object
from fp4conv.sources.local import SMALL_FILE_BYTES, LocalFolder
from fp4conv.sources.weights import ADAPTER, choose_weights

_CONFIGS = ("config.json", "hf_quant_config.json")
_MARKED = ("config.json", INDEX_SUFFIX)  # files where a byte order mark matters


@dataclass(frozen=True)
class Survey:
    """What could be read of a folder: a `Source`, with the faults of its files in `faults`.

    `tensors`: every tensor of the weight files, the first of two of the same name. `lost`: tensors that are known by
    name alone, since the index names them, or a shard that the index leaves out has them. `partial`: files could not
    be read, and nobody can tell what was in them.
    """

    root: Path
    name: str
    files: tuple[FileEntry, ...]
    folders: tuple[str, ...]
    tensors: Mapping[str, TensorRef]
    faults: tuple[Found, ...]
    configs: Mapping[str, dict[str, JSON]] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    partial: bool = False
    warnings: tuple[str, ...] = ()
    pinned: Pinned | None = None

    def json(self, name: str) -> dict[str, JSON] | None:
        """The JSON object in file `name`; None where there is none, or none that can be read."""
        if name in self.configs or name in _CONFIGS:
            return self.configs.get(name)
        if not any(entry.name == name for entry in self.files):
            return None
        return parse_object(self.read_bytes(name), name)

    def read_bytes(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        path = self.root / name
        try:
            if path.stat().st_size > limit:
                raise SourceError(f"has {path.stat().st_size:,} bytes, at most {limit:,} were expected", where=name)
            return path.read_bytes()
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", where=name) from error

    def reader(self) -> Reader:
        return Reader(self.root)

    def fingerprint(self) -> str:
        raise AssertionError("a survey is read once and never resumed")


def survey(root: Path, name: str) -> Survey:
    """Read what can be read in folder `root`: directory entries, headers, the index and the configs."""
    refused: list[SourceError] = []
    listing = list_files(root, refused)
    top = [entry for entry in listing.files if "/" not in entry.name]
    shards = [entry.name for entry in top if entry.name.endswith(SUFFIX)]
    faults: list[Found] = []
    configs = read_configs(root, {entry.name for entry in top}, faults)
    faults += marked_faults(root, [entry.name for entry in top if entry.name.endswith(_MARKED)])
    weight_map, index = _read_index(root, [entry.name for entry in top], faults)
    chosen = _chosen(root, top, shards, weight_map, faults)
    tensors = _read_tensors(root, chosen, faults)
    faults = [*(fault for fault in faults if fault.file not in {error.where for error in refused}), *_links(refused)]
    if chosen and not tensors and not faults:
        faults.append(Found(Kind.NOT_A_CHECKPOINT, "its files have no tensors", "the tensors of a model"))
    if any(fault.kind is Kind.NOT_A_CHECKPOINT for fault in faults):
        faults = [fault for fault in faults if fault.kind is not Kind.NO_CONFIG]
    lost: set[str] = set()
    if weight_map is not None:
        spare = [file for file in shards if file not in weight_map.values() and file != ADAPTER]
        extra = {file: _names(root, file) for file in spare}
        faults += _compare_index(index, weight_map, tensors, extra)
        lost = {*weight_map, *(name for names in extra.values() for name in names)} - set(tensors)
    broken = any(fault.kind in (Kind.UNREADABLE_FILE, Kind.MISSING_SHARD) for fault in faults)
    files = tuple(FileEntry(e.name, e.nbytes, e.mtime_ns, e.name in chosen) for e in listing.files)
    return Survey(
        root,
        name,
        files,
        listing.folders,
        tensors,
        tuple(faults),
        configs,
        frozenset(lost),
        partial=broken and weight_map is None,
        warnings=listing.warnings,
    )


def _links(refused: Sequence[SourceError]) -> Iterator[Found]:
    for error in refused:
        kind = Kind.BAD_CONFIG if (error.where or "").endswith(".json") else Kind.UNREADABLE_FILE
        yield Found(
            kind, error.what, "the file, or a link to one in the folder or in the Hub's cache", file=error.where
        )


def read_configs(root: Path, names: set[str], faults: list[Found]) -> dict[str, dict[str, JSON]]:
    """File name -> JSON object of the configs among `names`; what is wrong with them goes to `faults`."""
    found = {}
    for name in _CONFIGS:
        if name not in names:
            continue
        try:
            found[name] = parse_object((root / name).read_bytes(), name)
        except (SourceError, OSError) as error:
            what = error.what if isinstance(error, SourceError) else f"cannot be read: {error.strerror}"
            faults.append(Found(Kind.BAD_CONFIG, what, "a JSON object", file=name))
    if "config.json" not in names:
        faults.append(Found(Kind.NO_CONFIG, "there is none", "config.json beside the weights", file="config.json"))
    return found


def _read_index(root: Path, names: Sequence[str], faults: list[Found]) -> tuple[dict[str, str] | None, str]:
    """(tensor -> shard, name of the index); None where there is no index or none that can be read."""
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if not indexes:
        return None, ""
    index = "model" + INDEX_SUFFIX if "model" + INDEX_SUFFIX in indexes else indexes[0]
    expected = "a JSON object with a weight_map from tensors to plain file names"
    try:
        found = parse_object((root / index).read_bytes(), index).get("weight_map")
    except (SourceError, OSError) as error:
        what = error.what if isinstance(error, SourceError) else f"cannot be read: {error.strerror}"
        faults.append(Found(Kind.UNREADABLE_FILE, what, expected, file=index))
        return None, index
    if not isinstance(found, dict) or not found:
        faults.append(Found(Kind.UNREADABLE_FILE, "it has no weight_map", expected, file=index))
        return None, index
    weight_map = {}
    for tensor, shard in found.items():
        if isinstance(shard, str) and shard.endswith(SUFFIX) and not set(shard) & set("/\\:\0"):
            weight_map[tensor] = shard
        else:
            said = f"it says that the tensor lies in {str(shard)[:100]!r}"
            faults.append(Found(Kind.WRONG_SHARD, said, "a plain file name", name=tensor, file=index))
    return weight_map, index


def _chosen(
    root: Path,
    top: Sequence[FileEntry],
    shards: Sequence[str],
    weight_map: Mapping[str, str] | None,
    faults: list[Found],
) -> list[str]:
    """The files that tensors are read from: those of the index, else those that a conversion would read."""
    if weight_map is not None:
        named = sorted(set(weight_map.values()), key=natural_key)
        for file in named:
            if file not in shards:
                count = sum(shard == file for shard in weight_map.values())
                found = f"the index places {count} tensors in it, and it is not in the folder"
                faults.append(Found(Kind.MISSING_SHARD, found, "the file", file=file))
        return [file for file in named if file in shards]
    try:
        return list(
            choose_weights(LocalFolder(root), [entry for entry in top if not entry.name.endswith(INDEX_SUFFIX)]).files
        )
    except SourceError as error:
        weights = [file for file in shards if file != ADAPTER]
        kind = Kind.MISSING_SHARD if weights else Kind.NOT_A_CHECKPOINT
        expected = "every shard of the set" if weights else "a folder with config.json and safetensors files"
        faults.append(Found(kind, error.what, expected, file=error.where if weights else None))
        return weights


def _read_tensors(root: Path, chosen: Sequence[str], faults: list[Found]) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for file in chosen:
        try:
            header = read_header(root / file, file)
        except SourceError as error:
            faults.append(Found(Kind.UNREADABLE_FILE, error.what, "a whole safetensors file", file=file))
            continue
        for ref in header.tensors:
            if not module_of(ref.name):
                faults.append(Found(Kind.UNREADABLE_FILE, f"a tensor is called {ref.name!r}", "names", file=file))
            elif ref.name in tensors:
                found = f"it is in {tensors[ref.name].file} and in {file}"
                faults.append(Found(Kind.DUPLICATE_TENSOR, found, "one shard for each", name=ref.name, file=file))
            else:
                tensors[ref.name] = ref
    return tensors


def _compare_index(
    index: str, weight_map: Mapping[str, str], tensors: Mapping[str, TensorRef], spare: Mapping[str, Sequence[str]]
) -> list[Found]:
    """Where the index and the shards say different things; `spare`: shards that it leaves out, and their tensors."""
    faults = []
    readable = {ref.file for ref in tensors.values()}
    for tensor, shard in weight_map.items():
        ref = tensors.get(tensor)
        if shard in readable and (ref is None or ref.file != shard):
            found = "no shard has it" if ref is None else f"it is in {ref.file}"
            faults.append(Found(Kind.WRONG_SHARD, found, f"{shard}, as the index says", name=tensor, file=index))
    for tensor, ref in tensors.items():
        if tensor not in weight_map:
            found = f"it is in {ref.file}, and the index does not name it"
            faults.append(Found(Kind.NOT_IN_INDEX, found, "every tensor in the index", name=tensor, file=index))
    for file, names in spare.items():
        hidden = [name for name in names if name not in weight_map]
        if hidden:
            found = f"{index} names neither the file nor {len(hidden)} of its tensors ({hidden[0]}, ...)"
            faults.append(Found(Kind.NOT_IN_INDEX, found, "every shard in the index", file=file))
        else:
            found = f"{index} does not name it"
            faults.append(Found(Kind.UNREAD_FILE, found, "no other weights in the folder", file=file))
    return faults


def _names(root: Path, file: str) -> list[str]:
    """Names of the tensors in a file; none where it cannot be read."""
    try:
        return [ref.name for ref in read_header(root / file, file).tensors]
    except SourceError:
        return []
