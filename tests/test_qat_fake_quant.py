"""The fake quantiser of training against the codec of exports, bit by bit, and the path of its gradient."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4conv.qat import fake_quant
from fp4conv.qat.checks import decoded
from fp4conv.qat.fake_quant import fake_quantise

BLOCK = {"mxfp4": 32, "nvfp4": 16}
AMAX = (1.0, 0.0838, 3.0e38, 1e-3, 1e-30, 2.0**-140, 2.0**-149, 0.0)


def bits(tensor: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
    found: npt.NDArray[np.unsignedinteger]
    found = tensor.view(torch.uint32 if tensor.dtype == torch.float32 else torch.uint16).numpy()
    return found


def through_codec(x: torch.Tensor, format_name: str, amax: float | None = None) -> torch.Tensor:
    """[N, K] by way of the compiled codec, float32 values rounded once to the dtype of x."""
    values, bad = decoded(x.to(torch.float32).numpy(), format_name, amax)
    assert bad == -1
    return torch.from_numpy(values).to(x.dtype)


def assert_same(x: torch.Tensor, format_name: str, amax: float | None = None) -> None:
    scalar = None if amax is None else torch.tensor(amax, dtype=torch.float32)
    ours = fake_quantise(x, format_name, scalar)
    assert ours.dtype == x.dtype
    exact = None if scalar is None else float(scalar)
    np.testing.assert_array_equal(bits(ours), bits(through_codec(x, format_name, exact)))


def finite_16_bit(dtype: torch.dtype) -> torch.Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return every[torch.isfinite(every)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_in_random_company(dtype: torch.dtype) -> None:
    values = finite_16_bit(dtype)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        order = torch.randperm(len(values), generator=generator)[: len(values) // 32 * 32]
        x = values[order].reshape(-1, 32)
        assert_same(x, "mxfp4")
        for amax in AMAX:
            assert_same(x, "nvfp4", amax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_beside_a_value_of_its_own_size(dtype: torch.dtype) -> None:
    """Each value in a block of its own with one twice as large: no value disappears beside a giant."""
    values = finite_16_bit(dtype)
    values = values[values.abs() <= torch.finfo(dtype).max / 2]
    x = torch.zeros(len(values), 32, dtype=dtype)
    x[:, 5], x[:, 20] = values, values * 2
    assert_same(x, "mxfp4")
    assert_same(x, "nvfp4", float(x.abs().amax()))


def test_ties_and_the_borders_of_scales_in_f32() -> None:
    """amax around 6 x 2^k by single steps, and values on every midpoint between codes."""
    above = np.float32(6.0).view(np.uint32) + np.arange(-40, 41, dtype=np.int64)
    amax = above.astype(np.uint32).view(np.float32)
    midpoints = np.array([0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -5], np.float32)
    blocks = np.zeros((amax.size * 9, 32), np.float32)
    for row, (power, largest) in enumerate((p, a) for p in range(-120, 121, 30) for a in amax):
        blocks[row, 0] = np.ldexp(largest, power)
        blocks[row, 1 : 1 + midpoints.size] = np.ldexp(midpoints, power)
    x = torch.from_numpy(blocks)
    assert_same(x, "mxfp4")
    for largest in (6.0, 2688.0, 6.0 * 2.0**100):
        assert_same(x, "nvfp4", largest)


f32_bits = st.integers(0, 2**32 - 1).map(lambda i: np.uint32(i).view(np.float32)).filter(np.isfinite)


@given(st.lists(f32_bits, min_size=32, max_size=32), st.one_of(st.none(), f32_bits))
@settings(max_examples=300, deadline=None)
def test_any_f32_block(values: list[np.float32], amax: np.float32 | None) -> None:
    x = torch.from_numpy(np.array([values], np.float32))
    assert_same(x, "mxfp4")
    largest = abs(float(amax)) if amax is not None else float(x.abs().amax())
    assert_same(x, "nvfp4", largest)


@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
def test_experts_that_are_stored_k_first(format_name: str) -> None:
    x = torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    amax = x.abs().amax().float() if format_name == "nvfp4" else None
    turned = fake_quantise(x.transpose(-1, -2).contiguous(), format_name, amax)
    assert torch.equal(fake_quantise(x, format_name, amax, axis=-2), turned.transpose(-1, -2))


def test_experts_with_a_scale_each_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 6, 32, generator=torch.Generator().manual_seed(3))
    amax = x.abs().flatten(1).amax(1)
    alone = torch.stack([fake_quantise(matrix, "nvfp4", own) for matrix, own in zip(x, amax, strict=True)])
    assert torch.equal(fake_quantise(x, "nvfp4", amax), alone)
    monkeypatch.setattr(fake_quant, "PIECE", 2 * 6 * 32)  # two experts at a time, and one left over
    assert torch.equal(fake_quantise(x, "nvfp4", amax), alone)
    assert torch.equal(fake_quantise(x, "mxfp4"), fake_quantise(x.reshape(-1, 32), "mxfp4").reshape(x.shape))


@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_block_that_is_not_finite_becomes_nan_and_no_other(format_name: str, bad: float) -> None:
    block = BLOCK[format_name]
    x = torch.ones(2, 2 * block)
    x[1, block + 3] = bad
    values = fake_quantise(x, format_name, torch.tensor(1.0))
    assert torch.isnan(values[1, block:]).all()
    assert torch.isfinite(values[0]).all()
    assert torch.isfinite(values[1, :block]).all()


@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (32,), (2, 3, 4, 32)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    assert torch.equal(fake_quantise(x, "mxfp4"), x)


@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4"])
def test_the_gradient_goes_straight_through_unclipped(format_name: str) -> None:
    """Also where the frozen amax clips: ModelOpt's pass_through_bwd, its default, does the same."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
    factor = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    (fake_quantise(x, format_name, torch.tensor(0.1)) * factor).sum().backward()
    assert torch.equal(x.grad, factor)


def test_modelopt_lets_the_gradient_through_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt's own autograd function, with its kernel replaced: the backward pass is its own."""
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    config = pytest.importorskip("modelopt.torch.quantization.config")
    monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", lambda x, *_: x * 0)
    x = torch.randn(4, 32, requires_grad=True)
    passes = config.QuantizerAttributeConfig().pass_through_bwd
    out = tensor_quant.dynamic_block_quant(x, 16, torch.tensor(0.1), None, (2, 1), (4, 3), None, None, passes)
    out.backward(factor := torch.randn(4, 32))
    assert torch.equal(x.grad, factor)
