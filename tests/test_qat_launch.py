"""Training that two processes share, started as `--gpus 2` is, on processors with gloo: FSDP2 and ZeRO-3.

The golden is one process that sees both batches at once. accelerate shards on GPUs alone, so for FSDP2 the processes
here tell it that gloo is one; DeepSpeed runs on processors by itself. This file is also what those processes run.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

from modelopt_cpu import put_kernel
from transformers import TrainerCallback

from fp4conv.errors import Fp4convError, ResumeError
from fp4conv.qat import launch, models, steps, train
from fp4conv.qat.made import Task, write_model, write_task
from fp4conv.qat.settings import Settings, settings_from
from fp4conv.qat.settings_yaml import read_yaml
from fp4conv.qat.train import Job

TASK = Task(rules=4, prime=13, length=6, held_out=8)
STEPS, KILLED_AT = 5, "FP4CONV_TEST_KILLED_AT"
zero3 = pytest.param(
    "zero3",
    marks=pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_task(root / "data", TASK)
    write_model(root / "model", TASK)
    steps.calibrate(root / "model", steps.Places(root), settings(root))
    return root


def settings(root: Path, **more: object) -> Settings:
    known = {"model": str(root / "model"), "dataset": str(root / "data"), "format": "mxfp4", "backend": "fp4conv"}
    quick = {"qat_max_steps": STEPS, "gradient_accumulation": 1, "qat_learning_rate": 1e-3, "logging_steps": 1}
    return settings_from(known, quick, {"dtype": "float32", "save_steps": 2, "batch_size": 8}, more)


def job(root: Path, out: Path) -> Job:
    out.mkdir(exist_ok=True)
    return Job("qat", str(root / "model"), str(out), str(root / "quantizers"))


def saved(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(next((out / "saved").glob("*model.safetensors")))
    return found


def said(out: Path, rank: int) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / f"said-{rank}.json").read_text())
    return found


def share(monkeypatch: pytest.MonkeyPatch, root: Path, out: Path, made_settings: Settings) -> train.Trained:
    """Launch two processes, which run this file in the place of `fp4conv.qat.launch`."""
    real = subprocess.run

    def run(command: list[str], **options: object) -> object:
        front = command[: command.index("fp4conv.qat.launch") - 1]
        with (out / "stderr.txt").open("w") as stderr:
            done = real([*front, __file__, command[-1]], **options, stderr=stderr)  # type: ignore[call-overload]
        sys.stderr.write((out / "stderr.txt").read_text()[-8_000:])  # shown where a test fails
        return done

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with monkeypatch.context() as patched:
        patched.setattr("fp4conv.qat.lifeline.subprocess.run", run)
        return launch.launch(job(root, out), made_settings, cpu=True)


def check_as_one(root: Path, out: Path, alone: Settings, trained: train.Trained) -> None:
    """What two processes made of batches of 8 is what one makes of batches of 16, but for the order of sums."""
    golden = train.train(job(root, out.parent / "alone"), alone)
    assert trained.steps == golden.steps == STEPS
    assert trained.tokens == golden.tokens
    assert dict(trained.curve) == pytest.approx(dict(golden.curve), rel=1e-5)
    ours, expected = saved(out), saved(out.parent / "alone")
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(ours[name], values, rtol=0, atol=2e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2", zero3])
def test_two_processes_train_as_one(monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path, sharding: str) -> None:
    trained = share(monkeypatch, made, tmp_path / "shared", settings(made, gpus=2, sharding=sharding))
    assert said(tmp_path / "shared", 0)["sharded"]
    assert said(tmp_path / "shared", 1) == {"sharded": True, "read": 0, "first": 1}
    assert "FutureWarning: `torch.distributed" not in (tmp_path / "shared" / "stderr.txt").read_text()
    check_as_one(made, tmp_path / "shared", settings(made, batch_size=16), trained)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [zero3])
def test_modelopts_quantisers_too_where_layers_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path, sharding: str
) -> None:
    """DeepSpeed takes a module's weights away where its pass ends; recomputing must stop inside the last one."""
    pytest.importorskip("modelopt")
    put_kernel(monkeypatch.setattr)
    modelopt = {"backend": "modelopt", "gradient_checkpointing": True}
    trained = share(monkeypatch, made, tmp_path / "shared", settings(made, gpus=2, sharding=sharding, **modelopt))
    check_as_one(made, tmp_path / "shared", settings(made, batch_size=16, **modelopt), trained)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2", zero3])
def test_adapters_too_and_killed_they_go_on(
    monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path, sharding: str
) -> None:
    shared = settings(made, gpus=2, sharding=sharding, lora=True)
    monkeypatch.setenv(KILLED_AT, "3")
    with pytest.raises(Fp4convError, match="ended with exit code"):
        share(monkeypatch, made, tmp_path / "shared", shared)
    assert not (tmp_path / "shared" / "saved").exists()
    monkeypatch.delenv(KILLED_AT)
    trained = share(monkeypatch, made, tmp_path / "shared", shared)
    assert said(tmp_path / "shared", 1) == {"sharded": True, "read": 0, "first": 3}
    check_as_one(made, tmp_path / "shared", settings(made, lora=True, batch_size=16), trained)


def test_what_was_trained_to_its_last_step_is_not_trained_again(made: Path, tmp_path: Path) -> None:
    """Killed between the last checkpoint and the end: that checkpoint is the result."""
    alone = settings(made)
    undisturbed = launch.run(job(made, tmp_path / "run"), alone)
    before = saved(tmp_path / "run")
    for file in (tmp_path / "run" / "saved").iterdir():
        file.unlink()
    again = launch.run(job(made, tmp_path / "run"), alone)
    assert (again.curve, again.steps, again.tokens) == (undisturbed.curve, STEPS, undisturbed.tokens)
    after = saved(tmp_path / "run")
    assert all(torch.equal(after[name], values) for name, values in before.items())
    names = {file.name for file in (tmp_path / "run" / "saved").iterdir()}
    assert "tokenizer.json" in names
    assert not names & {"optimizer.pt", "scheduler.pt", "trainer_state.json"}


def test_a_step_goes_on_in_as_many_processes_as_it_began_with(made: Path, tmp_path: Path) -> None:
    """Of twice as many the trainer would think that half the steps of the same number had been taken."""
    begun = settings(made, gpus=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            launch, "launch", lambda job, _: (Path(job.out) / "checkpoints" / "checkpoint-2").mkdir(exist_ok=True)
        )
        launch.run(job(made, tmp_path / "run"), begun)
        launch.run(job(made, tmp_path / "other"), settings(made, gpus=4))
        for other in ({"gpus": 1}, {"gpus": 4}, {"gpus": 2, "sharding": "zero3"}):
            with pytest.raises(ResumeError, match="stopped in training with --gpus 2 --sharding fsdp2, and would"):
                launch.run(job(made, tmp_path / "run"), settings(made, **other))
        (tmp_path / "run" / "checkpoints" / "checkpoint-2").rmdir()
        launch.run(job(made, tmp_path / "run"), settings(made, gpus=4))
        (tmp_path / "run" / "checkpoints" / "checkpoint-2").mkdir(exist_ok=True)
        (tmp_path / "run" / "checkpoints" / "processes.json").write_text("")  # killed as it was written
        launch.run(job(made, tmp_path / "run"), settings(made, gpus=4))


@pytest.mark.slow
def test_processes_that_fail_are_an_error(made: Path, tmp_path: Path) -> None:
    with pytest.raises(Fp4convError, match="ended with exit code"):
        launch.launch(job(made, tmp_path), settings(made, dataset=str(tmp_path / "none.jsonl")), cpu=True)


def test_warnings_of_the_processes_are_for_their_user() -> None:
    """torch tells at each step, a line of source beside it, that it renames reduce_scatter_tensor."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        models.quiet()
        for module, kind in (
            ("torch.distributed.c10d_logger", FutureWarning),
            ("torch.distributed.c10d_logger", UserWarning),
            ("torch.optim.adamw", FutureWarning),
            ("transformers.modeling_utils", FutureWarning),
        ):
            warnings.warn_explicit("words", kind, "file.py", 1, module=module)
    assert [one.category for one in told] == [UserWarning, FutureWarning]


def test_a_lone_process_takes_one_gpu_of_those_it_sees(
    monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> None:
    """transformers would put the model on all of them with DataParallel, which trl refuses."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: self.__dict__.get("_n_gpu", 4)))
    monkeypatch.setattr("transformers.TrainingArguments._setup_devices", torch.device("cpu"))
    assert train._arguments(job(made, tmp_path), settings(made)).n_gpu == 1


def test_what_accelerate_is_told(tmp_path: Path) -> None:
    fsdp = launch.accelerate_config(settings_from({"gpus": 4}), tmp_path)
    facts: Mapping[str, object] = fsdp["fsdp_config"]  # type: ignore[assignment]
    assert (fsdp["distributed_type"], fsdp["num_processes"]) == ("FSDP", 4)
    assert (facts["fsdp_version"], facts["fsdp_cpu_ram_efficient_loading"]) == (2, True)
    zero = launch.accelerate_config(settings_from({"gpus": 8, "sharding": "zero3"}), tmp_path)
    assert (zero["distributed_type"], zero["num_processes"]) == ("DEEPSPEED", 8)
    assert launch.deepspeed_config()["zero_optimization"]["stage"] == 3  # type: ignore[index]


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Writes down how the model is shared at the first step, and ends the process outright where it is told to."""

    def __init__(self, out: Path, read: int) -> None:
        self._file = out / f"said-{os.environ['RANK']}.json"
        self._read = read

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if not self._file.exists():
            empty = [p for p in kwargs["model"].parameters() if p.numel() == 0 or hasattr(p, "full_tensor")]
            facts = {"sharded": len(empty) > 9, "read": self._read, "first": state.global_step + 1}
            self._file.write_text(json.dumps(facts))

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == int(os.environ.get(KILLED_AT, "0")):
            torch.distributed.barrier()
            os._exit(9)


def work(out: Path) -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if os.environ.get("ACCELERATE_USE_FSDP"):
        torch.distributed.init_process_group("gloo")
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    atexit.register(os._exit, 8)  # taking the interpreter down is a race with gloo's threads: none of it may run
    (out / f"said-{os.environ['RANK']}.json").unlink(missing_ok=True)
    if read_yaml(out / "settings.yaml")["backend"] == "modelopt":
        put_kernel(setattr)
    load, make, held = models.load_model, train._trainer, []

    def load_model(*args):  # type: ignore[no-untyped-def]
        model = load(*args)
        held.append(sum(not p.is_meta and p.numel() for p in model.parameters()))
        return model

    def trainer(*args):  # type: ignore[no-untyped-def]
        result = make(*args)
        result.add_callback(_Watch(out, held[0]))
        return result

    setattr(train, "load_model", load_model)  # noqa: B010  # a name that it imports
    train._trainer = trainer
    launch._worker(out)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
