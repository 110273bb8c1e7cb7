"""The files of `training_state` on disk: written when a run has calibrated, read when one goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from fp4conv import training_state
from fp4conv.errors import SourceError
from fp4conv.modelopt_state import Quantizer
from fp4conv.sources.listing import parse_object

Amax: TypeAlias = npt.NDArray[np.float32]


def write_state(folder: Path, backend: str, quantizers: Iterable[Quantizer], amax: Mapping[str, Amax]) -> None:
    """Write both files into `folder`: `amax` is "<quantiser>._amax" -> float32 []. The one that lists comes last."""
    state, values = folder / training_state.STATE, folder / training_state.AMAX
    state.parent.mkdir(parents=True, exist_ok=True)
    state.unlink(missing_ok=True)
    values.unlink(missing_ok=True)
    if amax:
        save_file(dict(amax), values)
    state.write_bytes(training_state.state_bytes(backend, quantizers))


def read_state(folder: Path) -> tuple[dict[str, Quantizer], dict[str, Amax]]:
    """(quantisers by name, amax as in `write_state`). SourceError where there is no state, or a damaged one."""
    path = folder / training_state.STATE
    if not path.is_file():
        raise SourceError(f"has no {training_state.STATE}", where=str(folder), hint="no run of fp4conv wrote it")
    quantizers = training_state.parse_state(parse_object(path.read_bytes(), training_state.STATE))
    values = folder / training_state.AMAX
    return quantizers, load_file(values) if values.is_file() else {}
