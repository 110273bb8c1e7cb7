"""Find the hints of a dense source, and check that they are whole and of this model. Reads JSON and headers only.

Hints of another version, or of another model (a tensor is not there, not dense, or of another shape), are left alone
with a warning. Hints that are damaged are an error, since nobody can tell what else was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from fp4conv.errors import SourceError
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.hints.values import (
    FACTS,
    FACTS_VERSION,
    FOLDER,
    PARTS,
    RECIPROCALS,
    RECORDS,
    Hint,
    HintFile,
    Hints,
    block_scale_name,
    calibration_name,
    facts_bytes,
    tensor_scale_name,
)
from fp4conv.model import FLOAT_DTYPES, JSON, Decoded, Model, Source, Weight
from fp4conv.safetensors_io import TensorRef, header_at
from fp4conv.training_state import AMAX, STATE

_WITHOUT = "convert without hints: --no-hints"


_OTHERS = (RECIPROCALS, STATE, AMAX)  # what else lies in the folder


def has_hints(source: Source) -> bool:
    return any(file.name.startswith(FOLDER + "/") and file.name not in _OTHERS for file in source.files)


def read_hints(model: Model, format_name: str) -> tuple[Hints, tuple[str, ...]]:
    """(hints of `format_name`, warnings); SourceError where the folder of hints is damaged or incomplete."""
    source = model.source
    if not has_hints(source):
        return Hints(), ()
    facts = _facts(source)
    if facts is None:
        return Hints(), (f"{FOLDER}/ has no {FACTS}: its round-trip hints are not used",)
    if facts.get("fp4conv_hints") != FACTS_VERSION:
        found = facts.get("fp4conv_hints")
        return Hints(), (f"{FACTS} is of version {found!r}, not {FACTS_VERSION}: its round-trip hints are not used",)
    _check_digest(facts)
    files = tuple(HintFile(name, *_size_and_digest(found)) for name, found in _mapping(facts, "files").items())
    refs = _refs(source, files)
    weights = {weight.name: weight for weight in model.weights}
    hints: dict[str, Hint] = {}
    strange: list[str] = []
    others: set[str] = set()
    for name, found in _mapping(facts, "weights").items():
        if not isinstance(found, dict) or found.get("format") not in BLOCK_FORMATS:
            raise _damaged(f"its entry of {name} is not one of a weight")
        if found["format"] != format_name:
            others.add(str(found["format"]))
        elif _fits(weights.get(name), found):
            hints[name] = _hint(name, found, refs)
        else:
            strange.append(name)
    merged = frozenset(n for n, was in _mapping(facts, "merged").items() if was == format_name and n in weights)
    warnings = _warnings(format_name, hints, strange, others)
    if strange or not (hints or merged):
        return Hints(), warnings
    return replace(_assemble(facts, hints, refs, files), merged=merged), warnings


def _facts(source: Source) -> dict[str, JSON] | None:
    try:
        return source.json(FACTS)
    except SourceError as error:
        raise _damaged(error.what) from error


def _damaged(found: str, where: str = FACTS) -> SourceError:
    hint = f"These round-trip hints are damaged: copy the folder {FOLDER}/ again, or {_WITHOUT}"
    return SourceError(found, where=where, hint=hint)


def _mapping(facts: Mapping[str, JSON], key: str) -> dict[str, JSON]:
    found = facts.get(key)
    if not isinstance(found, dict):
        raise _damaged(f"its {key!r} is not an object")
    return found


def _check_digest(facts: Mapping[str, JSON]) -> None:
    rest = {key: value for key, value in facts.items() if key != "digest"}
    if hashlib.sha256(facts_bytes(rest)).hexdigest() != facts.get("digest"):
        raise _damaged("its content is not what its digest says")


def _size_and_digest(found: JSON) -> tuple[int, str]:
    nbytes, digest = (found.get("bytes"), found.get("sha256")) if isinstance(found, dict) else (None, None)
    if not isinstance(nbytes, int) or not isinstance(digest, str):
        raise _damaged("its 'files' must have bytes and sha256")
    return nbytes, digest


def _refs(source: Source, files: tuple[HintFile, ...]) -> dict[str, dict[str, TensorRef]]:
    """File -> tensor name -> place; the files must be there in the size that FACTS says."""
    sizes = {file.name: file.nbytes for file in source.files}
    found: dict[str, dict[str, TensorRef]] = {}
    with source.reader() as reader:
        for file in files:
            if file.name not in (PARTS, RECORDS):
                raise _damaged(f"it names the file {file.name!r}")
            if sizes.get(file.name) != file.nbytes:
                here = f"{sizes[file.name]:,} bytes" if file.name in sizes else "no such file"
                raise _damaged(f"{here}, expected {file.nbytes:,} bytes", file.name)
            found[file.name] = {ref.name: ref for ref in header_at(reader, file.name, file.nbytes).tensors}
    return found


def _fits(weight: Weight | None, found: Mapping[str, JSON]) -> bool:
    """Whether the model has this weight, not in codes and of the shape that was noted."""
    if weight is None or isinstance(weight.base, Decoded) or not weight.is_matrix:
        return False
    return list(weight.shape) == found.get("shape")


def _hint(name: str, found: Mapping[str, JSON], refs: Mapping[str, Mapping[str, TensorRef]]) -> Hint:
    parts, records = refs.get(PARTS, {}), refs.get(RECORDS, {})
    block, dtype = found.get("block"), found.get("dtype")
    if block not in (16, 32) or dtype not in FLOAT_DTYPES:
        raise _damaged(f"its entry of {name} has block {block!r} and dtype {dtype!r}")
    hint = Hint(
        str(found["format"]),
        int(block),
        str(dtype),
        kn=found.get("kn") is True,
        inverse=found.get("inverse") is True,
        block_scale=parts.get(block_scale_name(name)),
        tensor_scale=parts.get(tensor_scale_name(name)),
        scales=records.get(f"{name}.scales"),
        index=records.get(f"{name}.index"),
        codes=records.get(f"{name}.codes"),
        code_index=records.get(f"{name}.code_index"),
    )
    whole = (hint.codes is None) == (hint.code_index is None) and (hint.index is None or hint.scales is not None)
    if hint.format.tensor_scale:
        whole = whole and hint.block_scale is not None and hint.tensor_scale is not None
    if not whole:
        raise _damaged(f"parts of the hint of {name} are missing", PARTS if hint.format.tensor_scale else RECORDS)
    return hint


def _assemble(
    facts: Mapping[str, JSON],
    hints: Mapping[str, Hint],
    refs: Mapping[str, Mapping[str, TensorRef]],
    files: tuple[HintFile, ...],
) -> Hints:
    listed = facts.get("calibration")
    calibration: dict[str, TensorRef] = {}
    for name in listed if isinstance(listed, list) else ():
        ref = refs.get(PARTS, {}).get(calibration_name(str(name)))
        if ref is None:
            raise _damaged(f"{name} is missing", PARTS)
        calibration[str(name)] = replace(ref, name=str(name))
    dense: dict[str, str] = {}
    for dtype, names in _mapping(facts, "dense").items():
        dense |= dict.fromkeys((str(name) for name in names) if isinstance(names, list) else (), dtype)
    said = facts.get("config_dtype")
    inverse = facts.get("inverse") is True
    return Hints(hints, calibration, dense, said if isinstance(said, str) else None, files=files, inverse=inverse)


def _warnings(format_name: str, hints: Mapping[str, Hint], strange: list[str], others: set[str]) -> tuple[str, ...]:
    if strange:
        return (
            f"the round-trip hints in {FOLDER}/ are of another model and not used: {len(strange)} of their "
            f"{len(strange) + len(hints)} weights are not here, not dense, or of another shape ({strange[0]})",
        )
    if others and not hints:
        return (f"the round-trip hints in {FOLDER}/ are of {'+'.join(sorted(others))}: not used for {format_name}",)
    return ()
