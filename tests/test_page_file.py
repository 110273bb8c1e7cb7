"""The page as a file: what is in it, that strangers' names cannot break out of it, and where it may be written."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pages
import pytest
from click.testing import CliRunner

from fp4conv.cli import main
from fp4conv.errors import Fp4convError, OutputError, UsageError
from fp4conv.report.facts import ErrorFacts, Inspected
from fp4conv.report.page import PagePlace, page

HOSTILE = (
    "</script><script>document.title = 'hacked'</script>",
    '"><img src=x onerror="document.title = `hacked`">',
    "$figures $style ${script} <!-- {{ }} -->",
    "javascript:alert(1)//%00",
)


def told(text: str) -> dict[str, Any]:
    """The figures in the page, unpacked as the page does it."""
    found = re.search(r'<script type="application/octet-stream" id="figures">([A-Za-z0-9+/=]*)</script>', text)
    assert found
    figures: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])), parse_constant=pytest.fail)
    return figures


def with_names(names: tuple[str, ...]) -> Inspected:
    """A model whose every text is one of `names`."""
    model = pages.model(1)
    tensors = tuple(
        replace(model.tensors[1], name=name, kind=name, file=name, format=name, role=name) for name in names
    )
    return replace(
        model, source=names[0], reference=names[0], format=names[0], family=names[0], tensors=tensors, warnings=names
    )


def test_the_page_holds_every_figure() -> None:
    model = pages.model(2, target="mxfp4")
    figures = told(page(model))
    assert [row[0] for row in figures["tensors"]] == [facts.name for facts in model.tensors]
    for row, facts in zip(figures["tensors"], model.tensors, strict=True):
        assert facts.values
        assert facts.error
        assert (figures["formats"][row[1]], tuple(row[2]), row[3]) == (facts.format, facts.shape, facts.bytes)
        assert row[10] == [
            facts.error.values,
            facts.error.differ,
            facts.error.left_out,
            *(facts.error.signal, facts.error.noise, facts.error.dot, facts.error.power),
            *(facts.error.max_abs_error, facts.error.max_rel_error),
        ]
        codes, spread = row[9][-2:]
        assert tuple(codes) == facts.values.codes
        places = [figures["scales"][place] for place in spread[::2]]
        assert tuple(zip(places, spread[1::2], strict=True)) == facts.values.scales


def test_the_page_is_the_same_for_the_same_figures() -> None:
    assert page(pages.model(2)) == page(pages.model(2))


def test_figures_without_a_number_are_still_json() -> None:
    error = ErrorFacts(1, float("inf"), float("nan"), float("-inf"), 1.0, float("inf"), 0.0)
    model = pages.model(1)
    broken = replace(model, tensors=tuple(replace(facts, error=error) for facts in model.tensors))
    sums = told(page(broken))["tensors"][0][10]
    assert sums[3:6] == ["Infinity", "NaN", "-Infinity"]


def test_names_of_strangers_are_nowhere_in_the_markup() -> None:
    plain, hostile = page(pages.model(1)), page(with_names(HOSTILE))
    for name in HOSTILE[:2]:
        assert name not in hostile
    assert hostile.count("<script") == plain.count("<script") == 3
    assert told(hostile)["warnings"] == list(HOSTILE)


def test_the_policy_names_just_the_scripts_that_run() -> None:
    text = page(pages.model(1))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert not {"connect-src", "font-src", "frame-src", "object-src"} & set(rules)
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    library = re.search(r'id="library">([A-Za-z0-9+/=]*)<', text)
    assert library
    expected = [script.encode(), gzip.decompress(base64.b64decode(library[1]))]
    digests = [base64.b64encode(hashlib.sha256(each).digest()).decode() for each in expected]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert b"plotly.js v" in expected[1][:100]


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r"pip install 'fp4conv\[report\]'"):
        PagePlace.of(tmp_path / "page.html")


def test_writing_gives_a_new_file_with_the_rights_of_one(tmp_path: Path) -> None:
    size = PagePlace.of(tmp_path / "page.html").write(pages.model(1))
    (tmp_path / "plain").touch()
    assert (tmp_path / "page.html").stat().st_size == size
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("page.html", "plain")]
    assert rights[0] == rights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "plain"]


def test_an_older_page_is_replaced_whole_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.html"
    PagePlace.of(file).write(pages.model(1))
    older = file.read_bytes()
    PagePlace.of(file).write(pages.model(2))
    newer = file.read_bytes()
    assert newer != older

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        PagePlace.of(file).write(pages.model(1))
    assert file.read_bytes() == newer
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("model/page.html", "lies inside"),
        ("link/page.html", "lies inside"),
        ("model/../model/deep/page.html", "lies inside"),
        ("inward.html", "lies inside"),
        ("notes.txt", "is no HTML page"),
        ("folder", "is a folder"),
        ("nowhere/page.html", "there is no folder"),
        ("loop", "cannot be written|lies inside|no folder"),
        ("x" * 300, "cannot be written"),
        ("nul\0l", "cannot be written"),
        ("/dev/null", "no plain file"),
    ],
)
def test_places_that_are_refused(tmp_path: Path, place: str, says: str) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "inward.html").symlink_to(tmp_path / "model" / "inward.html")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("what I must not forget")
    with pytest.raises(Fp4convError, match=says):
        PagePlace.of(tmp_path / place, tmp_path / "model")
    assert (tmp_path / "notes.txt").read_text() == "what I must not forget"


def test_a_hub_name_is_no_folder_to_stay_out_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PagePlace.of("page.html", "openai/gpt-oss-20b").path == tmp_path / "page.html"


def test_the_command_writes_the_page_and_still_says_what_it_found(
    reference: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    source = str(reference("gptoss-mxfp4"))
    ran = CliRunner().invoke(main, ["inspect", source, "--json", "--html", str(file)])
    assert (ran.exit_code, ran.stderr) == (0, f"written: {file}\n")
    names = [facts["name"] for facts in json.loads(ran.stdout)["tensors"]]
    assert [row[0] for row in told(file.read_text())["tensors"]] == names


def test_the_command_asks_for_the_place_before_it_reads(tmp_path: Path) -> None:
    """There is no checkpoint here, and that would be said only later."""
    ran = CliRunner().invoke(main, ["inspect", str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert ran.exit_code == 1
    assert "lies inside" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_readme_shows_pictures_that_are_there_and_small() -> None:
    root = Path(__file__).resolve().parent.parent
    shown = re.findall(r"docs/pictures/[\w.-]+", (root / "README.md").read_text(encoding="utf-8"))
    assert len(set(shown)) == 3
    for picture in shown:
        assert (root / picture).stat().st_size < 150_000
    svg = (root / "docs/pictures/inspect-terminal.svg").read_text(encoding="utf-8")
    assert not re.search(r"@font-face|url\(http|href=.http", svg)  # nothing for a reader's browser to fetch
