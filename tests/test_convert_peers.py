"""Other people's code accepts what is written: transformers, ModelOpt, compressed-tensors, safetensors.

Each is asked for numbers (logits, dequantised weights), not only whether it opens the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from checkpoints import Array, array_of, config_of, read_raw, write_model
from library_checkpoints import made_by_compressed_tensors
from safetensors import safe_open

import fp4conv

if TYPE_CHECKING:
    import torch

Reference = Callable[[str], Path]
torch_ = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Sums in the same order, and no fight for the cores."""
    torch_.set_num_threads(1)


def loaded(folder: Path, **options: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits of a fixed prompt, state dict) of the model as transformers loads it; nothing may be missing."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **options
    )
    assert not any(info.values()), info
    model.eval()
    with torch_.no_grad():
        logits = model(torch_.arange(3, 23).reshape(1, -1)).logits
    return logits, model.state_dict()


# ---- transformers


def test_transformers_loads_gpt_oss_mxfp4_with_the_logits_of_our_bf16(reference: Reference, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fp4conv.convert(reference("gptoss-bf16"), tmp_path / "mxfp4", to="mxfp4")
    fp4conv.convert(tmp_path / "mxfp4", tmp_path / "bf16", to="bf16")
    dequantize = transformers.Mxfp4Config(dequantize=True)
    logits, weights = loaded(tmp_path / "mxfp4", quantization_config=dequantize, dtype=torch_.bfloat16)
    expected, ours = loaded(tmp_path / "bf16", dtype=torch_.bfloat16)
    assert sorted(weights) == sorted(ours)
    for name, value in ours.items():
        assert torch_.equal(weights[name], value), name
    assert torch_.equal(logits, expected)
    assert torch_.isfinite(logits).all()


@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_transformers_loads_our_shards(reference: Reference, tmp_path: Path, size: str) -> None:
    """Of a multi-shard output it reads the index: the logits are those of the source."""
    source = reference("llama-bf16")
    fp4conv.convert(source, tmp_path / "out", to="bf16", max_shard_size=size)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (size == "60KB")
    logits, _ = loaded(tmp_path / "out", dtype=torch_.bfloat16)
    assert torch_.equal(logits, loaded(source, dtype=torch_.bfloat16)[0])


@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_transformers_decompresses_our_dense_mxfp4(reference: Reference, tmp_path: Path, size: str) -> None:
    pytest.importorskip("compressed_tensors")
    fp4conv.convert(reference("llama-bf16"), tmp_path / "mxfp4", to="mxfp4", max_shard_size=size)
    fp4conv.convert(tmp_path / "mxfp4", tmp_path / "bf16", to="bf16")
    expected, _ = loaded(tmp_path / "bf16", dtype=torch_.bfloat16)
    logits, _ = loaded(tmp_path / "mxfp4", dtype=torch_.bfloat16)
    assert torch_.equal(logits, expected)


# ---- compressed-tensors


def test_our_config_and_tensors_are_those_that_compressed_tensors_writes(reference: Reference, tmp_path: Path) -> None:
    """Key for key, dtype for dtype; under the rule that it follows (EVEN) code for code."""
    made_by_compressed_tensors(reference("llama-bf16"), tmp_path / "theirs", "MXFP4A16")
    fp4conv.convert(reference("llama-bf16"), tmp_path / "ours", to="mxfp4", scale_rule="even")
    theirs, ours = (config_of(tmp_path / folder)["quantization_config"] for folder in ("theirs", "ours"))
    assert isinstance(theirs, dict)
    assert isinstance(ours, dict)
    extra = {"moe_sparsity_config"}  # null, and unknown to earlier releases
    assert set(theirs) - set(ours) <= extra
    assert not set(ours) - set(theirs)
    dense = theirs.pop("ignore")
    assert isinstance(dense, list)
    assert set(dense) <= set(ours.pop("ignore"))  # we name the embeddings too, which are no Linear
    assert ours == {key: value for key, value in theirs.items() if key not in extra}
    left, right = read_raw(tmp_path / "ours"), read_raw(tmp_path / "theirs")
    assert sorted(left) == sorted(right)
    for name, value in right.items():
        assert left[name][:2] == value[:2], name
        mine, their = array_of(left[name]), array_of(value)
        if name.endswith("_packed"):
            mine, their = without_negative_zeros(mine), without_negative_zeros(their)
        assert np.array_equal(mine, their), name


def test_we_read_what_compressed_tensors_writes(reference: Reference, tmp_path: Path) -> None:
    made_by_compressed_tensors(reference("llama-bf16"), tmp_path / "theirs", "MXFP4A16")
    found = fp4conv.inspect(tmp_path / "theirs")
    assert (found.format, found.layout, found.warnings) == ("mxfp4", "compressed-tensors", ())
    fp4conv.convert(tmp_path / "theirs", tmp_path / "bf16", to="bf16")
    expected, _ = loaded(tmp_path / "theirs", dtype=torch_.bfloat16)
    assert torch_.equal(loaded(tmp_path / "bf16", dtype=torch_.bfloat16)[0], expected)


def without_negative_zeros(packed: Array) -> Array:
    """Codes [..., 2] a byte, with 0 for 8: the library drops the sign of what it rounds to zero."""
    codes = np.stack([packed.astype(np.uint8) & 15, packed.astype(np.uint8) >> 4], axis=-1)
    return np.where(codes == 8, 0, codes)


# ---- ModelOpt


def dequantised_by_modelopt(packed: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """BF16 [N, K] of packed [N, K/2], block scales E4M3 [N, K/16], and the F32 scalar."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    shape = torch_.Size((packed.shape[0], packed.shape[1] * 2))
    quantised = NVFP4QTensor(shape, torch_.bfloat16, packed)
    dequantised: torch.Tensor = quantised.dequantize(
        dtype=torch_.bfloat16, scale=scale, double_scale=tensor_scale, block_sizes={-1: 16}
    )
    return dequantised


@pytest.mark.parametrize(
    ("name", "rule"), [("llama-bf16", "mse"), ("qwen3moe-bf16", "four-over-six"), ("gptoss-bf16", "amax")]
)
def test_modelopt_dequantises_our_nvfp4_to_our_bf16(reference: Reference, tmp_path: Path, name: str, rule: str) -> None:
    pytest.importorskip("modelopt.torch.quantization")
    fp4conv.convert(reference(name), tmp_path / "nvfp4", to="nvfp4", scale_rule=rule)
    fp4conv.convert(tmp_path / "nvfp4", tmp_path / "bf16", to="bf16")
    fused = name.startswith("gptoss")
    suffix, weight = ("_weight_scale", "") if fused else (".weight_scale", ".weight")
    with (
        safe_open(tmp_path / "nvfp4" / "model.safetensors", "pt") as codes,
        safe_open(tmp_path / "bf16" / "model.safetensors", "pt") as values,
    ):
        stems = [key.removesuffix(suffix) for key in codes.keys() if key.endswith(suffix)]  # noqa: SIM118 -- no mapping
        assert stems
        for stem in stems:
            packed, scale = codes.get_tensor(stem + weight), codes.get_tensor(stem + suffix)
            tensor_scale, expected = codes.get_tensor(f"{stem}{suffix}_2"), values.get_tensor(stem + weight)
            if not fused:
                assert torch_.equal(dequantised_by_modelopt(packed, scale, tensor_scale), expected), stem
                continue
            for e in range(packed.shape[0]):  # K-major: ModelOpt works on the turned matrix
                turned = packed[e].T.contiguous(), scale[e].T.contiguous()
                assert torch_.equal(dequantised_by_modelopt(*turned, tensor_scale).T, expected[e]), (stem, e)


# ---- safetensors


@pytest.mark.parametrize(
    ("name", "to"),
    [("gptoss-bf16", "mxfp4"), ("gptoss-bf16", "nvfp4"), ("llama-bf16", "mxfp4"), ("llama-nvfp4-default", "f16")],
)
def test_the_safetensors_library_reads_every_tensor(reference: Reference, tmp_path: Path, name: str, to: str) -> None:
    fp4conv.convert(reference(name), tmp_path / "out", to=to, max_shard_size="300KB")
    expected = read_raw(tmp_path / "out")
    seen = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                assert tuple(tensor.shape) == expected[key][1]
                assert tensor.reshape(-1).view(torch_.uint8).numpy().tobytes() == expected[key][2]
                seen += 1
    assert seen == len(expected)


def test_config_of_a_text_model_inside_a_multimodal_one_gets_its_dtype(tmp_path: Path) -> None:
    config = {
        "model_type": "x",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "num_hidden_layers": 1},
    }
    tensors = {"model.layers.0.mlp.down_proj.weight": np.ones((32, 32), np.float32)}
    source = write_model(tmp_path / "src", tensors, json.loads(json.dumps(config)))
    fp4conv.convert(source, tmp_path / "out", to="f16")
    written = config_of(tmp_path / "out")
    assert written["torch_dtype"] == "float16"
    assert written["text_config"] == {"dtype": "float16", "num_hidden_layers": 1}
