"""What `pip install 'fp4conv[qat]'` brings, and what says that it is missing. Imports none of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from fp4conv.errors import UsageError

_INSTALL = "pip install 'fp4conv[qat]'"


def check_packages(work: str, needed: Sequence[str]) -> None:
    """UsageError that names the `needed` packages that are missing, and how they are installed.

    `work`: what needs them, such as 'training'.
    """
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        # pip would only say that it finds no trl.
        hint = f"with Python 3.11 or newer, which trl needs: {_INSTALL}" if sys.version_info < (3, 11) else _INSTALL
        raise UsageError(f"{work} needs {', '.join(missing)}", hint=hint)
