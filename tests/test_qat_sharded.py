"""Fake quantisers under FSDP2, two processes on a CPU: the loss and the gradients of one process, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp4conv.qat.backend import Recipe, open_backend

pytest.importorskip("transformers")

Reference = Callable[[str], Path]
PROCESSES = 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptoss-bf16", "qwen3moe-bf16"])
def test_shards_train_as_one(reference: Reference, tmp_path: Path, name: str) -> None:
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "WORLD_SIZE": str(PROCESSES)}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(reference(name)), str(tmp_path / "store"), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    for process in running:
        said, wrong = process.communicate(timeout=240)
        assert process.returncode == 0, wrong
        assert said.strip().endswith("equal")


def work(folder: Path, store: Path, rank: int) -> None:
    """One process: the same step with and without shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    ids = torch.arange(24)[None] * 5 % 199
    whole, sharded = prepared(folder, ids), prepared(folder, ids)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = [model(ids, labels=ids, use_cache=False).loss for model in (whole, sharded)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    pairs = zip(whole.named_parameters(), sharded.parameters(), strict=True)
    for (name, alone), parameter in pairs:
        assert torch.equal(alone.grad, parameter.grad.full_tensor()), name
    torch.distributed.destroy_process_group()
    sys.stdout.write("equal\n")


def prepared(folder: Path, ids: torch.Tensor) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    backend = open_backend("fp4conv")
    backend.prepare(model, Recipe("nvfp4", "NVFP4_DEFAULT_CFG"))
    backend.calibrate(model, [{"input_ids": ids}])
    model.gradient_checkpointing_enable()
    return model.train()


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
