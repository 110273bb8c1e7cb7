"""Regular expressions from files: those that name modules are taken, those that could run forever are not."""

from __future__ import annotations

import re
import time

import pytest

from fp4conv.patterns import LONGEST_NAME, LONGEST_PATTERN, compile_bounded, matches


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"model\.layers\.(0|1|2)\.self_attn\.(q|k|v)_proj",
        r".*layers\.[0-9]+\.mlp\.(up|down)_proj",
        r"(.*\.)?(model\.layers\.\d{1,2}\.mlp\..*_proj)$",
        r"^(?!.*experts).*",
        r"(?:model\.)?lm_head",
        r"\(a+\)+",  # escaped: no group
        "[(a|b)+]+",  # in a set: no group
        "|".join(f"layers.{number}.q_proj" for number in range(30)),
    ],
)
def test_patterns_that_name_modules_are_taken(pattern: str) -> None:
    assert compile_bounded(pattern).pattern == pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a|a)" * 40 + "b",
        "a?" * 40 + "a" * 40,
        "a*" * 9 + "b",
        "(?:(?:a)*)*b",
        "(?P<x>a*){2,}b",
        "([a-z]+)*b",
        "((a|b)|c)+",
        "a{1,50}" * 9 + "b",
        r"(\w|\d)+$",
        "(?x:(a+) +b)",  # blanks mean nothing here
        "(a+)(?#remark)+b",
        "(" * 90 + "a*" + ")*" * 90,
    ],
)
def test_patterns_that_could_take_forever_are_not(pattern: str) -> None:
    with pytest.raises(ValueError, match="take forever"):
        compile_bounded(pattern)


def test_what_is_no_pattern_or_too_long() -> None:
    for pattern in ("(", "[", "*", "a**", "(?P<1>a)"):
        with pytest.raises(ValueError, match="no regular expression"):
            compile_bounded(pattern)
    with pytest.raises(ValueError, match="characters"):
        compile_bounded("a" * (LONGEST_PATTERN + 1))


@pytest.mark.parametrize("pattern", [r"(.*\.)?(.*a.*a.*b)$", r"(a|aa|aaa)" * 8 + "(b|c)", "a*a*a*a*b"])
def test_the_worst_that_is_taken_ends_soon(pattern: str) -> None:
    taken = compile_bounded(pattern)
    started = time.monotonic()
    assert not matches(taken, "a." * (LONGEST_NAME // 4) + "a" * (LONGEST_NAME // 2))
    assert time.monotonic() - started < 20


def test_a_name_longer_than_any_is_not_matched() -> None:
    assert matches(re.compile("a+"), "a" * LONGEST_NAME)
    assert not matches(re.compile("a+"), "a" * (LONGEST_NAME + 1))
