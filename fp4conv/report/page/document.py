"""The page as one text: template, style, scripts, the plotting library and the figures, with nothing left to fetch.

Names of tensors come from strangers. They travel as compressed bytes in base64, which no markup can break out of, and
the scripts put them on the page as text. Beside that, the page's own policy lets no script run but the two whose
digests it gives, and nothing be fetched from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from importlib.resources import files
from string import Template

from fp4conv.errors import UsageError
from fp4conv.report.facts import Inspected
from fp4conv.report.page.payload import payload

SCRIPTS = ("dom", "figures", "model", "theme", "summary", "charts", "details", "table", "main")


def plotting_library() -> str:
    """The text of plotly.js. UsageError where the extra that brings it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        hint = "install it: pip install 'fp4conv[report]'"
        raise UsageError("--html needs plotly, which is not installed", hint=hint) from error
    text: str = get_plotlyjs()
    return text


def page(found: Inspected) -> str:
    """The whole page; the same text for the same figures and the same release of plotly."""
    library = plotting_library()
    script = _script()
    return Template(_part("page.html")).substitute(
        title=html.escape(f"{found.source} · fp4conv"),
        digests=f"{_digest(script)} {_digest(library)}",
        style=_part("page.css"),
        dark=_part("dark.css"),
        figures=_packed(json.dumps(payload(found), ensure_ascii=False, allow_nan=False, separators=(",", ":"))),
        library=_packed(library),
        script=script,
    )


def _script() -> str:
    """The scripts as one, in an order where each uses what stands before it, and in a scope of its own."""
    body = "\n".join(_part(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n{{\n{body}}}\n'


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """As a Content-Security-Policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _packed(text: str) -> str:
    # Lone surrogates are refused with the source's headers; "replace" is for the folder's own name.
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), 6, mtime=0)).decode()
