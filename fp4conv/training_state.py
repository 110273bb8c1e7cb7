"""What a training run of fp4conv says of its fake quantisers, in two small files beside the masters.

`STATE` is JSON: which quantisers there were, and their formats. `AMAX` holds what calibration froze:
`<quantiser>._amax`, F32 []. Quantisers have the names that ModelOpt gives them (`layouts/fakequant` lists them), so
that one reader serves both. No loader looks into the folder, and the masters stay a plain checkpoint.

Owns the names and the JSON; what a quantiser means for a weight is in `layouts/fakequant`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from fp4conv.errors import SourceError
from fp4conv.formats import BLOCK_FORMATS
from fp4conv.model import FP8, JSON
from fp4conv.modelopt_state import Quantizer

STATE = "fp4conv/training.json"
AMAX = "fp4conv/training.safetensors"
VERSION = 1
_VERSION_KEY = "fp4conv_training"
_HINT = "these files are damaged or of another release: copy them again, or train again"


def state_bytes(backend: str, quantizers: Iterable[Quantizer]) -> bytes:
    """The JSON of `STATE`; `backend` is for people who wonder which one trained."""
    listed = {
        quantizer.name: {"format": quantizer.format_name, "enabled": quantizer.enabled} for quantizer in quantizers
    }
    state = {_VERSION_KEY: VERSION, "backend": backend, "quantizers": dict(sorted(listed.items()))}
    return (json.dumps(state, indent=1) + "\n").encode()


def parse_state(state: Mapping[str, JSON]) -> dict[str, Quantizer]:
    """Quantiser name -> Quantizer. Raises SourceError for another version, and for anything else than was written."""
    if state.get(_VERSION_KEY) != VERSION:
        raise SourceError(f"is of version {state.get(_VERSION_KEY)!r}, expected {VERSION}", where=STATE, hint=_HINT)
    listed = state.get("quantizers")
    if not isinstance(listed, dict) or not listed:
        raise SourceError("lists no quantizers", where=STATE, hint=_HINT)
    found = {}
    for name, facts in listed.items():
        format_name, enabled = (facts.get("format"), facts.get("enabled")) if isinstance(facts, dict) else (None, None)
        if (
            not isinstance(format_name, str)
            or format_name not in (*BLOCK_FORMATS, FP8)
            or not isinstance(enabled, bool)
        ):
            raise SourceError(f"its entry of {name} is {facts!r}", where=STATE, hint=_HINT)
        found[name] = Quantizer(name, enabled, format_name)
    return found
