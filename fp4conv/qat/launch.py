"""Training over several processes: accelerate's launcher, with FSDP2 or DeepSpeed ZeRO-3, started by us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from fp4conv.errors import Fp4convError
from fp4conv.qat.settings import Settings, read_yaml, settings_from, to_yaml
from fp4conv.qat.train import Job, Trained, read_result, train

_JOB, _SETTINGS, _ACCELERATE = "job.json", "settings.yaml", "accelerate.yaml"


def run(job: Job, settings: Settings) -> Trained:
    """Train in this process, or with `settings.gpus` of them; raises Fp4convError where they fail."""
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    if settings.gpus == 1:
        return train(job, settings)
    return launch(job, settings)


def launch(job: Job, settings: Settings, *, cpu: bool = False) -> Trained:
    """Train in `settings.gpus` processes. `cpu`: on processors alone, with gloo."""
    out = Path(job.out)
    (out / _JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
    (out / _SETTINGS).write_text(to_yaml(settings), encoding="utf-8")
    (out / _ACCELERATE).write_text(yaml.safe_dump(accelerate_config(settings, cpu=cpu)), encoding="utf-8")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(out / _ACCELERATE)]
    command = [*launcher, "-m", "fp4conv.qat.launch", str(out)]
    done = subprocess.run(command, check=False, stdout=sys.stderr, env=_environment())
    if done.returncode:
        raise Fp4convError(
            f"training in {settings.gpus} processes ended with exit code {done.returncode}; the reason is above",
            where=str(out),
            hint="once that is dealt with, the same command goes on from the last checkpoint",
        )
    return read_result(out)


def accelerate_config(settings: Settings, *, cpu: bool = False) -> dict[str, object]:
    """accelerate's configuration, as its file has it, for the processes of one node."""
    common: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "num_processes": settings.gpus,
        "mixed_precision": "no" if cpu else "bf16",
        "use_cpu": cpu,
    }
    if settings.sharding == "zero3":
        deepspeed = {
            "zero_stage": 3,
            "zero3_init_flag": True,
            "zero3_save_16bit_model": True,
            "gradient_accumulation_steps": settings.gradient_accumulation,
            "gradient_clipping": settings.max_grad_norm,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
        }
        return {**common, "distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}
    fsdp = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_activation_checkpointing": False,
    }
    return {**common, "distributed_type": "FSDP", "fsdp_config": fsdp}


def _environment() -> dict[str, str]:
    """This process's own, with fp4conv importable from where it was imported here."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def _worker(out: Path) -> None:
    job = Job(**json.loads((out / _JOB).read_text(encoding="utf-8")))
    train(job, settings_from(read_yaml(out / _SETTINGS)))


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
