"""Where a server must put each tensor of a checkpoint, and whether it did: each byte in its place, none left over.

The tables below are our own: parameter names and stacking orders of vLLM's and SGLang's models, read in their source.
They share nothing with the code that loads, so a tensor that is skipped, loaded twice or turned shows as bytes that
differ. Parameters hold a pattern before they are loaded, so one that is not loaded shows too.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import deserialize

# Parameters that a checkpoint may leave out: scales of a KV cache in FP8, which default to 1; and those of inputs
# that a weight-only checkpoint has none of, which vLLM makes and drops. And SGLang's room for scales in another order.
_OPTIONAL = re.compile(r"\.attn\.(q|k|v|prob)_(scale|zero_point)$|_blockscale_swizzled$")
_OF_INPUTS = re.compile(r"input_(global_)?scale$")
# The experts of gpt-oss: the end of a tensor's name, and what the end of the parameter's name is.
_FUSED = {
    "gate_up_proj_blocks": "w13_weight",
    "gate_up_proj_scales": "w13_weight_scale",
    "gate_up_proj_bias": "w13_bias",
    "gate_up_proj": "w13_weight",
    "down_proj_blocks": "w2_weight",
    "down_proj_scales": "w2_weight_scale",
    "down_proj_bias": "w2_bias",
    "down_proj": "w2_weight",
}
_TURNED = ("gate_up_proj", "down_proj")  # [E, in, out] in the checkpoint, [E, out, in] in the server
_FUSED_EXPERT = re.compile(rf"\.experts\.(?P<part>{'|'.join(_FUSED)})$")
_STACKED = re.compile(r"\.(?:(?P<qkv>[qkv])|(?P<mlp>gate|up))_proj\.(?P<part>\w+)$")
_EXPERT = re.compile(r"\.experts\.(?P<number>\d+)\.(?P<which>gate|up|down)_proj\.(?P<part>\w+)$")


@dataclass(frozen=True)
class Names:
    """A server's names where they are not the checkpoint's.

    `experts` stands between a layer and its stacked experts; `renamed` is for gpt-oss alone.
    """

    experts: str
    renamed: Mapping[str, str]
    biases: str


VLLM = Names(".experts.routed_experts.", {".self_attn.": ".attn.", "model.embed_tokens.": "model.embedding."}, "bias")
SGLANG = Names(".experts.", {}, "weight_bias")


@dataclass(frozen=True)
class Parameter:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Placement:
    """What was found: `wrong` is empty where each byte lies where it belongs."""

    tensors: int
    bytes: int
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        if not self.wrong:
            return f"{self.tensors} tensors, {self.bytes:,} bytes, each in its place; no parameter left over"
        more = f" and {len(self.wrong) - 2} more" if len(self.wrong) > 2 else ""
        return "; ".join(self.wrong[:2]) + more


def is_optional(parameter: str) -> bool:
    return _OPTIONAL.search(parameter) is not None


def fill(name: str, tensor) -> None:  # type: ignore[no-untyped-def]
    """Bytes that follow from the parameter's name: what is left of them was not loaded."""
    import torch

    if tensor.numel() == 0 or not tensor.is_contiguous():
        return
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    flat = tensor.reshape(-1).view(torch.uint8)
    flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


def snapshot(model) -> dict[str, Parameter]:  # type: ignore[no-untyped-def]
    """What the parameters of `model` hold now."""
    import torch

    found = {}
    for name, parameter in model.named_parameters():
        held = parameter.detach().contiguous()
        data = held.reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = Parameter(str(held.dtype).removeprefix("torch."), tuple(held.shape), data)
    return found


def compare(folder: Path, loaded: Mapping[str, Parameter], names: Names) -> Placement:
    """The bytes of `folder` beside those of a server's parameters, by the server's names."""
    tensors = stored(folder)
    gpt_oss = any(".experts.gate_up_proj_bias" in name for name in tensors)
    pieces: dict[str, list[tuple[tuple[int, ...], bytes]]] = defaultdict(list)
    for name, (dtype, shape, data) in tensors.items():
        parameter, slot, turned = _home(name, names if gpt_oss else replace(names, renamed={}))
        placed = _turned(data, shape) if turned else data
        if dtype == "BF16" and parameter in loaded and loaded[parameter].dtype == "float32":
            placed = _widened(placed)  # SGLang keeps the experts' biases in F32
        pieces[parameter].append((slot, placed))
    expected = {name: b"".join(data for _, data in sorted(found)) for name, found in pieces.items()}
    return Placement(
        len(tensors), sum(len(data) for _, _, data in tensors.values()), tuple(_differences(expected, loaded))
    )


def _differences(expected: Mapping[str, bytes], loaded: Mapping[str, Parameter]) -> Iterable[str]:
    for name in sorted(expected.keys() - loaded.keys()):
        yield f"no parameter {name}"
    weight_only = not any(_OF_INPUTS.search(name) for name in expected)
    for name, parameter in loaded.items():
        if name not in expected:
            if not is_optional(name) and not (weight_only and _OF_INPUTS.search(name)):
                yield f"nothing was loaded into {name}"
            continue
        wanted = expected[name]
        if len(wanted) != len(parameter.data):
            yield f"{name} has {len(parameter.data)} bytes, the checkpoint {len(wanted)}"
        elif wanted != parameter.data:
            differ = np.frombuffer(wanted, np.uint8) != np.frombuffer(parameter.data, np.uint8)
            yield f"{int(differ.sum())} of {differ.size} bytes differ in {name}"


def _home(name: str, names: Names) -> tuple[str, tuple[int, ...], bool]:
    """The parameter, the place in it, and whether the matrices are turned."""
    if found := _FUSED_EXPERT.search(name):
        part = re.sub("bias$", names.biases, _FUSED[found["part"]])
        return f"{name[: found.start()]}{names.experts}{part}", (0,), found["part"] in _TURNED
    for old, new in names.renamed.items():
        name = name.replace(old, new)
    if found := _EXPERT.search(name):
        which = "w2" if found["which"] == "down" else "w13"
        home = f"{name[: found.start()]}{names.experts}{which}_{found['part']}"
        return home, (int(found["number"]), found["which"] == "up"), False
    if found := _STACKED.search(name):
        order, stack = (("q", "k", "v"), "qkv_proj") if found["qkv"] else (("gate", "up"), "gate_up_proj")
        member = found["qkv"] or found["mlp"]
        return f"{name[: found.start()]}.{stack}.{found['part']}", (order.index(member),), False
    return name, (0,), False


def _turned(data: bytes, shape: tuple[int, ...]) -> bytes:
    return np.frombuffer(data, np.uint16).reshape(shape).swapaxes(-1, -2).tobytes()


def _widened(data: bytes) -> bytes:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).tobytes()


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors of a checkpoint as they lie on disk: name -> dtype, shape, bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
            found[name] = (str(tensor["dtype"]), tuple(tensor["shape"]), bytes(tensor["data"]))
    return found
