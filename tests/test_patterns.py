"""Regular expressions from files: those that name modules are taken, those that could run forever are not."""

from __future__ import annotations

import re
import shlex
import time
from fnmatch import fnmatchcase

import pytest

from fp4conv.layouts.quant_config import ignored
from fp4conv.patterns import LONGEST_NAME, LONGEST_PATTERN, compile_bounded, exclude, matches


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


@pytest.mark.parametrize("name", ["model.layers.0.q_proj", "a[0].b", "a*b", "what?", "[!x]", "]a[", "it's [a]"])
def test_names_as_globs(name: str) -> None:
    option, glob = shlex.split(exclude(name))
    assert option == "--exclude"
    assert fnmatchcase(name, glob)
    assert not fnmatchcase(name + "x", glob)
    assert not fnmatchcase(name.replace("*", "xx").replace("?", "x").replace("[0]", "0") + " ", glob)


def test_ignore_lists_take_patterns_as_compressed_tensors_does() -> None:
    """Its `re:` entries are matched with re.match, from the start of the module's name."""
    modules = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", "model.visual.0.fc1"]
    assert ignored(modules, ["re:.*mlp.gate$"]) == ["model.layers.0.mlp.gate"]
    assert ignored(modules, [r"re:.*lm_head", r"re:model\.visual.*"]) == ["lm_head", "model.visual.0.fc1"]
    assert ignored(modules, ["re:visual"]) == []
    assert ignored(modules, ["lm_head", "model.visual", "*.gate_proj"]) == [modules[0], *modules[2:]]
    assert ignored(modules, ["re:(", "re:(a+)+b", "re:(.*)*"]) == []
