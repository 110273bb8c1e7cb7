"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from fp4conv.errors import UsageError
from fp4conv.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5 kb", 1500),
        ("7", 7),
        ("2TiB", 2 * 2**40),
        (" 3 MB ", 3 * 10**6),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-1GB", "0", "1e9", "five", "5GB5"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (81_920, "81.9 kB"),
        (999_499, "999 kB"),
        (999_900_000, "1.00 GB"),
        (1_405_000_000, "1.41 GB"),
        (65_248_815_744, "65.2 GB"),
        (2_500_000_000_000, "2.50 TB"),
        (3_000_000_000_000_000, "3000 TB"),
    ],
)
def test_sizes_are_written(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
