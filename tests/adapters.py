"""Adapters for tests, made from arrays; and merges held against peft's, as far as the order of sums allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
from checkpoints import Array, Raw, array_of, write_shard

ROOT = "base_model.model."
CONFIG: dict[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": "0.21.2"}
SHARE = 1e-4  # of the BF16 elements may differ: BLAS adds up in an order of its own


def write_adapter(folder: Path, tensors: Mapping[str, Array], **config: object) -> Path:
    """An adapter as peft saves it; names without their 'base_model.model.'."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    write_shard(folder / "adapter_model.safetensors", {ROOT + name: value for name, value in tensors.items()})
    return folder


def factors(module: str, n: int, k: int, *, rank: int = 4, seed: int = 0, scale: float = 0.1) -> dict[str, Array]:
    """lora_A [rank, K] and lora_B [N, rank] of a linear layer, F32."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, k)) * scale, rng.standard_normal((n, rank)) * scale
    return {f"{module}.lora_A.weight": a.astype(np.float32), f"{module}.lora_B.weight": b.astype(np.float32)}


def ulp_bf16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The distance to the next BF16 number: 2^(exponent - 7), at least BF16's smallest number."""
    _, exponents = np.frexp(values)
    steps: npt.NDArray[np.float64] = np.ldexp(1.0, np.maximum(exponents - 8, -133))
    return steps


def assert_merged_alike(ours: Raw, theirs: Raw, base: Raw) -> None:
    """Equal but for at most SHARE of the values that changed, each by an ulp of the largest of W, delta and result."""
    differing = changed = 0
    for name, raw in theirs.items():
        assert ours[name][:2] == raw[:2], name
        if ours[name][2] == raw[2] and base.get(name) == raw:
            continue
        found, expected = (array_of(one[name]).astype(np.float64) for one in (ours, theirs))
        before = array_of(base[name]).astype(np.float64)
        largest = np.maximum(np.maximum(abs(before), abs(expected)), abs(expected - before))
        assert (abs(found - expected) <= ulp_bf16(largest)).all(), name
        differing += int((found != expected).sum())
        changed += found.size
    assert changed, "nothing was merged"
    assert differing <= max(1, SHARE * changed), f"{differing} of {changed}"


def bf16_of(values: npt.NDArray[np.float32]) -> Array:
    return values.astype(ml_dtypes.bfloat16)
