"""The page that `inspect --html` writes: what it says, how it is put together, and where it may be written."""

from __future__ import annotations

from fp4conv.report.page.document import page
from fp4conv.report.page.writing import PagePlace

__all__ = ["PagePlace", "page"]
