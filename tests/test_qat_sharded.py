"""Fake quantisers under FSDP2, two processes on a CPU: the loss and the gradients of one process, to the last bit."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modelopt_cpu import put_kernel

from fp4conv.qat import lifeline
from fp4conv.qat.adapters import with_adapters
from fp4conv.qat.backend import Recipe, open_backend
from fp4conv.qat.settings import settings_from

pytest.importorskip("transformers")

Reference = Callable[[str], Path]
PROCESSES = 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptoss-bf16", "qwen3moe-bf16"])
@pytest.mark.parametrize(("kind", "adapted"), [("fp4conv", ""), ("fp4conv", "adapted"), ("modelopt", "adapted")])
def test_shards_train_as_one(reference: Reference, tmp_path: Path, name: str, kind: str, adapted: str) -> None:
    if kind == "modelopt":
        pytest.importorskip("modelopt.torch.quantization")
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "WORLD_SIZE": str(PROCESSES)}
    words = [sys.executable, __file__, str(reference(name)), str(tmp_path / "store")]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(PROCESSES):
            with (tmp_path / f"said-{rank}").open("wb") as said:  # a pipe that nobody reads yet could fill up
                process = subprocess.Popen(
                    [*words, str(rank), kind, adapted], env=environment, stdout=said, stderr=subprocess.STDOUT
                )
            running.append(process)
        while None in (codes := [process.poll() for process in running]) and not any(codes):
            time.sleep(0.05)
    finally:
        for process in running:  # one that is left waits for the other as long as gloo does
            process.kill()
            process.wait()
    told = [(tmp_path / f"said-{rank}").read_text() for rank in range(PROCESSES)]
    assert [process.returncode for process in running] == [0] * PROCESSES, "\n".join(told)
    assert all(text.strip().endswith("equal") for text in told), told


def work(folder: Path, store: Path, rank: int, kind: str, adapted: str) -> None:
    """One process: the same step with and without shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    atexit.register(os._exit, 8)  # where it fails, without taking the interpreter down, which gloo's threads may abort
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    ids = torch.arange(24)[None] * 5 % 199
    whole, sharded = (prepared(folder, ids, kind, lora=bool(adapted)) for _ in range(2))
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in sharded.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for model in (whole, sharded)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    pairs = zip(whole.named_parameters(), sharded.parameters(), strict=True)
    trained = [(name, alone, parameter) for (name, alone), parameter in pairs if alone.requires_grad]
    assert trained
    for name, alone, parameter in trained:
        assert torch.equal(alone.grad, parameter.grad.full_tensor()), name
    sys.stdout.write("equal\n")
    lifeline.end()


def prepared(folder: Path, ids: torch.Tensor, kind: str, *, lora: bool) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    if kind == "modelopt":
        put_kernel(setattr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    backend = open_backend(kind)
    backend.prepare(model, Recipe("nvfp4", "NVFP4_DEFAULT_CFG"))
    backend.calibrate(model, [{"input_ids": ids}])
    if lora:
        model = with_adapters(model, settings_from({"lora": True}), [name for name, _ in backend.weights(model)])
        backend.see_adapters(model)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
