"""Scales as they were before they became reciprocals: ModelOpt stores NVFP4's tensor scale, compressed-tensors 1 / it.

For one F32 value in six the reciprocal of the reciprocal is another. Those are kept beside the result, and taken on the
way back where they still fit: where the reciprocal of what was kept is what is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from fp4conv.errors import SourceError
from fp4conv.hints.values import RECIPROCALS
from fp4conv.model import JSON, Source
from fp4conv.plan import PlannedFile

_VERSION = 1


def exact_scales_file(scales: Mapping[str, float]) -> PlannedFile:
    """The file that keeps `scales`: '<module>.tensor_scale' or '.input_scale' -> F32 value, every bit of it."""
    listed: dict[str, JSON] = {key: scale.hex() for key, scale in sorted(scales.items())}
    content = json.dumps({"fp4conv_reciprocals": _VERSION, "scales": listed}, indent=1).encode() + b"\n"
    return PlannedFile(RECIPROCALS, len(content), content)


def read_exact_scales(source: Source) -> dict[str, float]:
    """What such a file in `source` keeps; empty where there is none, or one of another version."""
    if not any(file.name == RECIPROCALS for file in source.files):
        return {}
    kept = source.json(RECIPROCALS) or {}
    if kept.get("fp4conv_reciprocals") != _VERSION:
        return {}
    listed = kept.get("scales")
    try:
        return {key: float.fromhex(str(scale)) for key, scale in (listed if isinstance(listed, dict) else {}).items()}
    except (ValueError, OverflowError) as error:
        raise SourceError(
            f"holds what is no number: {error}",
            where=RECIPROCALS,
            hint="delete it, or convert with --no-hints; tensor scales may then differ in the last bit",
        ) from error
