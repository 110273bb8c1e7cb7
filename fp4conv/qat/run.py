"""`qat`: the steps in order, each once, whatever happens in between.

Owns the order, the checks before the first minute is spent, and the journal by which the same command goes on. A step
is done when its line is in the journal; what a killed step left is written over, but for the trainer's checkpoints,
from which training goes on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fp4conv.errors import OutputError, ResumeError, UsageError
from fp4conv.model import JSON
from fp4conv.qat.packages import check_packages
from fp4conv.qat.settings import Settings, settings_from
from fp4conv.qat.settings_yaml import SETTINGS_FILE, read_yaml, to_yaml
from fp4conv.qat.shortages import shortages
from fp4conv.qat.unchanged import INPUTS, check_unchanged
from fp4conv.staging.journal import JOURNAL_NAME, Journal
from fp4conv.staging.places import nearest_existing

if TYPE_CHECKING:
    from fp4conv.qat.report import Report

# Settings that may differ when a run goes on: those of the machine (within a step of training `launch` wants the same
# processes, whose number is a factor of the batch), and those that change no result.
_FREE = frozenset({"gpus", "sharding", "save_steps", "logging_steps", "max_memory", "eval_batch_size", "output"})
_NEEDED = ("torch", "transformers", "accelerate", "datasets", "trl")

Tell = Callable[[str], None]


def run(settings: Settings, command: str, tell: Tell | None) -> Report:
    """Everything, from where it stopped. `tell` gets a line at each step; None: show nothing.

    Raises the errors of fp4conv.errors.
    """
    check_words(settings)
    check_packages("training", _packages(settings))
    # Past the checks, so that what is missing is named.
    from fp4conv.qat.work import Work

    root = Path(str(settings.output))
    _check_place(root, settings)
    settings, pins = _gone_on(root, settings)
    work = Work(settings, tell, pins)
    work.check()
    _make(root)
    with closing(Journal(root / JOURNAL_NAME)) as journal:
        if journal.fingerprint is None:
            (root / SETTINGS_FILE).write_text(to_yaml(settings), encoding="utf-8")
            journal.begin(_fingerprint(settings), command, work.pins)
        _check_same(journal, root, settings)  # again: another run may have begun here since
        done = Done(journal)
        check_unchanged(done.once(INPUTS, lambda: work.inputs), work.inputs, root)
        with shortages(root):
            return work.run(done)


@dataclass
class Done:
    """What the journal says is done; `once` does what is not."""

    journal: Journal

    @property
    def facts(self) -> dict[str, Mapping[str, JSON]]:
        """What the steps that are done have left in the journal, in their order."""
        return {step: facts for step, facts in self.journal.finished.items() if step != INPUTS}

    @property
    def seconds(self) -> dict[str, float]:
        """What each step took, in every process that had a part in what it left."""
        found = {step: facts["seconds"] for step, facts in self.facts.items()}
        return {step: float(seconds) for step, seconds in found.items() if isinstance(seconds, (int, float))}

    def once(self, step: str, work: Callable[[], Mapping[str, JSON]]) -> Mapping[str, JSON]:
        """The facts that `work` gave when `step` was done, now or in an earlier run, and `seconds`.

        Of a step that goes on inside itself `work` gives `seconds_before`, which an earlier run spent on it.
        """
        if step in self.journal.finished:
            return self.journal.finished[step]
        started = time.monotonic()
        made = dict(work())
        before = made.get("seconds_before", 0.0)
        assert isinstance(before, float), "seconds are no whole number"
        made["seconds"] = before + time.monotonic() - started
        facts: dict[str, JSON] = json.loads(json.dumps(made))  # as a later run will read it
        self.journal.append_done([(step, facts)])
        self.journal.finished[step] = facts
        return facts

    def has(self, step: str) -> bool:
        return step in self.journal.finished


def check_words(settings: Settings) -> None:
    """UsageError for what is missing of the words of the command."""
    options = {"model": "MODEL", "dataset": "--dataset DATA", "format": "--format", "output": "--output DIR"}
    for name, words in options.items():
        if getattr(settings, name) is None:
            raise UsageError(f"{words} is missing", hint=f"give it, or `{name}: ...` in the file of --config")
    if {"sft", "qat"} <= set(settings.skip):
        raise UsageError(
            "with sft and qat skipped nothing is trained",
            hint="to quantise a model as it is: fp4conv convert MODEL DIR --to " + str(settings.format),
        )


def _packages(settings: Settings) -> list[str]:
    return [*_NEEDED, *(["peft"] if settings.lora else []), *(["modelopt"] if settings.backend == "modelopt" else [])]


def _check_place(root: Path, settings: Settings) -> None:
    """OutputError where the run would write into its model or its dataset, or could not write at all."""
    for name in ("model", "dataset"):
        place = Path(str(getattr(settings, name)))
        try:
            inside = place.is_dir() and root.resolve().is_relative_to(place.resolve())
        except OSError:
            continue  # a name that the system does not take: whoever opens it says so
        if inside:
            raise OutputError(f"lies in the {name}, which is only read", where=str(root), hint="give another --output")
    there = nearest_existing(root.absolute())
    if not there.is_dir():
        raise OutputError("is a file, expected a folder", where=str(there), hint="give another --output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError("cannot be written to", where=str(there), hint="give another --output")


def _make(root: Path) -> None:
    try:
        if root.is_dir() and any(root.iterdir()) and not (root / JOURNAL_NAME).exists():
            raise OutputError(
                "holds something already, and no run of qat",
                where=str(root),
                hint="give a folder that does not exist yet",
            )
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be used: {error.strerror}", where=str(root)) from error


def _gone_on(root: Path, settings: Settings) -> tuple[Settings, Mapping[str, str]]:
    """`settings` with its day, and the commits that an earlier run in `root` has begun with.

    Raises ResumeError where `root` belongs to a run with other settings.
    """
    if not (root / JOURNAL_NAME).is_file():
        return _dated(settings, None), {}
    with closing(Journal(root / JOURNAL_NAME, look=True)) as journal:
        if journal.fingerprint is None:
            return _dated(settings, None), journal.pins
        settings = _dated(settings, root)
        _check_same(journal, root, settings)
        return settings, journal.pins


def _dated(settings: Settings, begun: Path | None) -> Settings:
    """`settings` with the day that chat templates write: that on which the run in `begun` has begun, or today."""
    if settings.chat_date is not None:
        return settings
    day = None if begun is None else read_yaml(begun / SETTINGS_FILE).get("chat_date")
    return replace(settings, chat_date=str(day or datetime.date.today().isoformat()))


def _check_same(journal: Journal, root: Path, settings: Settings) -> None:
    if journal.fingerprint != _fingerprint(settings):
        raise ResumeError(
            f"belongs to a run with other settings{_differences(root, settings)}",
            where=str(root),
            hint=f"go on with the same ones ({journal.command}), or give another --output",
        )


def _fingerprint(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(_binding(settings), sort_keys=True).encode()).hexdigest()


def _binding(settings: Settings) -> dict[str, JSON]:
    values = settings.values()
    return {name: value for name, value in values.items() if name not in _FREE}


def _differences(root: Path, settings: Settings) -> str:
    try:
        before = _binding(settings_from(read_yaml(root / SETTINGS_FILE)))
    except UsageError:
        return ""
    now = _binding(settings)
    changed = [f"{name} was {before[name]!r}, is {now[name]!r}" for name in now if before[name] != now[name]]
    return ": " + "; ".join(changed) if changed else ""
