"""The table of what servers make of faults: pinned, without dead rows, and the same in the docs as in the code."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from fp4conv.families import FAMILIES
from fp4conv.faults import Kind
from fp4conv.readings import READINGS, Checkpoint, Reading, consequences, reading, readings_as_markdown
from fp4conv.servers import SERVERS, VERSIONS

DOC = Path(__file__).resolve().parent.parent / "docs" / "servers.md"
PINNED = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/blob/([0-9a-f]{9,40}|v\d[\w.]*)/[\w./-]+(#L\d+)?")
LAYOUTS = ("hf", "openai", "openai-original", "modelopt", "compressed-tensors", "fp8")
FAMILY_NAMES = tuple(dict.fromkeys(family.name for family in FAMILIES))
ROWS = [(server, row) for server, rows in READINGS.items() for row in rows]


def test_every_server_has_a_table() -> None:
    assert tuple(READINGS) == SERVERS


@pytest.mark.parametrize(("server", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else value.kinds[0])
def test_each_row_is_pinned_and_fits_a_table(server: str, row: Reading) -> None:
    assert PINNED.fullmatch(row.source), row.source
    assert row.note
    assert "|" not in row.note
    assert set(row.layouts) <= set(LAYOUTS)
    assert set(row.families) <= set(FAMILY_NAMES)


@pytest.mark.parametrize(("server", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else value.kinds[0])
def test_no_kind_of_a_row_is_shadowed(server: str, row: Reading) -> None:
    """Each kind that a row names is read by it somewhere, so that none stands there for nothing."""
    for kind in row.kinds:
        grid = product(row.layouts or LAYOUTS, row.families or FAMILY_NAMES, (False, True))
        firsts = (
            next(
                each for each in READINGS[server] if each.matches(kind, Checkpoint("", layout, family), experts=experts)
            )
            for layout, family, experts in grid
            if row.matches(kind, Checkpoint("", layout, family), experts=experts)
        )
        assert any(first is row for first in firsts), kind


def test_the_docs_show_this_table() -> None:
    assert readings_as_markdown() in DOC.read_text(encoding="utf-8")


def test_what_was_not_read_is_not_answered() -> None:
    nvfp4 = Checkpoint("nvfp4", "modelopt", "dense")
    assert reading("llamacpp", Kind.MISSING_INPUT_SCALE, nvfp4, experts=False) is None
    assert "llamacpp" not in {each.server for each in consequences(Kind.MISSING_INPUT_SCALE, nvfp4, experts=False)}


@pytest.mark.parametrize(
    ("kind", "layout", "experts", "outcomes"),
    [
        (Kind.TENSOR_SCALES_DIFFER, "modelopt", False, "vllm:silent-damage sglang:silent-damage trtllm:refuses"),
        (Kind.TENSOR_SCALES_DIFFER, "modelopt", True, "vllm:silent-damage sglang:silent-damage trtllm:silent-damage"),
        (Kind.NESTED_WEIGHT_ONLY, "modelopt", False, "vllm:refuses sglang:loads"),
        (Kind.GROUP_SIZE_NESTED, "modelopt", False, "vllm:loads sglang:loads trtllm:loads"),
        (Kind.MISSING_SHARD, "hf", False, "vllm:refuses sglang:refuses transformers:refuses llamacpp:refuses"),
    ],
)
def test_known_cells(kind: Kind, layout: str, experts: bool, outcomes: str) -> None:
    found = consequences(kind, Checkpoint("", layout, "dense"), experts=experts)
    assert outcomes in " ".join(f"{each.server}:{each.outcome}" for each in found)
    assert all(each.version == VERSIONS[each.server] for each in found)
