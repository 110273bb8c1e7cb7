"""Read what `modelopt_state.pth` says of fake quantisers, without torch and without running a pickle.

The file is a zip archive whose `data.pkl` is a pickle from a stranger. It is read by an unpickler that knows a
closed list of names (`torch.Size`, dtypes, OrderedDict), gives plain values for them, and refuses every other
name, so nothing in the file can be called. Owns only the reading; what a quantiser means for a weight is in
`layouts/fakequant.py`.

Source: files written by ModelOpt 0.47.0 (`modelopt_state_dict`: a list of (mode, state); the last state that has
`metadata.quantizer_state` counts); torch's zip format of `torch.save`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from fp4conv.errors import SourceError
from fp4conv.formats import MXFP4, NVFP4

STATE_FILE = "modelopt_state.pth"
# A state has some hundred bytes a quantiser; the largest mixtures of experts have a hundred thousand of them.
MAX_STATE_BYTES = 128 * 2**20

_DTYPES = (
    *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    *("uint8", "int8", "int16", "int32", "int64", "bool"),
)
# Built-in types and strings: none has an attribute that a pickle could set, none does anything when called.
_KNOWN: Mapping[tuple[str, str], object] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", name): f"torch.{name}" for name in _DTYPES},
}


@dataclass(frozen=True)
class Quantizer:
    """One TensorQuantizer. `format_name`: 'mxfp4', 'nvfp4', 'fp8', or a description of what fp4conv does not write.

    `altered` names a transformation that the forward pass applied beside rounding (rotation, bias), or is None.
    """

    name: str
    enabled: bool
    format_name: str
    altered: str | None = None


def read_state(raw: bytes, where: str = STATE_FILE) -> dict[str, Quantizer]:
    """Quantiser name ('model.layers.0.self_attn.q_proj.weight_quantizer') -> Quantizer, from the bytes of the file.

    Raises SourceError for anything but the state that ModelOpt writes.
    """
    state = _unpickle(_data_pickle(raw, where), where)
    modes = state.get("modelopt_state_dict") if isinstance(state, dict) else None
    found: object = None
    for mode in modes if isinstance(modes, list) else ():
        metadata = mode[1].get("metadata") if isinstance(mode, tuple) and isinstance(mode[-1], dict) else None
        if isinstance(metadata, dict) and isinstance(metadata.get("quantizer_state"), dict):
            found = metadata["quantizer_state"]
    if not isinstance(found, dict):
        raise SourceError(
            "no quantizer_state in it, so it does not say what was quantised",
            where=where,
            hint="to convert the weights as plain BF16, take this file out of the folder",
        )
    return {name: _quantizer(name, facts) for name, facts in found.items() if isinstance(facts, dict)}


def _quantizer(name: str, facts: Mapping[object, object]) -> Quantizer:
    bits, blocks = facts.get("_num_bits"), facts.get("_block_sizes")
    scale_bits = blocks.get("scale_bits") if isinstance(blocks, dict) else None
    if bits == (2, 1) and scale_bits == (8, 0):
        format_name = MXFP4.name
    elif bits == (2, 1) and scale_bits == (4, 3):
        format_name = NVFP4.name
    elif bits == (4, 3) and not blocks:
        format_name = "fp8"
    else:
        format_name = f"num_bits {bits}, block_sizes {blocks}"
    altered = next((key.strip("_") for key in ("_rotate", "_bias") if facts.get(key)), None)
    # `_disabled` decides: a disabled lm_head still shows the bits of its recipe.
    return Quantizer(name, facts.get("_disabled") is False, format_name, altered)


def _data_pickle(raw: bytes, where: str) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
            if len(members) != 1:
                raise SourceError(f"{len(members)} data.pkl in it, expected one", where=where)
            if members[0].file_size > MAX_STATE_BYTES:
                size = members[0].file_size
                raise SourceError(f"its pickle has {size:,} bytes, at most {MAX_STATE_BYTES:,} are read", where=where)
            return archive.read(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise SourceError(
            f"not a file that torch.save wrote: {error}",
            where=where,
            hint="copy it again, or take it out of the folder to convert the weights as plain BF16",
        ) from error


class _ClosedList(pickle.Unpickler):
    """Resolves the names in `_KNOWN` and refuses every other; no persistent objects."""

    def __init__(self, raw: bytes, where: str) -> None:
        super().__init__(io.BytesIO(raw))
        self._where = where

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise SourceError(
            f"its pickle names {module}.{name}, which no quantiser state needs: it is not opened",
            where=self._where,
            hint="ask who made this file; to convert the weights as plain BF16, take it out of the folder",
        )

    def persistent_load(self, pid: object) -> object:
        raise SourceError("its pickle refers to stored tensors, which no quantiser state has", where=self._where)


def _unpickle(raw: bytes, where: str) -> object:
    try:
        return _ClosedList(raw, where).load()
    except SourceError:
        raise
    except Exception as error:
        # Damaged or hostile bytes make the unpickler raise nearly anything; all of it means the same to the user.
        raise SourceError(
            f"its pickle cannot be read: {type(error).__name__}: {error}",
            where=where,
            hint="copy the file again, or take it out of the folder to convert the weights as plain BF16",
        ) from error
