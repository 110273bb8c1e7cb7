"""fixtures/ is what scripts/make_fixtures cuts from the whole reference checkpoints, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FIXTURES, REFERENCE_VARIABLE

MAKE_FIXTURES = FIXTURES.parent / "scripts" / "make_fixtures"


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and path.parent != root)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_fixtures_can_be_made_again(tmp_path: Path) -> None:
    root = os.environ.get(REFERENCE_VARIABLE)
    if not root:
        pytest.skip(f"{REFERENCE_VARIABLE} names no folder of reference checkpoints")
    subprocess.run([sys.executable, MAKE_FIXTURES, root, "--output", tmp_path], check=True, capture_output=True)
    assert contents(tmp_path) == contents(FIXTURES)


def test_fixtures_stay_small() -> None:
    assert sum(len(content) for content in contents(FIXTURES).values()) < 10_000_000
