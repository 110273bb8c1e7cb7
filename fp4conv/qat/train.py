"""One training run: SFT, or QAT on fake quantisers, with trl's trainer; in a lone process or one of several.

Owns the trainer's arguments, going on from a checkpoint, and what is written at the end. What a run starts from and
what happens with its result is `steps`' business.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp4conv.qat.adamw import Float32AdamW
from fp4conv.qat.adapters import with_adapters
from fp4conv.qat.data import Data, load_data
from fp4conv.qat.divergence import check_finite, divergence
from fp4conv.qat.models import distributed, forget_peak, load_model, load_tokenizer, peak_bytes, quiet
from fp4conv.qat.progress import progress
from fp4conv.qat.quantising import backend_of
from fp4conv.qat.schedule import schedule_options
from fp4conv.qat.sharing import OptimizerCheck, tell_apart
from fp4conv.qat.spent import Spent, SpentMeter, spent_of

if TYPE_CHECKING:
    import transformers
    from trl import SFTConfig

    from fp4conv.qat.settings import Settings

CHECKPOINTS = "checkpoints"
SAVED = "saved"  # what the trainer saved: a model, or with LoRA an adapter
RESULT = "training.json"
TRAINER_STATE = "trainer_state.json"
# Files of a checkpoint that are no part of the model.
_ONLY_TO_GO_ON = (TRAINER_STATE, "optimizer*", "scheduler.pt", "rng_state*", "global_step*", "latest", "zero_to_*.py")


@dataclass(frozen=True)
class Job:
    """A run of kind 'sft' or 'qat' from the dense model in `source` into the folder `out`.

    `quantizers`: the folder that a backend saved its calibrated quantisers in; None: train without any.
    `quiet`: show no progress.
    """

    kind: str
    source: str
    out: str
    quantizers: str | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Trained:
    """`curve`: (optimizer step, training loss, in nats). `tokens` were seen, padding left out, over all processes.

    `seconds`, `peak_bytes`: as `spent` counts them; `seconds_before` of them in processes that were stopped.
    """

    curve: tuple[tuple[int, float], ...]
    steps: int
    tokens: int
    seconds: float
    peak_bytes: int
    seconds_before: float = 0.0


def finish(job: Job) -> Trained | None:
    """The result of a run that was stopped after its last checkpoint: `job.out`/saved is made of that. Else None.

    The trainer cannot be asked: it looks how many steps there are only after one more.
    """
    last = _last_checkpoint(Path(job.out))
    state = _trainer_state(last) if last else {}
    if last is None or state["global_step"] < state["max_steps"]:
        return None
    started, before = time.monotonic(), spent_of(state)
    saved = Path(job.out) / SAVED
    shutil.rmtree(saved, ignore_errors=True)
    shutil.copytree(last, saved, ignore=shutil.ignore_patterns(*_ONLY_TO_GO_ON))
    spent = Spent(before.seconds + time.monotonic() - started, before.peak_bytes)
    return _trained(state["log_history"], state["global_step"], state["num_input_tokens_seen"], spent, before)


def train(job: Job, settings: Settings) -> Trained:
    """Train, or go on from the last checkpoint; the result is in `job.out`/saved when this returns."""
    started = time.monotonic()
    quiet()
    tokenizer = load_tokenizer(Path(job.source))
    data = load_data(settings, tokenizer)
    last = _last_checkpoint(Path(job.out))
    before = spent_of(_trainer_state(last)) if last else Spent()
    forget_peak()
    trainer = _trainer(job, settings, tokenizer, data)
    meter = SpentMeter(before, started, peak_bytes)
    trainer.add_callback(meter)
    trainer.train(resume_from_checkpoint=last)
    if not distributed():  # where a parameter is in one piece
        check_finite(trainer.model, job.kind)
    trainer.save_model(str(Path(job.out) / SAVED))
    state = trainer.state
    trained = _trained(state.log_history, state.global_step, state.num_input_tokens_seen, meter.now(), before)
    if trainer.is_world_process_zero():
        (Path(job.out) / RESULT).write_text(json.dumps(asdict(trained)), encoding="utf-8")
    return trained


def _trained(history: list[dict[str, float]], steps: int, tokens: int, spent: Spent, before: Spent) -> Trained:
    return Trained(_curve(history), int(steps), int(tokens), spent.seconds, spent.peak_bytes, before.seconds)


def _curve(history: list[dict[str, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry)


def _trainer(
    job: Job, settings: Settings, tokenizer: transformers.PreTrainedTokenizerBase, data: Data
) -> transformers.Trainer:
    import datasets
    from transformers import PrinterCallback
    from trl import SFTTrainer

    transformers_seed(settings.seed)
    arguments = _arguments(job, settings)  # before the model: transformers reads there how it is shared
    model: torch.nn.Module = load_model(Path(job.source), settings)
    trainer: type = SFTTrainer
    quantized: list[str] = []
    if job.quantizers is not None:
        backend = backend_of(settings)
        backend.load(model, Path(job.quantizers))
        quantized = backend.names(model)
        trainer = backend.trainer()
    if settings.lora:
        model = with_adapters(model, settings, quantized)
        if job.quantizers is not None:
            backend_of(settings).see_adapters(model)
    tell_apart(model)
    rows = datasets.Dataset.from_dict(
        {"input_ids": [list(e.ids) for e in data.train], "labels": [e.labels for e in data.train]}
    )
    made: transformers.Trainer = trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=_optimizer(arguments, settings),
    )
    made.remove_callback(PrinterCallback)
    made.add_callback(divergence(job.kind))
    if not job.quiet:
        made.add_callback(progress(job.kind))
    made.add_callback(OptimizerCheck())
    return made


def _optimizer(
    arguments: SFTConfig, settings: Settings
) -> tuple[type[torch.optim.Optimizer], dict[str, object]] | None:
    """None: transformers' own AdamW, whose steps BF16 parameters of a lone process would lose."""
    if distributed() or settings.dtype != "bfloat16":
        return None
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return Float32AdamW, {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}


def transformers_seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _arguments(job: Job, settings: Settings) -> SFTConfig:
    from trl import SFTConfig

    sft = job.kind == "sft"
    cuda = torch.cuda.is_available()
    made = SFTConfig(
        output_dir=str(Path(job.out) / CHECKPOINTS),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.sft_epochs if sft else settings.qat_epochs,
        max_steps=settings.sft_max_steps if sft else settings.qat_max_steps,
        learning_rate=settings.sft_rate if sft else settings.qat_rate,
        lr_scheduler_type=settings.scheduler,
        lr_scheduler_kwargs=schedule_options(settings.scheduler, settings.min_lr_rate),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        # A BF16 model in one process computes in BF16 without autocast; float32 copies need it.
        bf16=cuda and (settings.dtype == "float32" or distributed()),
        use_cpu=not cuda,
        **_checkpointing(settings),
        max_length=settings.max_length,
        packing=settings.packing,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
        dataloader_pin_memory=cuda,
    )
    # A lone process would split batches over every GPU that it sees, which trl refuses after minutes.
    made._n_gpu = min(1, made.n_gpu)
    return made


def _checkpointing(settings: Settings) -> dict[str, object]:
    """transformers 5.15 and later call it activation checkpointing, and warn of the old name."""
    from trl import SFTConfig

    names = {one.name for one in fields(SFTConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    if not settings.gradient_checkpointing:
        return {name: False}
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _last_checkpoint(out: Path) -> str | None:
    """The last checkpoint of the trainer that is whole; a kill may have left a later one half."""
    found = (out / CHECKPOINTS).glob("checkpoint-*")
    whole = [folder for folder in found if folder.name.partition("-")[2].isdigit() and _is_whole(folder)]
    return str(max(whole, key=lambda folder: int(folder.name.partition("-")[2]))) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """trainer_state.json is the last file that the trainer writes of a checkpoint."""
    try:
        _trainer_state(checkpoint)
    except (OSError, ValueError):
        return False
    return True


def _trainer_state(checkpoint: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(checkpoint) / TRAINER_STATE).read_bytes())
    return found


def read_result(out: Path) -> Trained:
    """What `train` wrote down in the folder of a run, whichever process it was."""
    found = json.loads((out / RESULT).read_text(encoding="utf-8"))
    return Trained(
        tuple((int(step), float(loss)) for step, loss in found["curve"]),
        int(found["steps"]),
        int(found["tokens"]),
        float(found["seconds"]),
        int(found["peak_bytes"]),
        float(found["seconds_before"]),
    )
