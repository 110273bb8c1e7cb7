"""The table at the end: as a value, as JSON, for the terminal, as a page with the loss curves, and as a model card."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fp4conv.model import JSON
from fp4conv.qat.evaluate import Score
from fp4conv.qat.settings import Settings
from fp4conv.qat.train import Trained
from fp4conv.sizes import format_size
from fp4conv.version import __version__

if TYPE_CHECKING:
    from fp4conv.qat.steps import Places

REPORT_JSON, REPORT_HTML, CARD = "report.json", "report.html", "README.md"
_DATASETS = "datasets/"  # before the name of a dataset on the Hub, where models are too
_HEADS = ("model", "held-out loss", "right answers", "pass rate")


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
            f"{'dataset' if name.startswith(_DATASETS) else 'model'}: {name.removeprefix(_DATASETS)}, commit {commit}"
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
    for head in _HEADS:
        table.add_column(head, justify="left" if head == "model" else "right")
    for row in report.cells():
        table.add_row(*row)
    return Group(*([table] if report.rows else []), *(Text(line) for line in [*report.facts(), *report.notes()]))


def write_report(report: Report, places: Places) -> list[str]:
    """Write the JSON, the page (where plotly is installed) and the card; returns words about what was not written."""
    (places.root / REPORT_JSON).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if places.export.is_dir():
        (places.export / CARD).write_text(card(report), encoding="utf-8")
    if importlib.util.find_spec("plotly") is None:
        return [f"{REPORT_HTML} was not written: it needs plotly. Install it: pip install 'fp4conv[report]'"]
    (places.root / REPORT_HTML).write_text(page(report), encoding="utf-8")
    return []


def card(report: Report) -> str:
    """README.md of the exported checkpoint, with the front matter that the Hub reads."""
    settings = report.settings
    base = str(settings.model)
    front = [
        "---",
        "library_name: transformers",
        "tags: [fp4conv, " + str(settings.format) + ("]" if "qat" in settings.skip else ", qat]"),
    ]
    if (repository := _repository(base)) is not None:
        front += [f"base_model: {repository}", "base_model_relation: quantized"]
    if datasets := [
        name.removeprefix(_DATASETS).partition("@")[0] for name in report.commits if name.startswith(_DATASETS)
    ]:
        front += [f"datasets: [{', '.join(datasets)}]"]
    lines = [
        *front,
        "---",
        "",
        f"# {_title(settings)}",
        "",
        f"{_how(report)} by fp4conv {__version__}.",
        "",
        *_markdown(report.cells()),
        "",
        *(f"- {fact}" for fact in [*report.facts(), *report.notes()]),
        f"- {_ran_on(report)}",
    ]
    return "\n".join(lines) + "\n"


def _repository(model: str) -> str | None:
    """'org/name' of a model on the Hub, without revision or folder; None for a local one."""
    if Path(model).exists():
        return None
    name = "/".join(model.removeprefix("hf://").split("/")[:2]).partition("@")[0]
    return name if "/" in name else None


def _title(settings: Settings) -> str:
    model = str(settings.model)
    name = (_repository(model) or Path(model).resolve().name).rpartition("/")[2]
    return f"{name}, {'quantised to' if 'qat' in settings.skip else 'trained for'} {str(settings.format).upper()}"


def _how(report: Report) -> str:
    settings, data = report.settings, Path(str(report.settings.dataset)).name
    tuned = "" if "sft" in settings.skip else f"Fine-tuned on `{data}`"
    if "qat" in settings.skip:
        return f"{tuned}, then quantised to {settings.format}"
    return f"{tuned + ', then trained' if tuned else f'Trained on `{data}`'} with {settings.format} fake quantisers"


def _ran_on(report: Report) -> str:
    return f"{report.machine}; {', '.join(f'{name} {version}' for name, version in report.versions.items())}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [
        "| " + " | ".join(_HEADS) + " |",
        "|---|" + "---:|" * (len(_HEADS) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def page(report: Report) -> str:
    """One self-contained page: the table, the loss curves, the settings. Opens without a network."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for step, trained in report.training.items():
        figure.add_scatter(
            x=[number for number, _ in trained.curve], y=[loss for _, loss in trained.curve], name=step, mode="lines"
        )
    figure.update_layout(
        template="simple_white",
        height=420,
        xaxis_title="optimizer step",
        yaxis_title="training loss (log)",
        margin={"t": 20},
    )
    figure.update_yaxes(type="log")
    plot = figure.to_html(include_plotlyjs=True, full_html=False, config={"displaylogo": False})
    rows = "".join(_row(row, "td") for row in report.cells())
    settings = "".join(_row((name, json.dumps(value)), "td") for name, value in report.settings.values().items())
    facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in [*report.facts(), *report.notes(), _ran_on(report)])
    title = _title(report.settings)
    return _PAGE.format(
        title=html.escape(title), head=_row(_HEADS, "th"), rows=rows, facts=facts, plot=plot, settings=settings
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .3rem .9rem; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
details table td {{ text-align: left; font-size: .85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table><thead>{head}</thead><tbody>{rows}</tbody></table>
<ul>{facts}</ul>
<h2>Loss in training</h2>
{plot}
<details><summary>Settings</summary><table>{settings}</table></details>
</body>
</html>
"""
