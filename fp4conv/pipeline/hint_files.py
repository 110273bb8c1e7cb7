"""The files of round-trip hints as wholes: records sorted into theirs, digests made, and checked on the way back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fp4conv.errors import SourceError
from fp4conv.hints.runs import Run, is_sparse
from fp4conv.hints.values import FACTS, FOLDER, LOG, PARTS, RECORDS, HintFile, Kept, facts_bytes
from fp4conv.kernels.hints import NO_HINT
from fp4conv.model import JSON, Source
from fp4conv.pipeline.hint_log import HintLog
from fp4conv.pipeline.results import StepResult
from fp4conv.plan import Plan
from fp4conv.safetensors_io import Reader, TensorSpec, Writer, lay_out
from fp4conv.staging import Staging

_CHUNK = 1 << 20


def write_hints(plan: Plan, out: Staging, results: Mapping[str, StepResult]) -> None:
    """Write what a dense result keeps beside its weights, after its tensors."""
    if plan.kept is None:
        return
    log = HintLog(out.path(LOG))
    try:
        _write_records(plan, plan.kept, log, out, results)
    finally:
        log.close()
    files: dict[str, JSON] = {}
    for name in (PARTS, RECORDS):
        path = out.path(name)
        if path.is_file():
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    facts: dict[str, JSON] = {**plan.kept.facts, "files": files}
    content = facts_bytes({**facts, "digest": hashlib.sha256(facts_bytes(facts)).hexdigest()})
    out.write_file(FACTS, content)
    HintLog(out.path(LOG)).remove()


def hint_bytes(plan: Plan, out: Staging) -> int:
    """Bytes of the files of a dense result's hints that no shard of the plan counts; 0 where none are kept."""
    paths = [out.path(name) for name in (RECORDS, FACTS)] if plan.kept is not None else []
    return sum(path.stat().st_size for path in paths if path.is_file())


def damaged_files(source: Source, files: Sequence[HintFile]) -> list[str]:
    """Names of those of `files` that are not what their digests say."""
    with source.reader() as reader:
        return [file.name for file in files if _stored_sha256(reader, file) != file.sha256]


def check_hints(plan: Plan) -> None:
    """SourceError where the hints that a plan goes by are not what their digests say. Reads them once."""
    damaged = damaged_files(plan.model.source, plan.hints.files)
    if damaged:
        raise SourceError(
            "its bytes are not those that its digest was made of",
            where=damaged[0],
            hint=f"These round-trip hints are damaged: copy the folder {FOLDER}/ again, or convert without hints: "
            "--no-hints",
        )


def _stored_sha256(reader: Reader, file: HintFile) -> str:
    digest, chunk = hashlib.sha256(), np.empty(_CHUNK, np.uint8)
    for start in range(0, file.nbytes, _CHUNK):
        held = chunk[: min(_CHUNK, file.nbytes - start)]
        reader.read_into(file.name, start, held)
        digest.update(held.data)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---- records


def _write_records(plan: Plan, kept: Kept, log: HintLog, out: Staging, results: Mapping[str, StepResult]) -> None:
    """Sort the runs of every weight into RECORDS, which is not made where nothing was noted."""
    runs = {key: sorted(results[key].runs) for key in kept.weights if key in results and results[key].runs}
    path = out.path(RECORDS)
    path.unlink(missing_ok=True)
    if not runs:
        return
    blocks = {step.key: _blocks(kept, step.key, step.weight.elements) for step in plan.steps if step.weight}
    specs = [(name, spec) for key, found in runs.items() for name, spec in _specs(key, found, blocks[key])]
    layout = lay_out(specs, file=RECORDS)
    with Writer(path, layout.nbytes) as writer:
        writer.write(0, layout.header)
        places = {ref.name: ref.offset for ref in layout.tensors}
        for key, found in runs.items():
            _Sorter(writer, places, key, _dense(found, blocks[key])).write(log, found, blocks[key])


def _blocks(kept: Kept, key: str, elements: int) -> int:
    return elements // kept.weights[key].block if key in kept.weights else 0


def _dense(runs: Sequence[Run], blocks: int) -> bool:
    return not is_sparse(sum(run.scales for run in runs), blocks)


def _specs(key: str, runs: Sequence[Run], blocks: int) -> Iterator[tuple[str, TensorSpec]]:
    """The tensors of one weight's records; names as `hints.reading` asks for them."""
    scales, codes = sum(run.scales for run in runs), sum(run.codes for run in runs)
    assert blocks < 2**32, "blocks are numbered in 32 bits"
    if scales:
        dense = _dense(runs, blocks)
        yield f"{key}.scales", TensorSpec("U8", (blocks if dense else scales,))
        if not dense:
            yield f"{key}.index", TensorSpec("U32", (scales,))
    if codes:
        yield f"{key}.code_index", TensorSpec("U32", (codes,))
        yield f"{key}.codes", TensorSpec("U8", (codes, runs[0].half))


class _Sorter:
    """Writes the runs of one weight in the order of its blocks, one at a time."""

    def __init__(self, writer: Writer, places: Mapping[str, int], key: str, dense: bool) -> None:
        self._writer = writer
        self._ends = {name: places.get(f"{key}.{name}", -1) for name in ("scales", "index", "code_index", "codes")}
        self._dense = dense and self._ends["scales"] >= 0

    def write(self, log: HintLog, runs: Sequence[Run], blocks: int) -> None:
        reached = 0
        for run in runs:
            plane, index, codes = log.read(run)
            if self._dense:
                self._fill(run.first - reached)
                self._put("scales", plane)
                reached = run.first + run.blocks
            elif run.scales:
                numbers = np.flatnonzero(plane != NO_HINT)
                self._put("index", (numbers + run.first).astype("<u4"))
                self._put("scales", plane[numbers])
            if run.codes:
                self._put("code_index", (index + run.first).astype("<u4"))
                self._put("codes", codes)
        if self._dense:
            self._fill(blocks - reached)

    def _fill(self, blocks: int) -> None:
        """Units of which nothing was noted have no run."""
        for start in range(0, blocks, _CHUNK):
            self._put("scales", np.full(min(_CHUNK, blocks - start), NO_HINT, np.uint8))

    def _put(self, name: str, values: npt.NDArray[np.generic]) -> None:
        self._writer.write(self._ends[name], np.ascontiguousarray(values))
        self._ends[name] += values.nbytes
