"""Entries of config.json that programs stop at though the file is JSON; its promises are checked elsewhere."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fp4conv.faults import Found, Kind
from fp4conv.layouts.quant_config import MODEL_CONFIG
from fp4conv.model import JSON

_OBJECTS = ("quantization_config", "compression_config", "text_config")


def marked_faults(root: Path, names: Iterable[str]) -> Iterator[Found]:
    """Files in `root` that begin with a byte order mark, which fp4conv reads past and other programs do not."""
    for name in names:
        try:
            with (root / name).open("rb") as file:
                marked = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        except OSError:
            continue  # told where it is read
        if marked:
            yield Found(Kind.ODD_CONFIG, "it begins with a byte order mark", "plain UTF-8", file=name)


def config_faults(config: Mapping[str, JSON], layout: str) -> Iterator[Found]:
    """Entries of config.json that are of another type than every reader takes them for; null is as good as nothing."""
    for key in _OBJECTS:
        held = config.get(key)
        if held is not None and not isinstance(held, dict):
            yield Found(Kind.ODD_CONFIG, f"{key} is a {type(held).__name__}", "an object", file=MODEL_CONFIG)
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        yield Found(Kind.ODD_CONFIG, "architectures is no list of names", "a list of names", file=MODEL_CONFIG)
    model_type = config.get("model_type")
    if layout != "openai-original" and not (isinstance(model_type, str) and model_type):
        found = "it has no model_type" if not model_type else f"model_type is a {type(model_type).__name__}"
        yield Found(Kind.BAD_CONFIG, found, "the type of the model, such as 'llama'", file=MODEL_CONFIG)
