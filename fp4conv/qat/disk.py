"""How much disk a run takes, from the model's size: told before it begins, and refused where there is less."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.commands.convert import free_bytes
from fp4conv.errors import OutputError
from fp4conv.sizes import format_size

if TYPE_CHECKING:
    from fp4conv.qat.settings import Settings

_FOUR_BITS = 9 / 16  # bytes a value in NVFP4, scales and all: the larger format
_OPTIMIZER = {"bfloat16": 12, "float32": 8}  # bytes a parameter: two moments, and of BF16 a float32 copy


@dataclass(frozen=True)
class Disk:
    """Bytes of the run's folder: `most` at a time, and what `stays` when it is done."""

    most: int
    stays: int


def disk_of(parameters: int, examples: int, settings: Settings, *, upcasts: bool) -> Disk:
    """For a model of so many `parameters` and so many `examples` to train on. Tokenizer and reports are not counted."""
    width = 2 if settings.dtype == "bfloat16" else 4
    dense, four_bits = parameters * width, math.ceil(parameters * _FOUR_BITS)
    stays = dense if upcasts else 0
    most = stays
    for step, epochs, limit in (
        ("sft", settings.sft_epochs, settings.sft_max_steps),
        ("qat", settings.qat_epochs, settings.qat_max_steps),
    ):
        if step not in settings.skip:
            kept = 0 if settings.lora else parameters * (width + _OPTIMIZER[settings.dtype])
            steps = limit if limit > 0 else _steps(examples, epochs, settings)
            # The trainer writes a checkpoint before it removes the one before; then the model is saved, and converted.
            most = max(most, stays + kept * (2 if steps > settings.save_steps else 1))
            most = max(most, stays + kept + dense * (1 if settings.lora else 2))
            stays += dense
    stays += 0 if "export" in settings.skip else four_bits
    return Disk(max(most, stays, stays + four_bits + dense if "evaluate" not in settings.skip else 0), stays)


def check_disk(need: Disk, root: Path) -> str:
    """What the run in `root` needs, in words; OutputError where there is less. What `root` holds counts as free."""
    held = sum(_size(Path(folder) / name) for folder, _, names in os.walk(root) for name in names)
    free = free_bytes(root) + held
    if need.most > free:
        raise OutputError(
            f"the disk is too small: the run takes up to {format_size(need.most)}, {format_size(free)} are free",
            where=str(root),
            hint="give an --output on a larger disk; --lora takes less; --save-steps beyond the last step leaves one "
            "checkpoint in place of two",
        )
    return (
        f"disk: up to {format_size(need.most)} while it runs, {format_size(need.stays)} stay; "
        f"{format_size(free)} are free"
    )


def _steps(examples: int, epochs: float, settings: Settings) -> int:
    batch = settings.batch_size * settings.gpus * settings.gradient_accumulation
    return math.ceil(math.ceil(examples / batch) * epochs)


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except OSError:  # a checkpoint of another moment
        return 0
