"""The table at the end: as a value, as JSON, and for the terminal. `written` makes files of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fp4conv.model import JSON
from fp4conv.qat.evaluate import Score
from fp4conv.qat.settings import Settings
from fp4conv.qat.train import Trained
from fp4conv.sizes import format_size

DATASETS = "datasets/"  # before the name of a dataset on the Hub, where models are too
HEADS = ("model", "held-out loss", "right answers", "pass rate")


@dataclass(frozen=True)
class Report:
    """What a run did. `rows`: name -> (score, seconds). `training`: 'sft' and 'qat'. The rest: as the steps gave it.

    `commits`: of model and dataset on the Hub, by 'org/name@revision' and 'datasets/org/name@revision'.
    `warnings`: 'upcast' and 'export' -> what these conversions warn of.
    """

    settings: Settings
    rows: Mapping[str, tuple[Score, float]]
    training: Mapping[str, Trained]
    calibration: Mapping[str, JSON]
    comparison: Mapping[str, JSON] | None
    seconds: Mapping[str, float]
    machine: str
    versions: Mapping[str, str]
    commits: Mapping[str, str] = field(default_factory=dict)
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, JSON]:
        rows: list[JSON] = [
            {"name": name, **asdict(score), "pass_rate": score.pass_rate, "seconds": seconds}
            for name, (score, seconds) in self.rows.items()
        ]
        training: dict[str, JSON] = {}
        for step, trained in self.training.items():
            curve: list[JSON] = [[number, loss] for number, loss in trained.curve]
            training[step] = {**asdict(trained), "curve": curve}
        return {
            "model": self.settings.model,
            "dataset": self.settings.dataset,
            "format": self.settings.format,
            "backend": self.settings.backend,
            "rows": rows,
            "training": training,
            "calibration": dict(self.calibration),
            "export": None if self.comparison is None else dict(self.comparison),
            "seconds": dict(self.seconds),
            "machine": self.machine,
            "versions": dict(self.versions),
            "commits": dict(self.commits),
            "warnings": {step: list(words) for step, words in self.warnings.items()},
            "settings": self.settings.values(),
        }

    def cells(self) -> list[tuple[str, str, str, str]]:
        """The table, a row a model: name, loss, right of asked, share."""
        made = []
        for name, (score, _) in self.rows.items():
            right = "" if score.asked is None else f"{score.passed:,} of {score.asked:,}"
            share = "" if score.pass_rate is None else f"{100 * score.pass_rate:.1f} %"
            made.append((name, f"{score.loss:.4f}", right, share))
        return made

    def notes(self) -> list[str]:
        """What was found on the way: blocks that ModelOpt rounds in another way, and what conversions warn of."""
        warned = [f"{step}: warning: {words}" for step, found in self.warnings.items() for words in found]
        kept = {"before training": self.calibration, "after export": self.comparison or {}}
        found = {when: facts.get("notes") for when, facts in kept.items()}
        noted = [f"{when}: {note}" for when, notes in found.items() if isinstance(notes, list) for note in notes]
        return [*warned, *noted]

    def facts(self) -> list[str]:
        """What the table rests on, a sentence each."""
        found = [
            f"{'dataset' if name.startswith(DATASETS) else 'model'}: {name.removeprefix(DATASETS)}, commit {commit}"
            for name, commit in self.commits.items()
        ]
        for step, trained in self.training.items():
            found.append(
                f"{step}: {trained.steps:,} steps, {trained.tokens:,} tokens, {trained.seconds:,.0f} s"
                + (f", peak memory {format_size(trained.peak_bytes)}" if trained.peak_bytes else "")
            )
        names = self.calibration.get("names")
        count = len(names) if isinstance(names, list) else 0
        found.append(
            f"before training: the {self.calibration['values']:,} fake-quantised values of {count} parameters are "
            "those of fp4conv's codec" + (", but for what is told below" if self.calibration["notes"] else "")
        )
        if self.comparison is not None:
            largest = self.comparison["largest"]
            same = "are the same" if largest == 0 else f"differ by {largest:.3g} at most"
            but = ", but for what is told below" if self.comparison["notes"] else ""
            found.append(
                f"after export: {self.comparison['values']:,} decoded values are those of the last forward pass{but}; "
                f"{self.comparison['logits']:,} logits of the checkpoint loaded again {same}"
            )
        return found


def view(report: Report) -> RenderableType:
    """The table and the facts under it."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for head in HEADS:
        table.add_column(head, justify="left" if head == "model" else "right")
    for row in report.cells():
        table.add_row(*row)
    return Group(*([table] if report.rows else []), *(Text(line) for line in [*report.facts(), *report.notes()]))
