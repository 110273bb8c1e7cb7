"""Whether a run goes on with the model and the examples that it began with: else its steps would not fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.errors import ResumeError

if TYPE_CHECKING:
    from fp4conv.model import JSON, Model
    from fp4conv.qat.data import Data
    from fp4conv.qat.settings import Settings

INPUTS = "inputs"  # their entry in the journal
_WORDS = {"model": "the model", "data": "the examples of the dataset"}


def inputs_of(model: Model, settings: Settings, data: Data) -> dict[str, str]:
    """What says that model and examples are the same: for a local model of its files, for all of the token ids.

    A model of the Hub stays at its commit, which the journal has.
    """
    digest = hashlib.sha256()
    for examples in (data.train, data.test):
        digest.update(f"{len(examples)}\n".encode())
        for example in examples:
            digest.update(f"{example.ids}{example.start}{example.answered}\n".encode())
    local = Path(str(settings.model)).exists()
    return {"data": digest.hexdigest(), **({"model": model.source.fingerprint()} if local else {})}


def check_unchanged(before: Mapping[str, JSON], now: Mapping[str, str], root: Path) -> None:
    """ResumeError where `now` is not what the run in `root` began with."""
    changed = [words for name, words in _WORDS.items() if name in before and before[name] != now.get(name)]
    if changed:
        raise ResumeError(
            f"belongs to a run that began before {' and '.join(changed)} changed",
            where=str(root),
            hint="give another --output to train anew; or put back what was there, and the run goes on",
        )
