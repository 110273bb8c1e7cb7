"""llama.cpp's own `gguf` package decodes our codes and scales to our values.

GGUF has the same numbers in another order: an MXFP4 block is its scale byte and then the codes of values 0 to 15 in
low nibbles beside those of 16 to 31 in high ones; NVFP4 gathers four blocks of 16, with the four scales first, and
keeps the tensor scale outside. So only bytes are moved here; what they are worth is gguf's word.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import fp4conv
from fp4conv.model import Decoded
from servers_checks import placement
from servers_checks.checkpoints import Checkpoints
from servers_checks.results import Row

Bytes = npt.NDArray[np.uint8]
Stored = tuple[str, tuple[int, ...], bytes]  # dtype, shape, bytes as they lie on disk
Values = npt.NDArray[np.float32]
Decode = Callable[[Bytes, Bytes], Values]  # of packed codes and block scales


def checks(checkpoints: Checkpoints) -> Iterator[Row]:
    version = importlib.metadata.version("gguf")
    mxfp4 = (
        ("our MXFP4 Llama", checkpoints.ours("llama-mxfp4"), ("weight_packed", "weight_scale")),
        ("our MXFP4 of the gpt-oss QAT checkpoint", checkpoints.ours("gptoss-mxfp4"), ("_blocks", "_scales")),
        (
            "gpt-oss with every kind of scale and both zeros",
            checkpoints.theirs("gptoss-mxfp4-native-like"),
            ("_blocks", "_scales"),
        ),
    )
    for what, folder, suffixes in mxfp4:
        yield _decoded(version, what, folder, suffixes, mxfp4_values)
    nvfp4 = ("weight", "weight_scale")
    for what, name in (("our NVFP4 Llama", "llama-nvfp4-w4a16"), ("our NVFP4 of MXFP4", "llama-mxfp4-nvfp4")):
        yield _decoded(version, what, checkpoints.ours(name), nvfp4, nvfp4_values)
    yield _control(version, checkpoints.ours("llama-mxfp4"))


def mxfp4_values(packed: Bytes, scales: Bytes) -> Values:
    """What gguf makes of U8 codes [..., K/2] and E8M0 scales [..., K/32]."""
    codes = _codes(packed).reshape(*scales.shape, 32)
    blocks = np.concatenate([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], axis=-1)
    values: Values = dequantize(blocks.reshape(*scales.shape[:-1], -1), GGMLQuantizationType.MXFP4)
    return values


def nvfp4_values(packed: Bytes, scales: Bytes) -> Values:
    """What gguf makes of U8 codes [N, K/2] and E4M3 scales [N, K/16], K % 64 = 0, before the tensor scale."""
    codes = _codes(packed).reshape(*scales.shape, 16)
    halves = (codes[..., :8] | codes[..., 8:] << 4).reshape(*scales.shape[:-1], -1, 32)
    blocks = np.concatenate([scales.reshape(*scales.shape[:-1], -1, 4), halves], axis=-1)
    values: Values = dequantize(blocks.reshape(*scales.shape[:-1], -1), GGMLQuantizationType.NVFP4)
    return values


# NVFP4 is a product of three, of which we round (block scale x tensor scale) and gguf (code x block scale) first.
_ROUNDING: Mapping[Decode, float] = {mxfp4_values: 0.0, nvfp4_values: 2.0**-22}


def _codes(packed: Bytes) -> Bytes:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _decoded(version: str, what: str, folder: Path, suffixes: tuple[str, str], decode: Decode) -> Row:
    """Every quantised tensor of `folder`: gguf's values beside those that `fp4conv.open(...).read` gives."""
    values, tensors, different = 0, 0, 0
    checkpoint, stored = fp4conv.open(folder), placement.stored(folder)
    for weight in checkpoint.model.weights:
        if not isinstance(weight.value, Decoded):
            continue
        theirs = _of_gguf(stored, weight.name, suffixes, decode)
        ours = np.asarray(checkpoint.read(weight.name), np.float32)
        if "_blocks" in suffixes:  # the BF16 form of gpt-oss experts lies K first
            ours = ours.swapaxes(-1, -2)
        tensors, values = tensors + 1, values + ours.size
        different += int((np.abs(theirs - ours) > _ROUNDING[decode] * np.abs(ours)).sum())
    rounding = ", up to the rounding of a product" if _ROUNDING[decode] else ""
    result = f"{tensors} tensors, {values:,} values, {different or 'none'} different{rounding}"
    return Row("llama.cpp", f"gguf {version}", f"{what}: decoded by gguf", result, tensors > 0 and not different)


def _of_gguf(stored: Mapping[str, Stored], name: str, suffixes: tuple[str, str], decode: Decode) -> Values:
    stem = name if suffixes[0].startswith("_") else name.removesuffix("weight")
    packed, scales = (_bytes(stored[stem + suffix]) for suffix in suffixes)
    values = decode(packed.reshape(*scales.shape[:-1], -1), scales)
    if decode is nvfp4_values:
        values = values * np.frombuffer(stored[stem + "weight_scale_2"][2], np.float32)
    return values


def _bytes(tensor: Stored) -> Bytes:
    _, shape, data = tensor
    return np.frombuffer(data, np.uint8).reshape(shape)


def _control(version: str, folder: Path) -> Row:
    """One code changed: the comparison must see it."""
    checkpoint = fp4conv.open(folder)
    name = next(weight.name for weight in checkpoint.model.weights if isinstance(weight.value, Decoded))

    def spoilt(packed: Bytes, scales: Bytes) -> Values:
        changed = packed.copy()
        changed.reshape(-1)[7] ^= 2
        return mxfp4_values(changed, scales)

    theirs = _of_gguf(placement.stored(folder), name, ("weight_packed", "weight_scale"), spoilt)
    different = int((theirs != np.asarray(checkpoint.read(name), np.float32)).sum())
    what = "control: one code of our MXFP4 Llama changed"
    return Row("llama.cpp", f"gguf {version}", what, f"{different} different: the comparison sees it", different == 1)
