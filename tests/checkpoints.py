"""Checkpoints for tests of conversion: written by the safetensors library, read by it, decoded with ml_dtypes.

Nothing here uses fp4conv, so that what the tests compare it with is somebody else's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import TensorSpec, serialize_file

Array: TypeAlias = npt.NDArray[np.generic]
Values: TypeAlias = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)
Raw: TypeAlias = dict[str, tuple[str, tuple[int, ...], bytes]]

INDEX = "model.safetensors.index.json"
NVFP4_SUFFIXES = ("weight", "weight_scale", "weight_scale_2")  # as ModelOpt names the parts of a weight
_NUMPY = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U8": np.dtype(np.uint8),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_LIBRARY_NAMES = {np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn"}  # where NumPy's name is not the library's
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def bf16(values: npt.ArrayLike) -> Array:
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16)


def e4m3(values: npt.ArrayLike) -> Array:
    return np.asarray(values, np.float32).astype(ml_dtypes.float8_e4m3fn)


def noise(shape: Sequence[int], seed: int = 0, scale: float = 0.05) -> Array:
    """BF16 normal values."""
    return bf16(np.random.default_rng(seed).standard_normal(tuple(shape)) * scale)


def write_shard(path: Path, tensors: Mapping[str, Array]) -> None:
    held = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()}
    specs = {name: _spec(value) for name, value in held.items()}
    serialize_file(specs, str(path), {"format": "pt"})


def _spec(value: Array) -> TensorSpec:
    name = _LIBRARY_NAMES.get(value.dtype, value.dtype.name)
    return TensorSpec(dtype=name, shape=list(value.shape), data_ptr=value.ctypes.data, data_len=value.nbytes)


def write_model(
    folder: Path,
    tensors: Mapping[str, Array],
    config: Mapping[str, object] | None = None,
    shards: Sequence[Sequence[str]] = (),
) -> Path:
    """A checkpoint in `folder`; with `shards` (names of tensors each) several files and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test", "dtype": "bfloat16"}))
    if not shards:
        write_shard(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    assert set(weight_map) == set(tensors), "every tensor has a shard"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_raw(folder: Path) -> Raw:
    """Name -> (dtype, shape, bytes) of every tensor in the safetensors files of `folder`."""
    found: Raw = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                assert name not in found
                found[name] = (entry["dtype"], tuple(entry["shape"]), content[start + first : start + last])
    return found


def stems(raw: Raw, suffix: str) -> list[str]:
    """Stems of the quantised weights whose part ends in `suffix`; there is at least one."""
    found = sorted(name.removesuffix(suffix) for name in raw if name.endswith(suffix))
    assert found
    return found


def array_of(raw: tuple[str, tuple[int, ...], bytes]) -> Array:
    dtype, shape, content = raw
    return np.frombuffer(content, _NUMPY[dtype]).reshape(shape)


def config_of(folder: Path, name: str = "config.json") -> dict[str, object]:
    parsed = json.loads((folder / name).read_text())
    assert isinstance(parsed, dict)
    return parsed


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> digest of every file below `folder`, hidden ones too; folders have the digest ''."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


# ---- decoding, by ml_dtypes


def unpack(packed: Array) -> Values:
    """Code values F32 [..., K] of packed codes [..., K/2]; the even index lies in the low nibble."""
    codes = packed.astype(np.uint8)
    values: Values = E2M1[np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)]
    return values


def decode_mxfp4(packed: Array, scales: Array) -> npt.NDArray[np.float64]:
    """Exact values [..., N, K] of codes [..., N, K/2] (or grouped [..., N, K/32, 16]) and E8M0 bytes [..., N, K/32]."""
    flat = packed.reshape(*scales.shape[:-1], -1)
    factors = scales.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    values: npt.NDArray[np.float64] = unpack(flat).astype(np.float64) * np.repeat(factors, 32, axis=-1)
    return values


def decode_nvfp4(packed: Array, scales: Array, tensor_scale: Array) -> npt.NDArray[np.float64]:
    """Values [..., N, K] of codes [..., N, K/2], E4M3 scales [..., N, K/g] and the F32 scalar: exact, in F64."""
    values = unpack(packed).astype(np.float64)
    factors = scales.astype(np.float64) * np.float64(tensor_scale.reshape(()))
    values *= np.repeat(factors, values.shape[-1] // scales.shape[-1], axis=-1)
    return values


def turned(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """The last two axes swapped: between [E, N, K] and ModelOpt's K-major [E, K, N]."""
    return np.ascontiguousarray(np.swapaxes(array, -1, -2))


def decode_experts_nvfp4(raw: Raw, stem: str) -> npt.NDArray[np.float64]:
    """Values [E, K, N] of a fused expert parameter in ModelOpt's layout."""
    packed, scales = array_of(raw[stem]), array_of(raw[f"{stem}_weight_scale"])
    return turned(decode_nvfp4(turned(packed), turned(scales), array_of(raw[f"{stem}_weight_scale_2"])))


def decode_experts_mxfp4(raw: Raw, stem: str) -> npt.NDArray[np.float64]:
    """Values [E, K, N] of a fused expert parameter of gpt-oss in MXFP4."""
    return turned(decode_mxfp4(array_of(raw[f"{stem}_blocks"]), array_of(raw[f"{stem}_scales"])))


def assert_same_tensors(ours: Raw, theirs: Raw, leaving_out: tuple[str, ...] = ()) -> None:
    """Names, dtypes, shapes and bytes are equal, but for tensors that end in one of `leaving_out`."""
    theirs = {name: value for name, value in theirs.items() if not (leaving_out and name.endswith(leaving_out))}
    assert sorted(ours) == sorted(theirs)
    for name, (dtype, shape, content) in theirs.items():
        assert ours[name][:2] == (dtype, shape), name
        assert ours[name][2] == content, name
