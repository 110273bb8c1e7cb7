"""What ModelOpt exports when asked for MXFP4: linear layers are read, gpt-oss is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Raw, array_of, config_of, decode_mxfp4, read_raw, tree

import fp4conv
from fp4conv.errors import Fp4convError

Reference = Callable[[str], Path]
NAMES = [
    "llama-mxfp4-attempt-default",
    "llama-mxfp4-attempt-mlp-weight-only",
    "qwen3moe-mxfp4-attempt-default",
    "qwen3moe-mxfp4-attempt-mlp-weight-only",
]


def find(name: str, reference: Reference, full_reference: Reference) -> Path:
    return reference(name) if name == NAMES[0] else full_reference(name)


def quantised(raw: Raw) -> list[str]:
    found = [name.removesuffix(".weight_scale") for name in raw if name.endswith(".weight_scale")]
    assert found
    return found


@pytest.mark.parametrize("name", NAMES)
def test_its_values_are_read(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    """By the format's own arithmetic (ml_dtypes), and by ModelOpt's decoder."""
    torch = pytest.importorskip("torch")
    tensors = pytest.importorskip("modelopt.torch.quantization.qtensor.mxfp4_tensor")
    source = find(name, request.getfixturevalue("reference"), request.getfixturevalue("full_reference"))
    assert (fp4conv.inspect(source).format, fp4conv.inspect(source).layout) == ("mxfp4", "modelopt")
    assert fp4conv.inspect(source).warnings == ()
    result = fp4conv.convert(source, tmp_path / "out", to="bf16")
    assert result.sqnr_db is None
    before, after = read_raw(source), read_raw(tmp_path / "out")
    for module in quantised(before):
        codes, scales = (array_of(before[f"{module}.{suffix}"]) for suffix in ("weight", "weight_scale"))
        ours = array_of(after[f"{module}.weight"])
        assert np.array_equal(ours.astype(np.float64), decode_mxfp4(codes, scales))
        shape = (codes.shape[0], codes.shape[1] * 2)
        held = tensors.MXFP4QTensor(shape, torch.bfloat16, torch.from_numpy(codes.astype(np.uint8)))
        theirs = held.dequantize(scale=torch.from_numpy(scales.astype(np.uint8)), block_sizes={-1: 32})
        assert np.array_equal(ours.astype(np.float32), theirs.float().numpy())
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_laid_out_anew_codes_and_scales_are_kept(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    """In the layout that vLLM serves; nothing is quantised again."""
    source = find(name, request.getfixturevalue("reference"), request.getfixturevalue("full_reference"))
    result = fp4conv.convert(source, tmp_path / "out", to="mxfp4")
    assert (result.layout, result.sqnr_db) == ("compressed-tensors", None)
    before, after = read_raw(source), read_raw(tmp_path / "out")
    for module in quantised(before):
        assert after[f"{module}.weight_packed"] == before[f"{module}.weight"]
        assert after[f"{module}.weight_scale"] == before[f"{module}.weight_scale"]
    assert len(before) == len(after)


def test_of_gpt_oss_it_is_refused_with_the_reason(full_reference: Reference, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for to in ("bf16", "mxfp4", "nvfp4"):
        with pytest.raises(Fp4convError, match=r"experts\.\w+_weight_scale.*out-features"):
            fp4conv.convert(full_reference("gptoss-mxfp4-attempt-export"), tmp_path / "out", to=to)
    assert tree(tmp_path) == before
