"""A report as files: the JSON, the page with the loss curves, and the model card of the export."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from fp4conv.qat.report import DATASETS, HEADS, Report
from fp4conv.qat.settings import Settings
from fp4conv.version import __version__

if TYPE_CHECKING:
    from fp4conv.qat.steps import Places

REPORT_JSON, REPORT_HTML, CARD = "report.json", "report.html", "README.md"
_CURVES = {"sft": "#4a7fe0", "qat": "#c98a1b"}  # to be told apart on white and on black


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
        name.removeprefix(DATASETS).partition("@")[0] for name in report.commits if name.startswith(DATASETS)
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
        "| " + " | ".join(HEADS) + " |",
        "|---|" + "---:|" * (len(HEADS) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def page(report: Report) -> str:
    """One self-contained page: the table, the loss curves, the settings. Opens without a network."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for step, trained in report.training.items():
        steps, losses = zip(*trained.curve, strict=True) if trained.curve else ((), ())
        figure.add_scatter(x=steps, y=losses, name=step, mode="lines", line_color=_CURVES[step])
    figure.update_layout(
        template="simple_white",
        paper_bgcolor="rgba(0,0,0,0)",  # the page's own, by day and by night
        plot_bgcolor="rgba(0,0,0,0)",
        modebar_bgcolor="rgba(0,0,0,0)",
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
    return Template((files(__package__) / "written.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title), head=_row(HEADS, "th"), rows=rows, facts=facts, plot=plot, settings=settings
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
