"""Training over several processes: accelerate's launcher, with FSDP2 or DeepSpeed ZeRO-3, started by us."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import yaml

from fp4conv.errors import Fp4convError, ResumeError
from fp4conv.qat import lifeline
from fp4conv.qat.settings import Settings, settings_from
from fp4conv.qat.settings_yaml import read_yaml, to_yaml
from fp4conv.qat.train import CHECKPOINTS, Job, Trained, finish, read_result, train

_JOB, _SETTINGS, _ACCELERATE, _DEEPSPEED = "job.json", "settings.yaml", "accelerate.yaml", "deepspeed.json"
_PROCESSES = "processes.json"  # beside the trainer's checkpoints: what wrote them


def run(job: Job, settings: Settings) -> Trained:
    """Train in this process, or with `settings.gpus` of them, unless that was done; Fp4convError where they fail.

    Raises ResumeError where it would go on from checkpoints of another number of processes.
    """
    out = Path(job.out)
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    finished = finish(job)
    if finished is not None:
        return finished
    _check_processes(out / CHECKPOINTS, settings)
    return train(job, settings) if settings.gpus == 1 else launch(job, settings)


def _check_processes(checkpoints: Path, settings: Settings) -> None:
    """Note how many processes write into `checkpoints`, and ResumeError where others have begun to.

    The trainer would count anew, by the batches of the new number, which examples it has seen and how many steps there
    are, and would look for an optimizer's state of another kind.
    """
    now = ["--gpus", str(settings.gpus), *(["--sharding", settings.sharding] if settings.gpus > 1 else [])]
    before = _noted(checkpoints) if any(checkpoints.glob("checkpoint-*")) else None
    if before is None:
        (checkpoints / _PROCESSES).write_text(json.dumps(now), encoding="utf-8")
    elif before != now:
        raise ResumeError(
            f"this step was stopped in training with {' '.join(before)}, and would go on with {' '.join(now)}",
            where=str(checkpoints),
            hint=f"go on with {' '.join(before)}; or remove {checkpoints} to do the step again from its beginning",
        )


def _noted(checkpoints: Path) -> list[str] | None:
    """The words that the processes were asked for with; None where nothing, or a kill's half of it, says so."""
    try:
        words: list[str] = json.loads((checkpoints / _PROCESSES).read_bytes())
    except (OSError, ValueError):
        return None
    return words


def launch(job: Job, settings: Settings, *, cpu: bool = False) -> Trained:
    """Train in `settings.gpus` processes. `cpu`: on processors alone, with gloo."""
    out = Path(job.out)
    (out / _JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
    (out / _SETTINGS).write_text(to_yaml(settings), encoding="utf-8")
    (out / _ACCELERATE).write_text(yaml.safe_dump(accelerate_config(settings, out, cpu=cpu)), encoding="utf-8")
    (out / _DEEPSPEED).write_text(json.dumps(deepspeed_config(), indent=1), encoding="utf-8")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(out / _ACCELERATE)]
    command = [*launcher, "-m", "fp4conv.qat.launch", str(out)]
    exit_code = lifeline.run(command, _environment())
    if exit_code:
        raise Fp4convError(
            f"training in {settings.gpus} processes ended with exit code {exit_code}; the reason is above",
            where=str(out),
            hint="once that is dealt with, the same command goes on from the last checkpoint",
        )
    return read_result(out)


def accelerate_config(settings: Settings, out: Path, *, cpu: bool = False) -> dict[str, object]:
    """accelerate's configuration, as its file in `out` has it, for the processes of one node."""
    common: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "num_processes": settings.gpus,
        "main_process_port": 0,  # any that is free, for there may be another run
        "mixed_precision": "no" if cpu else "bf16",
        "use_cpu": cpu,
    }
    if settings.sharding == "zero3":
        # In a file of its own, for accelerate's has no word for the sizes; the trainer fills in what is "auto".
        file = {"deepspeed_config_file": str(Path(out) / _DEEPSPEED), "zero3_init_flag": True}
        del common["mixed_precision"]
        return {**common, "distributed_type": "DEEPSPEED", "deepspeed_config": file}
    fsdp = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": True,  # one process reads the model, and gives the others their parts
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_activation_checkpointing": False,
    }
    return {**common, "distributed_type": "FSDP", "fsdp_config": fsdp}


def deepspeed_config() -> dict[str, object]:
    """DeepSpeed's configuration, as its file has it: ZeRO-3 on GPUs alone, its buffers as large as the model asks."""
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, **dict.fromkeys(sizes, "auto")}
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(batch, "auto"), "bf16": {"enabled": "auto"}, "zero_optimization": zero}


def _environment() -> dict[str, str]:
    """This process's own, with fp4conv importable from where it was imported here."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def _worker(out: Path) -> NoReturn:
    """Train as one of several processes, and end this one."""
    lifeline.end_with_starter()
    job = Job(**json.loads((out / _JOB).read_text(encoding="utf-8")))
    train(job, settings_from(read_yaml(out / _SETTINGS)))
    lifeline.end()


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
