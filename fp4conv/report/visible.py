"""Text of strangers on its way to a terminal: what would steer it, or turn what stands beside it, shows as a mark.

Names of tensors and files may hold any character. Machines get them as they are, from `--json` and `--csv`.
"""

from __future__ import annotations

import unicodedata

_MARK = "\N{REPLACEMENT CHARACTER}"
_LINE_END = "\n"
# Controls of terminals (C0, C1), and what is formatting alone: directions of writing, joiners.
_UNSEEN = ("Cc", "Cf")


def visible(text: str) -> str:
    """`text` with a mark for each control or formatting character but the end of a line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_MARK if unicodedata.category(char) in _UNSEEN and char != _LINE_END else char for char in text)
