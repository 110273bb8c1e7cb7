"""The page in a browser: Debian's Chromium, headless, driven by playwright. Skipped by name where there is none."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pages
import pytest
from test_page_file import HOSTILE, with_names

from fp4conv import inspect
from fp4conv.report.facts import Inspected, TensorFacts, add_errors
from fp4conv.report.page import page

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")
DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium, as Debian's package `chromium` has it")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program)
        yield opened
        opened.close()


@dataclass
class Seen:
    """A page that is open, and all that a careful reader of the browser's console would have noticed."""

    tab: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def rows(self) -> list[str]:
        """The names in sight, from the top."""
        names: list[str] = self.tab.eval_on_selector_all("#rows a.name", "links => links.map((link) => link.title)")
        return names

    def count(self) -> int:
        return int(self.tab.inner_text("#shown").split(" of ")[0].replace(",", ""))

    def fact(self, name: str) -> str:
        """A figure of the tensor whose details are open."""
        found: str = self.tab.inner_text(f"#details dl > div:has(dt:text-is('{name}')) dd")
        return found

    def until(self, script: str, expected: object = True) -> None:
        """Wait for it. The driver's own wait runs text as code in the page, which the page's policy forbids."""
        for _ in range(1200):
            if self.tab.evaluate(script) == expected:
                return
            self.tab.wait_for_timeout(50)
        pytest.fail(f"{script}: {self.tab.evaluate(script)!r}, expected {expected!r}")

    def open(self, name: str) -> None:
        """The details of a tensor, by its address."""
        self.tab.evaluate("name => { location.hash = '#tensor=' + encodeURIComponent(name); }", name)
        self.opens(name)

    def opens(self, name: str) -> None:
        """Wait for the details of a tensor: the browser tells the page of a new address when it has time."""
        self.until("document.querySelector('#details h2')?.textContent", name)

    def plot(self, figure: str) -> Any:
        """What plotly was told to draw."""
        wanted = "plot => plot.data.map(({ x, y, z, type }) => ({ x, y, z, type }))"
        return self.tab.eval_on_selector(f"#{figure} .plot", wanted)


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Seen]]:
    """`look(model, hash="", **settings of the browser)` opens its page; at the end nothing may have gone wrong."""
    opened: list[Seen] = []

    def open_page(model: Inspected, *, hash: str = "", **settings: Any) -> Seen:
        file = tmp_path / f"page-{len(opened)}.html"
        file.write_text(page(model), encoding="utf-8")
        tab = browser.new_page(**{"viewport": {"width": 1360, "height": 900}, **settings})
        tab.set_default_timeout(120_000)  # a busy machine is slow, not wrong
        seen = Seen(tab)
        opened.append(seen)
        tab.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: seen.complaints.append(str(error)))
        tab.on("request", lambda request: seen.requests.append(request.url))
        tab.goto(file.as_uri() + hash)
        tab.wait_for_selector("html[data-ready=all]", state="attached")
        return seen

    yield open_page
    for number, seen in enumerate(opened):
        assert seen.complaints == []
        assert [url.partition("#")[0] for url in seen.requests] == [(tmp_path / f"page-{number}.html").as_uri()]
        seen.tab.close()


def decibels(tensors: list[TensorFacts]) -> float:
    """Over those that are not equal to the reference."""
    return add_errors(facts.error for facts in tensors if facts.error and facts.error.differ).sqnr_db


def test_the_summary_says_what_the_figures_say(look: Callable[..., Seen]) -> None:
    model = pages.model(6)
    seen = look(model)
    text = seen.tab.inner_text("main")
    assert seen.tab.inner_text("h1") == "my-llama-nvfp4"
    assert f"{decibels(list(model.tensors)):.2f} dB" in seen.tab.inner_text("#cards")
    assert f"{model.parameters:,}" in text
    assert f"{model.bits_per_weight:.2f} bits a weight" in text
    assert seen.count() == len(model.tensors)


def test_plots_show_the_error_of_each_layer_and_kind(look: Callable[..., Seen]) -> None:
    model = pages.model(6)
    seen = look(model)
    layers = [[facts for facts in model.tensors if facts.layer == layer] for layer in range(6)]
    _, line = seen.plot("by-layer")
    assert line["x"] == list(range(6))
    assert line["y"] == pytest.approx([decibels(members) for members in layers], rel=1e-12)
    _, dots = seen.plot("by-kind")
    kinds = {facts.kind for facts in model.tensors if facts.error and facts.error.noise}
    expected = sorted((decibels([f for f in model.tensors if f.kind == kind]) for kind in kinds), reverse=True)
    assert dots["x"] == pytest.approx(expected, rel=1e-12)
    (cells,) = seen.plot("by-both")
    assert len(cells["z"]) == len(kinds)
    worst = [facts for facts in layers[3] if facts.kind == "down_proj"]
    assert min(row[3] for row in cells["z"]) == pytest.approx(decibels(worst), rel=1e-12)


def test_plots_show_how_codes_and_scales_are_spread(look: Callable[..., Seen]) -> None:
    model = pages.model(3, target="mxfp4")
    seen = look(model)
    scales, codes = (seen.plot(f"spread figure:nth-of-type({number})")[0]["y"] for number in (1, 2))
    quantised = [facts.values for facts in model.tensors if facts.values and facts.values.codes]
    counts = [sum(values.codes[code] for values in quantised) for code in (*range(15, 7, -1), *range(8))]
    assert codes == pytest.approx([100 * count / sum(counts) for count in counts])
    blocks = Counter[float]()
    for values in quantised:
        blocks.update(dict(values.scales))
    steps = range(int(min(blocks)), int(max(blocks)) + 1)  # a gap is drawn as a gap
    assert scales == pytest.approx([100 * blocks[step] / blocks.total() for step in steps])


def test_a_click_on_a_plot_leaves_the_tensors_behind_it(look: Callable[..., Seen]) -> None:
    seen = look(pages.model(6))
    seen.tab.locator("#by-both .nsewdrag").scroll_into_view_if_needed()
    box = seen.tab.locator("#by-both .nsewdrag").bounding_box()
    seen.tab.mouse.click(box["x"] + box["width"] * 3.5 / 6, box["y"] + 12)  # down_proj, the worst, is on top
    seen.until("document.getElementById('of-layer').value", "=3")
    assert seen.rows() == [DOWN]


def test_sorting(look: Callable[..., Seen]) -> None:
    """Those without a figure come last either way, and equals stay in the model's order."""
    model = pages.model(12)
    keys: dict[str, Callable[[TensorFacts], Any]] = {
        "sqnr": lambda facts: facts.error.sqnr_db if facts.error else None,
        "error": lambda facts: facts.error.max_abs_error if facts.error else None,
        "size": lambda facts: facts.bytes,
        "name": lambda facts: [int(part) if part.isdigit() else part for part in facts.name.split(".")],
        "format": lambda facts: facts.format,
        "layer": lambda facts: facts.layer,
    }
    seen = look(model)
    for column, key in keys.items():
        header = seen.tab.locator(f"th[data-key={column}]")
        known = [facts for facts in model.tensors if key(facts) is not None]
        missing = [facts for facts in model.tensors if key(facts) is None]
        directions = set()
        for _ in range(2):
            header.locator("button").click()
            directions.add(direction := header.get_attribute("aria-sort"))
            expected = [*sorted(known, key=key, reverse=direction == "descending"), *missing]
            assert seen.rows() == [facts.name for facts in expected][: len(seen.rows())], column
        assert directions == {"ascending", "descending"}
        assert seen.tab.locator("th[aria-sort]:not([aria-sort=none])").count() == 1


def test_filtering(look: Callable[..., Seen]) -> None:
    model = pages.model(12)
    names = [facts.name for facts in model.tensors]
    seen = look(model)
    for text, expected in (
        ("DOWN_proj", [name for name in names if "down_proj" in name]),
        ("layers.1.", [name for name in names if "layers.1." in name]),
        ("*.1?.*.?_proj.weight", [name for name in names if fnmatchcase(name, "*.1?.*.?_proj.weight")]),
        ("(.*", []),
    ):
        seen.tab.fill("#find", text)
        assert (seen.count(), seen.rows()) == (len(expected), expected[: len(seen.rows())])
    assert seen.tab.is_visible("text=No tensor is like that.")
    seen.tab.click("button[type=reset]")
    seen.until("document.getElementById('shown').textContent", str(len(names)))
    seen.tab.select_option("#of-format", label="bf16")
    assert seen.count() == sum(facts.format == "bf16" for facts in model.tensors)
    seen.tab.select_option("#of-layer", label="outside of layers")
    assert seen.rows() == ["model.embed_tokens.weight"]
    seen.tab.select_option("#of-format", label="all")
    seen.tab.select_option("#of-layer", label="3")
    seen.tab.select_option("#of-kind", label="down_proj")
    assert seen.rows() == [DOWN]


def test_details_by_mouse_by_keyboard_and_by_address(look: Callable[..., Seen]) -> None:
    model = pages.model(6)
    facts = next(facts for facts in model.tensors if facts.name == DOWN)
    assert facts.error
    assert facts.values
    seen = look(model, hash=f"#tensor={DOWN}")
    assert seen.tab.inner_text("#details h2") == DOWN
    assert seen.fact("SQNR") == f"{facts.error.sqnr_db:.2f} dB"
    assert float(seen.fact("MSE").replace("\u2212", "-")) == pytest.approx(facts.error.mse, rel=1e-3)
    assert float(seen.fact("Cosine")) == pytest.approx(facts.error.cosine, abs=1e-8)
    assert float(seen.fact("Tensor scale").replace("\u2212", "-")) == pytest.approx(facts.values.tensor_scale, rel=1e-5)
    assert seen.fact("Blocks") == f"{facts.values.blocks:,}"
    seen.tab.wait_for_selector("#details .bars path", state="attached")
    bars = seen.tab.eval_on_selector_all("#details .plot", "plots => plots.map((plot) => plot.data[0].y)")
    assert bars[1][0] == pytest.approx(100 * facts.values.codes[15] / sum(facts.values.codes))
    seen.tab.keyboard.press("ArrowRight")
    seen.tab.wait_for_selector("#details h2:text-is('model.layers.3.input_layernorm.weight')")
    assert seen.fact("SQNR") == "same"
    seen.tab.keyboard.press("Escape")
    assert not seen.tab.is_visible("#details")
    seen.until("location.hash", "")

    seen.tab.click("#rows tr[data-row='4'] td:nth-child(5)")
    seen.opens(model.tensors[4].name)
    seen.tab.click("#details [aria-label=Close]")
    seen.until("location.hash", "")

    seen.tab.focus("#rows a.name >> nth=0")
    for _ in range(40):  # further than what is in the document at first
        seen.tab.keyboard.press("ArrowDown")
    seen.tab.keyboard.press("Enter")
    seen.opens(model.tensors[40].name)
    seen.tab.keyboard.press("Escape")
    seen.until("document.activeElement.title", model.tensors[40].name)


def test_an_address_of_nothing_opens_nothing(look: Callable[..., Seen]) -> None:
    seen = look(pages.model(1), hash="#tensor=gone.weight")
    for address in ("#tensor=%E0%A4%A", "#elsewhere"):
        assert not seen.tab.is_visible("#details")
        seen.tab.evaluate("address => { location.hash = address; }", address)
    assert not seen.tab.is_visible("#details")


def test_light_and_dark(look: Callable[..., Seen]) -> None:
    def ground(seen: Seen) -> str:
        colour: str = seen.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    def bars(seen: Seen) -> str:
        script = "document.querySelector('#spread .bars path').style.fill"
        colour: str = seen.tab.evaluate(script)
        return colour

    light, dark = look(pages.model(1)), look(pages.model(1), color_scheme="dark")
    grounds, colours = [ground(light), ground(dark)], [bars(light), bars(dark)]
    assert grounds[0] != grounds[1]
    assert colours[0] != colours[1]
    light.tab.click("#theme")
    light.until("document.querySelector('#spread .bars path')?.style.fill", colours[1])
    assert ground(light) == grounds[1]
    light.tab.reload()
    light.tab.wait_for_selector("html[data-ready=all]", state="attached")
    light.requests.pop()
    assert ground(light) == grounds[1]


def test_a_conversion_is_chosen_and_shown_everywhere(look: Callable[..., Seen]) -> None:
    model = pages.dense(4)
    totals = {
        (format, rule): add_errors(
            estimate.error
            for facts in model.tensors
            for estimate in facts.estimates
            if (estimate.format, estimate.rule) == (format, rule)
        )
        for format, rule in {(e.format, e.rule) for facts in model.tensors for e in facts.estimates}
    }
    seen = look(model)
    rows = seen.tab.locator("#conversions tbody tr")
    assert rows.count() == len(totals) == 7
    for (format, rule), error in totals.items():
        row = seen.tab.inner_text(f"#conversions tr:has(input[aria-label='{format}, {rule}'])")
        assert f"{error.sqnr_db:.2f} dB" in row
    best = max(totals, key=lambda offer: totals[offer].sqnr_db)
    assert seen.tab.get_attribute("#conversions input:checked", "aria-label") == ", ".join(best)
    seen.tab.focus("#conversions input:checked")
    seen.tab.keyboard.press("ArrowUp")
    seen.tab.keyboard.press("ArrowUp")
    assert seen.tab.evaluate("document.activeElement.getAttribute('aria-label')") == "nvfp4, amax"
    expected = [next(e.error.sqnr_db for e in f.estimates if e.rule == "amax") for f in model.tensors if f.estimates]
    shown = seen.tab.eval_on_selector_all(
        "#rows tr[data-row] td:nth-child(7)", "cells => cells.map((c) => c.innerText)"
    )
    assert [text for text in shown if text] == [f"{value:.2f}" for value in expected][: sum(map(bool, shown))]
    assert "nvfp4, amax" in seen.tab.inner_text("#error-lead")
    total = totals["nvfp4", "amax"].sqnr_db
    assert f"{total:.2f} dB" in seen.tab.inner_text("#error-lead")


def test_names_of_strangers_are_text(look: Callable[..., Seen]) -> None:
    names = (
        *HOSTILE,
        "<a href='javascript:alert(1)'>click</a>",
        "__proto__",
        "\u202edesrever",
        "",
        "a'b\"c",
        "x" * 3000,
    )
    seen = look(with_names(names))
    assert sorted(seen.rows()) == sorted(names)
    assert seen.tab.title() == f"{HOSTILE[0]} · fp4conv"
    assert (
        seen.tab.evaluate(
            "document.images.length + document.querySelectorAll('#rows script, main a[href^=java]').length"
        )
        == 0
    )
    for name in names:
        seen.open(name)
    assert seen.tab.title() == f"{HOSTILE[0]} · fp4conv"


def test_nothing_can_be_fetched_or_run(look: Callable[..., Seen]) -> None:
    """Beside showing the policy at work, this shows that the other tests would notice a request that was tried."""
    seen = look(pages.model(1))
    script = (
        "const tag = document.createElement('script'); tag.textContent = 'window.ran = 1'; document.body.append(tag)"
    )
    seen.tab.evaluate(script)
    assert seen.tab.evaluate("window.ran") is None
    assert seen.tab.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'kept')") == "kept"
    assert len(seen.complaints) >= 2
    assert all("Content Security Policy" in complaint for complaint in seen.complaints[:2])
    seen.complaints.clear()


def test_5000_tensors(look: Callable[..., Seen]) -> None:
    model = pages.model(24, experts=68)
    assert len(model.tensors) > 5000
    seen = look(model)
    assert seen.count() == len(model.tensors)
    in_document = "document.querySelectorAll('#rows tr[data-row]').length"
    assert seen.tab.evaluate(in_document) < 100
    seen.tab.evaluate("() => { const rows = document.getElementById('rows'); rows.scrollTop = rows.scrollHeight; }")
    last = seen.tab.locator(f"#rows a.name[title='{model.tensors[-1].name}']")
    last.wait_for()
    row = seen.tab.locator(f"#rows tr[aria-rowindex='{len(model.tensors) + 1}']")
    assert row.locator("a").get_attribute("title") == model.tensors[-1].name
    assert seen.tab.evaluate(in_document) < 100
    seen.tab.click("th[data-key=sqnr] button")
    known = [facts for facts in model.tensors if facts.error]
    assert seen.rows()[0] == min(known, key=lambda facts: facts.error.sqnr_db if facts.error else math.inf).name
    seen.tab.fill("#find", "*layers.7.*experts.11.*")
    assert seen.count() == 3


def test_narrow_and_wide(look: Callable[..., Seen]) -> None:
    seen = look(pages.dense(3), viewport={"width": 400, "height": 800})
    for width in (400, 800, 2400):
        seen.tab.set_viewport_size({"width": width, "height": 800})
        seen.until("innerWidth", width)
        assert seen.tab.evaluate("document.documentElement.scrollWidth") <= width
        inside = "document.getElementById('rows').scrollWidth - document.getElementById('rows').clientWidth"
        if width != 800:
            assert seen.tab.evaluate(inside) <= 0


def test_figures_that_were_not_read_or_are_no_numbers(look: Callable[..., Seen]) -> None:
    model = pages.model(2)
    bare = replace(model, tensors=tuple(replace(f, values=None, error=None) for f in model.tensors), reference=None)
    seen = look(bare)
    assert not seen.tab.is_visible("#error")
    assert "Bytes by kind of module" in seen.tab.inner_text("#spread")
    assert look(replace(bare, tensors=(), parameters=0, bytes=0)).count() == 0

    def broken(facts: TensorFacts) -> TensorFacts:
        assert facts.error
        assert facts.values
        error = replace(facts.error, signal=0.0, left_out=7)
        values = replace(facts.values, nan=1234, smallest=None, largest=None, nan_scales=3, tensor_scale=float("nan"))
        return replace(facts, error=error, values=values)

    seen = look(
        replace(model, tensors=tuple(map(broken, model.tensors))), hash="#tensor=model.layers.0.mlp.up_proj.weight"
    )
    assert seen.fact("SQNR") == "\u2212∞"
    assert seen.fact("Left out, not finite") == "7"
    assert seen.fact("Tensor scale") == "NaN"
    assert seen.fact("NaN and Inf") == "1,234"
    assert seen.fact("Blocks under a NaN scale").startswith("3 (")


@pytest.mark.parametrize(
    ("name", "against"),
    [("qwen3moe-nvfp4-default", "qwen3moe-bf16"), ("gptoss-mxfp4-native-like", None), ("llama-bf16", None)],
)
def test_checkpoints_that_other_tools_wrote(
    look: Callable[..., Seen], reference: Callable[[str], Path], name: str, against: str | None
) -> None:
    """Every tensor's details open, and its figures are those that `inspect` gives."""
    found = inspect(reference(name), reference=None if against is None else reference(against))
    seen = look(found)
    assert seen.tab.inner_text("h1") == name
    for facts in found.tensors[:: max(1, len(found.tensors) // 12)]:
        assert facts.values
        seen.open(facts.name)
        assert seen.fact("Zeros") == f"{facts.values.zeros:,}"
        assert seen.fact("Shape") == ("\u00d7".join(f" {n} " for n in facts.shape).strip() or "scalar")
        assert seen.fact("Size").endswith(f"({facts.bytes:,} B)")
        if facts.error:
            shown = seen.fact("SQNR")
            assert shown == (f"{facts.error.sqnr_db:.2f} dB" if facts.error.differ else "same")
        offers = {(estimate.format, estimate.rule): f"{estimate.error.sqnr_db:.2f}" for estimate in facts.estimates}
        cells = seen.tab.eval_on_selector_all(
            "#details tbody tr", "rows => rows.map((row) => [...row.cells].map((cell) => cell.innerText))"
        )
        assert {(cell[0], cell[1]): cell[2] for cell in cells} == offers


def test_printing_has_the_rows(look: Callable[..., Seen]) -> None:
    seen = look(pages.model(12))
    seen.tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert len(seen.rows()) == len(pages.model(12).tensors)
    seen.tab.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert len(seen.rows()) < 60
