"""The optimizer of models in BF16, against torch's AdamW on float32 parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from safetensors.torch import load_file

from fp4conv.qat.adamw import Float32AdamW
from fp4conv.qat.made import Task, write_model, write_task
from fp4conv.qat.settings import settings_from
from fp4conv.qat.train import Job, train


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)).mul(0.02).to(torch.bfloat16)


def trained(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: range) -> None:
    for step in steps:
        parameter.grad = (weights(step + 1) * 3 + parameter.detach() * 0.1).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_torch_on_float32_parameters(decay: float) -> None:
    ours = torch.nn.Parameter(weights())
    theirs = torch.nn.Parameter(weights().float())
    mine = Float32AdamW([ours], lr=1e-3, weight_decay=decay)
    other = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=decay, foreach=False)
    for step in range(20):
        ours.grad = weights(step + 1)
        theirs.grad = weights(step + 1).float()
        mine.step()
        other.step()
    torch.testing.assert_close(mine.state[ours]["exact"], theirs.detach(), rtol=1e-6, atol=1e-8)
    assert torch.equal(ours, mine.state[ours]["exact"].to(torch.bfloat16))


def test_steps_below_the_last_place_add_up() -> None:
    """A hundred steps of 1e-5 move 0.02 by 1e-3; rounded one by one, none does."""
    for optimizer, moved in ((Float32AdamW, 1e-3), (torch.optim.AdamW, 0.0)):
        parameter = torch.nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
        made = optimizer([parameter], lr=1e-5, weight_decay=0.0)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            made.step()
        before = torch.full((4,), 0.02, dtype=torch.bfloat16)
        torch.testing.assert_close((before - parameter.detach()).float(), torch.full((4,), moved), rtol=0.1, atol=1e-7)


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    alone = torch.nn.Parameter(weights())
    whole = Float32AdamW([alone], lr=1e-4)
    trained(whole, alone, range(10))
    first = torch.nn.Parameter(weights())
    before = Float32AdamW([first], lr=1e-4)
    trained(before, first, range(5))
    second = torch.nn.Parameter(first.detach().clone())
    after = Float32AdamW([second], lr=1e-4)
    after.load_state_dict(before.state_dict())
    trained(after, second, range(5, 10))
    assert torch.equal(second, alone)
    assert torch.equal(after.state[second]["exact"], whole.state[alone]["exact"])


def test_bf16_moves_as_far_as_float32_at_the_published_rate(tmp_path: Path) -> None:
    """Twelve steps at 2e-5: with AdamW on BF16 parameters themselves, three quarters of the weights stayed put."""
    task = Task(rules=2, prime=5, length=3, held_out=2)
    write_task(tmp_path / "data", task)
    write_model(tmp_path / "model", task)
    before = load_file(tmp_path / "model" / "model.safetensors")
    moved = {}
    for dtype in ("bfloat16", "float32"):
        words = {"dataset": str(tmp_path / "data"), "format": "mxfp4", "dtype": dtype, "sft_max_steps": 12}
        (tmp_path / dtype).mkdir()
        train(Job("sft", str(tmp_path / "model"), str(tmp_path / dtype)), settings_from(words))
        after = load_file(tmp_path / dtype / "saved" / "model.safetensors")
        moved[dtype] = {name: float((after[name].float() - before[name].float()).abs().mean()) for name in before}
    for name in before:
        if before[name].ndim == 3:
            assert moved["bfloat16"][name] == pytest.approx(moved["float32"][name], rel=0.1), name
