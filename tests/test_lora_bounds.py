"""Merges give the same bytes whatever the workers, the memory and the kills, within the memory that was allowed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from adapters import factors, write_adapter
from checkpoints import Array, bf16, noise, tree, write_model

import fp4conv
from fp4conv.commands.convert import plan_conversion
from fp4conv.errors import PlanError
from fp4conv.plan import BASE_BYTES, peak_bytes, reserved_bytes
from fp4conv.synthetic import write_adapter as write_synthetic_adapter
from fp4conv.synthetic import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
LAYER = "model.layers.0"
EXPERTS = f"{LAYER}.mlp.experts"
Q = f"{LAYER}.self_attn.q_proj"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Rows and matrices so large that small memories cut them, K-major experts among them; in three formats."""
    rng = np.random.default_rng(5)
    tensors = {
        f"{LAYER}.self_attn.sinks": noise((4,)),
        f"{EXPERTS}.gate_up_proj": bf16(rng.standard_normal((3, 512, 768)) * np.exp(rng.standard_normal((3, 1, 768)))),
        f"{EXPERTS}.down_proj": bf16(rng.standard_normal((3, 384, 512))),
        f"{Q}.weight": noise((1024, 512), 1),
        f"{Q}.bias": noise((1024,), 6),
        f"{LAYER}.self_attn.k_proj.weight": noise((256, 512), 2),
        f"{LAYER}.self_attn.v_proj.weight": noise((256, 512), 3),
        "model.norm.weight": noise((512,), 4),
    }
    folder = tmp_path_factory.mktemp("wide")
    made = {"bf16": write_model(folder / "bf16", tensors, {"model_type": "gpt_oss", "num_hidden_layers": 1})}
    for name in ("mxfp4", "nvfp4"):
        fp4conv.convert(made["bf16"], folder / name, to=name)
        made[name] = folder / name
    return made


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of experts and attention, and one with DoRA on top."""
    folder = tmp_path_factory.mktemp("adapters")
    first: dict[str, Array] = {
        **factors(f"{EXPERTS}.base_layer", 768, 512, rank=15, seed=1),
        **factors(EXPERTS, 512, 384, rank=15, seed=2),
        **factors(Q, 1024, 512, rank=5, seed=3),
        f"{Q}.lora_B.bias": np.linspace(-1, 1, 1024, dtype=np.float32),
    }
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    second: dict[str, Array] = {
        **factors(Q, 1024, 512, seed=4),
        f"{Q}.lora_magnitude_vector": np.linspace(0.5, 1.5, 1024, dtype=np.float32),
    }
    return [
        write_adapter(folder / "first", first, r=5, target_parameters=parameters, lora_bias=True),
        write_adapter(folder / "second", second, use_dora=True),
    ]


@pytest.mark.parametrize("rounding", ["once", "peft", "training"])
@pytest.mark.parametrize(
    ("base", "to"), [("bf16", "bf16"), ("bf16", "nvfp4"), ("mxfp4", "mxfp4"), ("mxfp4", "bf16"), ("nvfp4", "nvfp4")]
)
def test_bytes_do_not_depend_on_workers_or_memory(
    wide: Mapping[str, Path], adapters: list[Path], tmp_path: Path, *, base: str, to: str, rounding: str
) -> None:
    plan = plan_conversion(wide[base], to=to, lora=adapters)
    assert plan.factor_bytes == 4 * 15 * (768 + 512)
    results: list[tuple[object, Mapping[str, object], object, object]] = []
    for workers, room in ((1, 100_000_000), (3, 100_000_000), (1, 1_000_000), (3, 3_300_000)):
        memory = BASE_BYTES + reserved_bytes(plan, workers) + room
        out, progress = tmp_path / str(len(results)), list[int]()
        done = fp4conv.convert(
            wide[base],
            out,
            to=to,
            lora=adapters,
            merge_rounding=rounding,
            workers=workers,
            max_memory=memory,
            on_bytes=progress.append,
        )
        assert sum(progress) == pytest.approx(done.bytes_read, rel=1e-4)  # a unit counts whole bytes
        results.append((tree(out), done.merged, done.per_tensor, done.sqnr_db))
    assert all(result == results[0] for result in results)
    assert set(results[0][1]) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", f"{Q}.weight", f"{Q}.bias"}


def test_the_factors_count_as_memory(wide: Mapping[str, Path], adapters: list[Path], tmp_path: Path) -> None:
    plan = plan_conversion(wide["bf16"], to="mxfp4", lora=adapters)
    bare = plan_conversion(wide["bf16"], to="mxfp4")
    assert reserved_bytes(bare, 2) == 0
    assert peak_bytes(plan, 1_000_000_000, 2) >= peak_bytes(bare, 1_000_000_000, 2) + 4 * plan.factor_bytes
    with pytest.raises(PlanError, match="leaves no room"):
        fp4conv.convert(
            wide["bf16"], tmp_path / "out", to="mxfp4", lora=adapters, workers=1, max_memory=BASE_BYTES + 1_000_000
        )
    assert not list(tmp_path.iterdir())


SLOW = """
import importlib, time
run = importlib.import_module("fp4conv.pipeline.run")
run.CHECKPOINT_SECONDS = 0.01
work = run.work
def slow(*arguments):
    time.sleep(0.03)
    return work(*arguments)
run.work = slow
from fp4conv.cli import main
main()
"""


def test_a_killed_merge_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """As the command, with a journal every few milliseconds and a pause a unit, killed again and again."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    geometry = write_checkpoint(base, nbytes=6_000_000, family="gpt-oss", format="mxfp4", seed=3)
    write_synthetic_adapter(adapter, geometry)
    whole = fp4conv.merge_lora(base, adapter, tmp_path / "whole")
    command = ["merge-lora", str(base), str(adapter), str(tmp_path / "out"), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SLOW, *command], env=environment, stdout=subprocess.DEVNULL)
        time.sleep(0.2)
        while process.poll() is None and not (tmp_path / "out.partial").exists():
            time.sleep(0.01)
        time.sleep(0.25)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = fp4conv.merge_lora(base, adapter, tmp_path / "out") if not (tmp_path / "out").exists() else whole
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert resumed.merged == whole.merged
    assert resumed.per_tensor == whole.per_tensor
