"""The oracle against other people's encoders: gfloat, compressed-tensors and ModelOpt."""

from __future__ import annotations

import gfloat
import gfloat.formats
import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_cases import BF16, F32, decode, encode, normal, to_bf16

from fp4conv.formats import MXFP4, NVFP4, NVFP4_AMAX_DIVISOR, ScaleRule, Ties
from fp4conv.kernels import reference, small_floats


def weights(bf16: bool, seed: int = 0) -> F32 | BF16:
    x = normal((24, 192), seed, spread=3)
    x[3] *= np.float32(2.0**-130)  # subnormal blocks
    x[5] = np.round(x[5] * 4) / 4  # many exact ties
    return to_bf16(x) if bf16 else x


def as_torch(x: F32 | BF16) -> torch.Tensor:
    if x.dtype == np.uint16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def tensor_scale_of(x: torch.Tensor) -> float:
    return float(x.abs().max().float() / NVFP4_AMAX_DIVISOR)


def bits_of(x: torch.Tensor) -> npt.NDArray[np.uint16]:
    found: npt.NDArray[np.uint16] = x.contiguous().view(torch.int16).numpy().view(np.uint16)
    return found


@pytest.mark.parametrize("bf16", [True, False])
def test_floor_equals_gfloat(bf16: bool) -> None:
    x = weights(bf16)
    ours = encode(reference, MXFP4, x, ScaleRule.FLOOR)
    values: F32 = small_floats.bf16_to_f32(x) if bf16 else x  # type: ignore[assignment,arg-type]
    for block, codes, scale in zip(values.reshape(-1, 32), ours.codes.reshape(-1, 32), ours.scales.flat, strict=True):
        wide = block.astype(np.float64)
        s = gfloat.compute_scale_amax(gfloat.formats.format_info_ocp_e2m1.emax, wide)
        theirs = list(gfloat.encode_block(gfloat.formats.format_info_mxfp4_e2m1, s, (wide / s).tolist()))
        assert [scale, *codes] == theirs


@pytest.mark.parametrize("bf16", [True, False])
def test_even_equals_compressed_tensors(bf16: bool) -> None:
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    mantissas = torch.cat([torch.linspace(1, 2, 4097)[:-1], torch.tensor([1.75 - 2**-8, 1.75, 1.75 + 2**-7])])
    amax = (mantissas[None] * torch.exp2(torch.arange(-120, 121, 8.0))[:, None]).reshape(-1)
    amax = amax.bfloat16() if bf16 else amax
    theirs = generate_mx_scales(amax).clamp(0, 255).to(torch.uint8).numpy()
    x = np.zeros((amax.numel(), 32), dtype=np.float32)
    x[:, 7] = -amax.float().numpy()
    ours = encode(reference, MXFP4, to_bf16(x) if bf16 else x, ScaleRule.EVEN)
    assert np.array_equal(ours.scales[:, 0], theirs)


def test_rceil_ties_down_equals_modelopt() -> None:
    """ModelOpt's MXFP4QTensor, which the gpt-oss converter uses: RCEIL, ties down, any zero as code 8."""
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor

    x = weights(bf16=True)
    tensor, scale = MXFP4QTensor.quantize(as_torch(x), 32)
    ours = encode(reference, MXFP4, x, ScaleRule.RCEIL, Ties.DOWN)
    zero_block = ours.scales.repeat(32).reshape(x.shape) == 0
    assert np.array_equal(ours.scales.reshape(-1), scale.numpy().reshape(-1))
    theirs = tensor._quantized_data.numpy().reshape(x.shape[0], -1)
    codes = np.stack([theirs & 15, theirs >> 4], axis=-1).reshape(x.shape)
    same = (ours.codes == codes) | ((ours.codes & 7 == 0) & (codes & 7 == 0))
    assert same[~zero_block].all()


@pytest.mark.parametrize("bf16", [True, False])
def test_nvfp4_amax_equals_modelopt(bf16: bool) -> None:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    x = weights(bf16)
    tensor, scale, double = NVFP4QTensor.quantize(as_torch(x), 16)
    ours = encode(reference, NVFP4, x, ScaleRule.AMAX, tensor_scale=tensor_scale_of(as_torch(x)))
    assert float(double) == tensor_scale_of(as_torch(x))
    assert np.array_equal(ours.scales, scale.view(torch.uint8).numpy())
    assert np.array_equal(ours.packed, tensor._quantized_data.numpy())


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nvfp4_decode_equals_modelopt(block: int, dtype: torch.dtype) -> None:
    """Every code under random scales. ModelOpt's table gives +0 for code 8, which is -0."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    rng = np.random.default_rng(3)
    packed = rng.integers(0, 256, (40, 96), dtype=np.uint8)
    scales = rng.integers(1, 127, (40, 192 // block), dtype=np.uint8)
    tensor_scale = float(np.float32(0.00123))
    theirs = NVFP4QTensor(torch.Size((40, 192)), dtype, torch.from_numpy(packed)).dequantize(
        dtype,
        scale=torch.from_numpy(scales).view(torch.float8_e4m3fn),
        double_scale=torch.tensor(tensor_scale),
        block_sizes={-1: block},
    )
    if dtype == torch.float32:
        out = np.empty((40, 192), dtype=np.float32)
        assert reference.decode_nvfp4(packed, scales, False, tensor_scale, out) == -1
        assert np.array_equal(out, theirs.numpy())
    else:
        bits = np.empty((40, 192), dtype=np.uint16)
        assert reference.decode_nvfp4(packed, scales, False, tensor_scale, bits) == -1
        zero = bits & 0x7FFF == 0
        assert np.array_equal(bits[~zero], bits_of(theirs)[~zero])
        assert not bits_of(theirs)[zero].any()


def test_mxfp4_decode_equals_gfloat() -> None:
    rng = np.random.default_rng(4)
    packed = rng.integers(0, 256, (30, 16), dtype=np.uint8)
    scales = np.linspace(0, 252, 30).astype(np.uint8)[:, None].copy()
    ours = decode(reference, MXFP4, packed, scales)
    for row, byte, codes in zip(ours, scales[:, 0], packed, strict=True):
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
        theirs = gfloat.decode_block(gfloat.formats.format_info_mxfp4_e2m1, [int(byte), *map(int, nibbles)])
        assert row.tolist() == list(theirs)


def test_zeros_of_both_signs() -> None:
    """MXFP4 keeps the sign bit; NVFP4 takes quotient < 0, so a small negative is code 8 and -0.0 is code 0."""
    x = np.zeros((1, 32), dtype=np.float32)
    x[0, 1::2] = -0.0
    mx = encode(reference, MXFP4, x, ScaleRule.RCEIL)
    assert mx.scales.tolist() == [[0]]
    assert mx.codes[0, :2].tolist() == [0, 8]
    nv = encode(reference, NVFP4, x, ScaleRule.AMAX)
    assert nv.scales.tolist() == [[0x38, 0x38]]
    assert not nv.codes.any()
    x[0, 0], x[0, 2] = 6.0, -1e-3
    assert encode(reference, MXFP4, x, ScaleRule.RCEIL).codes[0, :3].tolist() == [7, 8, 8]
    assert encode(reference, NVFP4, x, ScaleRule.AMAX).codes[0, :3].tolist() == [7, 0, 8]


def test_rules_of_mxfp4_at_the_edges() -> None:
    """amax = 6, just above 6, 7 - ulp, 7: floor, rceil and even part ways exactly there."""
    below_seven = np.nextafter(np.float32(7), np.float32(0))
    amax = [4.0, 6.0, np.nextafter(np.float32(6), np.float32(9)), below_seven, 7.0]
    x = np.zeros((5, 32), dtype=np.float32)
    x[:, 31] = amax
    assert encode(reference, MXFP4, x, ScaleRule.FLOOR).scales[:, 0].tolist() == [127, 127, 127, 127, 127]
    assert encode(reference, MXFP4, x, ScaleRule.RCEIL).scales[:, 0].tolist() == [127, 127, 128, 128, 128]
    assert encode(reference, MXFP4, x, ScaleRule.EVEN).scales[:, 0].tolist() == [127, 127, 127, 127, 128]


def test_four_over_six_takes_the_better_of_two() -> None:
    """A block of 4s and 3s is exact with amax on 4 (3 is a code); with amax on 6 the 3s fall on 4.5."""
    x = np.tile(np.array([4.0, 3.0, -2.0, 1.5], dtype=np.float32), (1, 4))
    on_four = encode(reference, NVFP4, x, ScaleRule.FOUR_OVER_SIX)
    assert on_four.scales.tolist() == [[0x38]]
    assert on_four.noise.tolist() == [0.0]
    on_six = encode(reference, NVFP4, x * np.float32(1.5), ScaleRule.FOUR_OVER_SIX)  # 6, 4.5, 3, 2.25
    assert on_six.scales.tolist() == [[0x3C]], "1.5, again with amax on 4"
    plain = encode(reference, NVFP4, np.full((1, 16), 6.0, dtype=np.float32), ScaleRule.FOUR_OVER_SIX)
    assert plain.scales.tolist() == [[0x38]], "both are exact: the smaller scale"


def test_sums_are_in_the_documented_order() -> None:
    """1e16 + 1 + 1 + ... depends on the order: halves are added onto halves."""
    terms = np.ones((1, 32))
    terms[0, 0] = 1e16
    assert reference.halving_sum(terms)[0] == 1e16 + 30.0  # 1e16 + 1 rounds back once, then 2, 4, 8, 16 count
    assert reference.halving_sum(np.arange(16.0)[None])[0] == 120.0
