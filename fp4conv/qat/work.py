"""The steps of one run, wired: what each starts from, what it leaves for the next, what the journal keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from fp4conv.errors import UsageError
from fp4conv.model import JSON
from fp4conv.qat import admission, steps
from fp4conv.qat.converting import threads
from fp4conv.qat.data import load_data
from fp4conv.qat.disk import check_disk, disk_of
from fp4conv.qat.evaluate import Score
from fp4conv.qat.hub_data import pin_dataset
from fp4conv.qat.machine import ON, noted, over_steps
from fp4conv.qat.models import check_memory, load_tokenizer, parsed, quiet
from fp4conv.qat.quantising import backend_of, recipe_of
from fp4conv.qat.report import Report
from fp4conv.qat.schedule import check_schedule
from fp4conv.qat.scoring import Scoring, rows_of
from fp4conv.qat.train import Trained
from fp4conv.qat.unchanged import inputs_of
from fp4conv.qat.written import write_report
from fp4conv.sources import folder_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp4conv.qat.run import Done
    from fp4conv.qat.settings import Settings


class Work:
    """One run in settings.output. `tell` gets a line at each step; None: show nothing.

    `pins`: repository@revision -> commit of a model or dataset on the Hub, which an earlier run has begun with; added
    when found. All that reads the dataset, in whatever process, is told its commit.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None] | None, pins: Mapping[str, str]) -> None:
        self.pins = dict(pins)
        self._asked = self._settings = settings
        self._quiet = tell is None
        self._tell = tell or (lambda _: None)
        self._places = steps.Places(Path(str(settings.output)))

    def check(self) -> None:
        """Everything that can be wrong and be known without loading the model, before minutes are spent."""
        settings = self._asked
        quiet()
        if settings.gpus > 1 and torch.cuda.device_count() < settings.gpus:
            raise UsageError(
                f"--gpus {settings.gpus}, but torch sees {torch.cuda.device_count()}",
                hint="--gpus 1 trains in one process",
            )
        backend_of(settings).check(recipe_of(settings))
        admission.check_skipped(settings)
        check_schedule(settings)
        admission.check_sharing(settings)
        self._settings = settings = pin_dataset(settings, self.pins)
        self._source = folder_of(str(settings.model), pins=self.pins)
        model = parsed(self._source)
        check_memory(model, settings)
        threads(model, settings, merges=settings.lora)  # an error now, in place of one after training
        admission.check_counted_experts(model, settings)
        tokenizer = load_tokenizer(self._source)
        admission.check_tokenizer(tokenizer, self._source)
        data = load_data(settings, tokenizer)
        answers = "" if data.has_answers else ", no answers (only prompt/completion rows have them)"
        self._tell(f"{len(data.train):,} examples to train on, {len(data.test):,} held out; {data.kind}{answers}")
        for note in data.notes:
            self._tell(f"note: {note}")
        if data.repeated:
            self._tell(f"warning: {data.repeated:,} held-out examples are among those to train on too")
        admission.check_model(self._source, settings, data)
        self._upcasts = steps.needs_upcast(model, settings)
        need = disk_of(model.parameters, len(data.train), settings, upcasts=self._upcasts)
        self._tell(check_disk(need, self._places.root))
        self.inputs = inputs_of(model, settings, data)

    def run(self, done: Done) -> Report:
        settings, places = self._settings, self._places
        base = self._source
        curves: dict[str, Trained] = {}
        if self._upcasts:
            self._once(done, "upcast", "decoding the model", self._upcast)
            base = places.upcast
        tuned = base
        if "sft" not in settings.skip:
            facts = self._once(
                done, "sft", "fine-tuning", lambda: asdict(steps.sft(base, places, settings, quiet=self._quiet))
            )
            curves["sft"], tuned = _trained(facts), places.sft / "model"
            steps.tidy(places.sft, settings)
        quantised = self._once(
            done, "calibrate", "putting fake quantisers on", lambda: asdict(steps.calibrate(tuned, places, settings))
        )
        names = tuple(str(name) for name in cast("list[JSON]", quantised["names"]))
        last = tuned
        if "qat" not in settings.skip:
            facts = self._once(
                done, "qat", "training them on", lambda: asdict(steps.qat(tuned, places, settings, quiet=self._quiet))
            )
            curves["qat"], last = _trained(facts), places.qat / "model"
            steps.tidy(places.qat, settings)
        scoring = Scoring(base, tuned, places, settings, names)
        comparison: Mapping[str, JSON] | None = None
        if "export" not in settings.skip:
            self._once(done, "export", f"exporting to {settings.format}", lambda: self._export(last, names))
            if "qat" not in settings.skip:
                comparison = self._once(
                    done, "compare", "comparing the export with what was trained", lambda: scoring.compare().to_json()
                )
        rows: dict[str, tuple[Score, float]] = {}
        if "evaluate" not in settings.skip:
            for row in rows_of(settings, trained="qat" not in settings.skip):
                rows[row] = self._score(done, scoring, row)
        machines, versions = over_steps(done.facts.values())
        report = Report(
            self._asked,
            rows,
            curves,
            quantised,
            comparison,
            done.seconds,
            machines,
            versions,
            self.pins,
            warnings=_warnings(done.facts),
        )
        for note in write_report(report, places):
            self._tell(note)
        return report

    def _once(self, done: Done, step: str, words: str, work: Callable[[], Mapping[str, JSON]]) -> Mapping[str, JSON]:
        if not done.has(step):
            self._tell(words)
        facts = done.once(step, lambda: noted(work()))
        return {name: value for name, value in facts.items() if name != ON}

    def _score(self, done: Done, scoring: Scoring, row: str) -> tuple[Score, float]:
        facts = self._once(done, f"evaluate {row}", f"evaluating: {row}", lambda: asdict(scoring.score(row)))
        return _score(facts), _number(facts["seconds"])

    def _upcast(self) -> Mapping[str, JSON]:
        return self._told(steps.upcast(self._source, self._places, self._settings))

    def _export(self, last: Path, names: tuple[str, ...]) -> Mapping[str, JSON]:
        return self._told(steps.export(last, self._places, self._settings, names))

    def _told(self, warnings: tuple[str, ...]) -> Mapping[str, JSON]:
        for words in warnings:
            self._tell(f"warning: {words}")
        return {"warnings": list(warnings)}


def _warnings(facts: Mapping[str, Mapping[str, JSON]]) -> dict[str, list[str]]:
    """What the conversions among the steps warned of, by step; those without a warning left out."""
    found = {step: cast("list[str]", kept.get("warnings", [])) for step, kept in facts.items()}
    return {step: words for step, words in found.items() if words}


def _number(value: JSON) -> float:
    assert isinstance(value, (int, float)), "the journal's own facts"
    return float(value)


def _trained(facts: Mapping[str, JSON]) -> Trained:
    curve = cast("list[list[float]]", facts["curve"])
    numbers = {name: _number(facts[name]) for name in ("steps", "tokens", "seconds", "peak_bytes")}
    return Trained(
        tuple((int(step), loss) for step, loss in curve),
        int(numbers["steps"]),
        int(numbers["tokens"]),
        numbers["seconds"],
        int(numbers["peak_bytes"]),
        _number(facts.get("seconds_before", 0.0)),
    )


def _score(facts: Mapping[str, JSON]) -> Score:
    passed, asked = facts["passed"], facts["asked"]
    return Score(
        _number(facts["loss"]),
        int(_number(facts["tokens"])),
        None if passed is None else int(_number(passed)),
        None if asked is None else int(_number(asked)),
    )
