"""What the conversions of a run have in common: how many threads they take, and the command that goes on with them.

As many cores as `max_memory` has room for, found out before anything is trained: an adapter's factors stand in memory
once a thread, and on a machine of many cores there would be no room for all of them when training is done.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.commands.convert import available_cores
from fp4conv.errors import UsageError
from fp4conv.plan import BASE_BYTES
from fp4conv.qat.settings_yaml import SETTINGS_FILE
from fp4conv.sizes import as_option, parse_size

if TYPE_CHECKING:
    from fp4conv.model import Model
    from fp4conv.qat.settings import Settings

_BLOCK_BYTES = 8_000_000  # what a thread has for its block, at the least
_EXPERT = re.compile(r"\.experts\.\d+\.")


def threads(model: Model, settings: Settings, *, merges: bool) -> int:
    """For a conversion of `model`; `merges`: an adapter of the run too. UsageError where not even one has room."""
    factors = _factor_bytes(model, settings) if merges else 0
    room = parse_size(settings.max_memory) - BASE_BYTES - 2 * factors
    found = min(available_cores(), room // (factors + _BLOCK_BYTES))
    if found < 1:
        raise UsageError(
            f"--max-memory {settings.max_memory} leaves no room for the conversions of this model",
            where=str(settings.model),
            hint=f"give at least {as_option(BASE_BYTES + 3 * factors + _BLOCK_BYTES)}",
        )
    return found


def going_on(settings: Settings) -> str:
    """The command that goes on with the run, for messages: the words of one of its conversions would not."""
    return shlex.join(["fp4conv", "qat", "--config", str(Path(str(settings.output)) / SETTINGS_FILE)])


def _factor_bytes(model: Model, settings: Settings) -> int:
    """The most that the float32 factors of one parameter take; transformers has all experts of a layer in one."""
    matrices = [weight for weight in model.weights if weight.is_matrix]
    experts = Counter(_EXPERT.sub(".experts.", weight.name) for weight in matrices)
    return max(
        (
            4 * settings.lora_rank * weight.matrices * count * (weight.n * (2 if count > 1 else 1) + weight.k)
            for weight in matrices
            for count in [experts[_EXPERT.sub(".experts.", weight.name)]]
        ),
        default=0,
    )
