"""Synthetic checkpoints: near the size asked for, the same bytes on any machine, and models that transformers loads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fp4conv.errors import OutputError, UsageError
from fp4conv.safetensors_io import Reader
from fp4conv.sources import open_source
from fp4conv.synthetic import FAMILIES, write_checkpoint
from fp4conv.synthetic.shapes import fit, model_bytes

GOLDEN = {"gpt-oss": "c5702209003070af", "llama": "a563c23f8bb9e87c"}
CHOICES = [("gpt-oss", "bf16"), ("gpt-oss", "mxfp4"), ("llama", "bf16"), ("qwen3-moe", "bf16")]


def tensors_of(root: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Each tensor as NumPy holds its bits: BF16 as uint16."""
    source = open_source(root)
    found = {}
    with Reader(root) as reader:
        for name, ref in source.tensors.items():
            bits = np.empty(ref.spec.shape, np.uint8 if ref.spec.dtype == "U8" else np.uint16)
            reader.read_into(ref.file, ref.offset, bits)
            found[name] = bits
    return found


def as_float(bits: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(("family", "format"), CHOICES)
@pytest.mark.parametrize("nbytes", [6_000_000, 60_000_000, 1_000_000_000, 10_000_000_000, 30_000_000_000])
def test_the_size_is_about_what_was_asked(family: str, format: str, nbytes: int) -> None:
    assert abs(model_bytes(fit(family, format, nbytes)) / nbytes - 1) < 0.10


@pytest.mark.parametrize(
    ("family", "widths"), [("gpt-oss", (2880, 2880)), ("llama", (2048, 8192)), ("qwen3-moe", (2048, 768))]
)
def test_large_checkpoints_have_the_real_widths(family: str, widths: tuple[int, int]) -> None:
    made = fit(family, "bf16", 1_000_000_000)
    assert (made.hidden, made.intermediate) == widths


@pytest.mark.parametrize(("family", "format"), CHOICES)
def test_transformers_loads_it_and_misses_nothing(tmp_path: Path, family: str, format: str) -> None:
    pytest.importorskip("transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

    write_checkpoint(tmp_path, nbytes=6_000_000, family=family, format=format)
    quantized = {"quantization_config": Mxfp4Config(dequantize=True)} if format == "mxfp4" else {}
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.bfloat16, **quantized
    )
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("½ a word\n", return_tensors="pt").input_ids
    assert tokenizer.decode(tokens[0]) == "½ a word\n"
    with torch.no_grad():
        assert bool(torch.isfinite(model(tokens).logits).all())


def test_weights_have_outliers_zeros_of_both_signs_and_rows_of_their_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, nbytes=20_000_000, family="llama")
    bits = tensors_of(tmp_path)["model.layers.0.mlp.down_proj.weight"]
    values = as_float(bits)
    deviation = values.std()
    assert np.isfinite(values).all()
    assert np.count_nonzero(bits == 0x0000) > 100
    assert np.count_nonzero(bits == 0x8000) > 100
    assert np.abs(values).max() > 20 * deviation
    assert 0.01 < deviation < 0.1
    rows = values.std(axis=1)
    assert np.quantile(rows, 0.95) > 4 * np.quantile(rows, 0.05)
    blocks = values.reshape(-1, 32)
    assert (blocks == 0).all(axis=1).any()


def test_no_two_tensors_are_alike(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, nbytes=6_000_000, family="qwen3-moe")
    weights = [bits.tobytes() for bits in tensors_of(tmp_path).values() if bits.ndim > 1]
    assert len(set(weights)) == len(weights)


def test_mxfp4_has_zero_blocks_and_scales_of_real_models(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, nbytes=6_000_000, family="gpt-oss", format="mxfp4")
    tensors = tensors_of(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    assert set(np.unique(scales)) <= {0, *range(112, 127)}
    zero = (blocks == 0).all(axis=-1)
    assert zero.any()
    assert (scales[zero] == 0).any()
    assert zero[scales == 0].all(), "a zero scale byte is 2^-127: no real block has it"


def test_parts_of_a_weight_share_a_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, nbytes=6_000_000, family="gpt-oss", format="mxfp4", max_shard_bytes=300_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    weight_map = index["weight_map"]
    assert len(set(weight_map.values())) > 8
    for name, file in weight_map.items():
        if name.endswith("_blocks"):
            assert weight_map[name.replace("_blocks", "_scales")] == file
    assert index["metadata"]["total_size"] == sum(bits.nbytes for bits in tensors_of(tmp_path).values())


def test_the_bytes_follow_from_the_seed(tmp_path: Path) -> None:
    """Against digests of an earlier run: another release of NumPy or another machine must not change them."""
    assert digest_of(tmp_path / "a", family="gpt-oss", seed=0) == GOLDEN["gpt-oss"]
    assert digest_of(tmp_path / "b", family="llama", seed=0) == GOLDEN["llama"]
    assert digest_of(tmp_path / "c", family="llama", seed=1) != GOLDEN["llama"]


def digest_of(root: Path, *, family: str, seed: int) -> str:
    write_checkpoint(root, nbytes=5_000_000, family=family, seed=seed)
    digest = hashlib.sha256()
    for path in sorted(root.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown family 'bert'"):
        write_checkpoint(tmp_path, nbytes=10**7, family="bert")
    with pytest.raises(UsageError, match="no synthetic llama checkpoint in 'mxfp4'"):
        write_checkpoint(tmp_path, nbytes=10**7, family="llama", format="mxfp4")
    (tmp_path / "precious").touch()
    for family in FAMILIES:
        with pytest.raises(OutputError, match="holds something already"):
            write_checkpoint(tmp_path, nbytes=10**7, family=family)
