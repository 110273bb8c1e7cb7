"""Checkpoints of gpt-oss that other programs damaged on saving: what can be mended by a name is, nothing is made up.

After `Mxfp4Config(dequantize=True)`, transformers 5.23.0 saves the BF16 experts under the names of packed codes
(`gate_up_proj_blocks`, no scales): the values are whole. 5.8 to 5.20 save one `gate_up_proj$` for the whole model:
the experts of every other layer are gone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fp4conv.errors import SourceError
from fp4conv.model import FLOAT_DTYPES, JSON, Source
from fp4conv.safetensors_io import TensorRef

_BLOCKS, _SCALES = "_blocks", "_scales"
_EXPERT_BLOCKS = re.compile(r"\.experts\.\w+_blocks$")
_LOST = re.compile(r"(gate_up|down)_proj\$$")


def misnamed_experts(tensors: Mapping[str, TensorRef]) -> dict[str, str]:
    """Stored name -> true name of dense experts that are saved as `*_blocks`; empty unless all of them are."""
    found = {name: name.removesuffix(_BLOCKS) for name in tensors if _EXPERT_BLOCKS.search(name)}
    for name, true in found.items():
        spec = tensors[name].spec
        if spec.dtype not in FLOAT_DTYPES or len(spec.shape) != 3 or true in tensors or true + _SCALES in tensors:
            return {}
    return found


def mending_notes(mended: Mapping[str, str], source: Source) -> list[str]:
    """The warning that goes with the new names; SourceError where a shape is not that of dense experts."""
    for name, true in mended.items():
        ref, expected = source.tensors[name], _expert_shape(true, source.json("config.json") or {})
        if expected and ref.spec.shape != expected:
            raise SourceError(
                f"dense experts under the name of packed codes, in the shape {list(ref.spec.shape)}; by the config "
                f"they should have {list(expected)}, so renaming does not mend them",
                where=f"{name} ({ref.file})",
                hint="save the model again with another release of transformers",
            )
    if not mended:
        return []
    first = next(iter(mended))
    return [
        f"{len(mended)} expert tensors are dense and named like packed codes ({first}, ...), as transformers 5.23 "
        "saves a dequantised model: read under their true names, the values are whole"
    ]


def _expert_shape(name: str, config: Mapping[str, JSON]) -> tuple[int, ...] | None:
    """[E, in, out] by the config; None where it does not say."""
    sizes = [config.get(key) for key in ("num_local_experts", "hidden_size", "intermediate_size")]
    experts, hidden, intermediate = (size if isinstance(size, int) else 0 for size in sizes)
    if not (experts and hidden and intermediate):
        return None
    return (experts, hidden, 2 * intermediate) if "gate_up" in name else (experts, intermediate, hidden)


def refuse_lost_experts(tensors: Mapping[str, TensorRef]) -> None:
    """SourceError for the marks that the layers' experts were saved over one another."""
    for name, ref in tensors.items():
        if _LOST.search(name):
            raise SourceError(
                "one expert tensor was saved for the whole model, as transformers 5.8 to 5.20 do after a dequantised "
                "load: the experts of all other layers are lost",
                where=f"{name} ({ref.file})",
                hint="save the model again with another release of transformers, or convert the MXFP4 checkpoint",
            )
