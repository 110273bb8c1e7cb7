"""Sizes as people write and read them: '5GB', '512MiB', 1.4 GB."""

from __future__ import annotations

import re

from fp4conv.errors import UsageError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_MOST = 2**63 - 1  # bytes that a file can have
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of '5GB' (10^9), '512MiB' (2^20) or a plain number. Raises UsageError."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 0 < float(match[1]) * unit <= _MOST:
        raise UsageError(f"{text[:80]!r} is not a size", hint="write it like 5GB, 512MiB or a number of bytes")
    return int(float(match[1]) * unit)


def format_size(nbytes: float) -> str:
    """Decimal, three figures: '1.41 GB', '710 MB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5 or unit == "TB":
            break
        nbytes /= 1000
    if unit == "B":
        return f"{nbytes:.0f} B"
    return f"{nbytes:.{2 if nbytes < 9.995 else 1 if nbytes < 99.95 else 0}f} {unit}"


def as_option(nbytes: int) -> str:
    """A size to type, rounded up to three figures or so: '5.21GB', '34MB'."""
    unit, name = (10**7, "GB") if nbytes >= 10**9 else (10**4, "MB")
    return f"{-(-nbytes // unit) / 100:g}{name}"
