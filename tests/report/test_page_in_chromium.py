"""The report's page in a real browser: what a reader does with the mouse, with keys, on paper."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scaleprop.report import Report, tensors_html
from scaleprop.report.records import TensorRecord, Values
from tests.report.pages import full_report, prepared_report, training_report

pytestmark = pytest.mark.browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")
ACCESSIBILITY = (Path(__file__).parent / "accessibility.js").read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
INSTALL = "pip install playwright; apt-get install chromium"
WEIGHT = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed")
    if CHROMIUM is None:
        absent("chromium is not installed")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


def absent(what: str) -> None:
    """Skips on a reader's machine; fails where all is to be tested."""
    reason = f"{what}: {INSTALL}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved pages by name."""
    folder = tmp_path_factory.mktemp("pages")
    reports = {"full": full_report(), "empty": Report(), "training": training_report(),
               "prepared": prepared_report()}
    for name, report in reports.items():
        report.save(folder / f"{name}.html")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors_html, "PLAIN", 10)
        reports["full"].save(folder / "long.html")
    return {name: (folder / f"{name}.html").as_uri() for name in (*reports, "long")}


class Opened:
    """A page, and what went wrong or out while it was open."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.trouble: list[str] = []
        self.requests: list[str] = []
        settings = {"viewport": {"width": 1400, "height": 900}, **context}
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(4000)
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        if context.get("java_script_enabled", True):
            self.page.locator("html[data-ready]").wait_for()

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: object, *_: object) -> None:
        address = self.page.url.split("#")[0]
        self.context.close()
        if kind is None:
            assert self.trouble == []
            assert {request.split("#")[0] for request in self.requests} == {address}


def shown(page: Any) -> list[str]:
    """The operands in the table, as they are seen."""
    return page.eval_on_selector_all(
        "#tensors tbody tr:not([hidden])", "rows => rows.map(row => row.cells[3].innerText)")


def column(page: Any, name: str) -> list[str]:
    """The cells of a column that are seen."""
    names = page.eval_on_selector_all("#tensors th", "cells => cells.map(c => c.innerText)")
    place = [text.split(" ▲")[0].split(" ▼")[0] for text in names].index(name)
    return page.eval_on_selector_all(
        "#tensors tbody tr:not([hidden])",
        f"rows => rows.map(row => row.cells[{place}].innerText)")


def choose(page: Any, name: str, value: str) -> None:
    page.locator(f"#tensor-table select[name={name}]").select_option(value)


def heading(page: Any) -> str:
    return page.locator("#panel h2").inner_text()


def test_numbers_are_sorted_as_numbers_and_the_unmeasured_come_last(browser, files):
    with Opened(browser, files["full"]) as page:
        before = shown(page)
        header = page.get_by_role("columnheader", name="bytes")
        assert header.get_attribute("aria-sort") == "none"
        for expected, reverse in (("ascending", False), ("descending", True)):
            page.get_by_role("button", name="amax", exact=True).click()
            values = [float(text) for text in column(page, "amax") if text and text != "nan"]
            assert len(values) == len(before) - 1
            assert values == sorted(values, reverse=reverse)
            amax = page.get_by_role("columnheader", name="amax")
            assert amax.get_attribute("aria-sort") == expected
            assert column(page, "amax")[-1] == "nan"
        page.get_by_role("button", name="#", exact=True).press("Enter")
        assert shown(page) == before
        page.get_by_role("button", name="SQNR dB").click()
        assert column(page, "SQNR dB")[-9:] == ["exact", *[""] * 8]  # ∞, then unmeasured


def test_words_and_choices_filter_and_are_counted_aloud(browser, files):
    with Opened(browser, files["full"]) as page:
        total = len(shown(page))
        status = page.get_by_role("status")
        assert status.inner_text() == f"{total} of {total} tensors"
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.type") == "search"
        page.keyboard.type("V_PROJ layers.1 /")  # a slash is typed where one types
        assert page.locator("input[type=search]").input_value().endswith(" /")
        page.locator("input[type=search]").fill("V_PROJ layers.1")
        assert shown(page) == [WEIGHT, "value_1_0"] and status.inner_text().startswith("2 of")
        choose(page, "kind", "weight")
        assert shown(page) == [WEIGHT]
        page.locator("input[type=search]").fill("")
        choose(page, "kind", "")
        page.locator("input[name=module]").fill("model.layers.0.mlp")
        assert len(shown(page)) == 6
        page.locator("input[name=module]").fill("")
        choose(page, "format", "high")
        assert len(shown(page)) == 9
        choose(page, "op", "aten.rms_norm.default")
        assert len(shown(page)) == 4
        choose(page, "op", "")
        choose(page, "format", "")
        choose(page, "role", "fprop.w")
        assert len(shown(page)) == 14 and all(name.endswith(".weight") for name in shown(page))
        choose(page, "role", "")
        page.get_by_role("link", name="show aten.rms_norm.default").click()  # of the reasons
        assert len(shown(page)) == 4


def test_a_tensor_opens_by_mouse_and_closes_with_escape(browser, files):
    with Opened(browser, files["full"]) as page:
        assert not page.locator("#panel").is_visible()
        page.locator("#tensors tbody tr").nth(22).locator("td").nth(5).click()
        assert heading(page) == WEIGHT
        said = page.locator("#panel").inner_text()
        for expected in ("mxfp4, decided by quantize-weights", "MatMulIntegerToFloat u8×s8",
                         "amax of each 1×32 block", "model/modeling.py:102 in forward",
                         "model.layers.1.self_attn.v_proj", "fprop.w", "values looked at"):
            assert expected in said
        assert page.locator("#panel svg.histogram .range").count() == 2  # subnormal and normal
        assert page.locator("#panel svg.histogram .bar.under").count() > 5
        assert page.evaluate("document.activeElement.id") == "panel-heading"
        page.keyboard.press("Escape")
        assert not page.locator("#panel").is_visible() and "#" not in page.url
        assert page.evaluate("document.activeElement.closest('tr').rowIndex") == 23


def test_the_table_is_walked_with_keys(browser, files):
    with Opened(browser, files["full"]) as page:
        page.locator("input[type=search]").fill("value_1_0")
        page.get_by_role("region", name="Table of tensors").focus()
        row = "document.activeElement.closest('tr')?.cells[1].querySelector('a')?.textContent"
        for _ in range(20):  # past the headings
            page.keyboard.press("Tab")
            if page.evaluate(row):
                break
        assert page.evaluate(row) == "scaled_mm_7"
        page.keyboard.press("ArrowDown")
        assert page.evaluate(row) == "scaled_mm_8"
        page.keyboard.press("End")
        assert page.evaluate(row) == "scaled_mm_9"
        page.keyboard.press("ArrowDown")  # the last one stays
        page.keyboard.press("Enter")
        assert heading(page) == "value_1_0" and "scaled_mm_9" in page.url
        page.get_by_role("button", name="Previous tensor").press("Enter")
        assert "scaled_mm_8" in page.url
        page.keyboard.press("Escape")
        assert page.evaluate(row) == "scaled_mm_9"


def test_links_lead_from_tensor_to_tensor_and_back(browser, files):
    with Opened(browser, f"{files['full']}#t=scaled_mm_9:{WEIGHT}") as page:
        assert heading(page) == WEIGHT  # an address opens its tensor
        panel = page.locator("#panel")
        panel.get_by_role("link", name="value_1_0").first.click()
        assert heading(page) == "value_1_0"
        panel.get_by_role("link", name="value_0_0 of scaled_mm_1").click()  # has the same scale
        assert heading(page) == "value_0_0" and "scaled_mm_1" in page.url
        page.go_back()
        panel.get_by_role("link", name="linear scaled_mm_7").click()
        assert "scaled_mm_7" in page.url
        panel.get_by_role("link", name="model.layers.1.self_attn.q_proj.weight").click()
        page.go_back()
        page.go_back()
        page.go_back()
        assert heading(page) == WEIGHT
        page.goto(f"{files['full']}#t=nothing")
        assert not panel.is_visible()
        page.goto(f"{files['full']}#t=%E0%A4%A")  # not text
        assert not panel.is_visible()
        page.locator(".worst a").first.click()
        assert heading(page) in shown(page)


def test_boxes_of_the_block_open_their_tensors(browser, files):
    with Opened(browser, files["full"]) as page:
        page.locator("#block .sg-node[data-node=v_proj_weight_data] a").click()
        assert heading(page) == "model.layers.0.self_attn.v_proj.weight"
        page.locator("#block .sg-node[data-node=quantize_4] a").click()
        assert heading(page) == "value_0_4" and "scaled_mm_4" in page.url
        assert page.locator("#block .sg-node[data-node=scaled_mm_4] a").count() == 0  # of the step


def test_odd_names_and_numbers_are_shown_as_they_are(browser, files):
    with Opened(browser, files["full"]) as page:
        page.locator("#tensors tbody tr").last.locator("a").click()
        said = page.locator("#panel").inner_text()
        assert heading(page) == "a name with spaces & 100%"
        assert "</script><b>odd</b>" in said and "excluded by 'a.*'" in said
        assert "∞" in said and "NaN" in said and "exact" in said
        page.reload()
        page.locator("html[data-ready]").wait_for()
        assert heading(page) == "a name with spaces & 100%"


def test_charts_of_depth_are_walked_and_open_tensors(browser, files):
    with Opened(browser, files["full"]) as page:
        plots = page.get_by_role("slider")
        assert plots.count() == 3
        assert page.locator(".depth").nth(0).locator("path.predicted").count() == 1
        assert page.locator(".depth").nth(0).locator("rect.range").count() > 4
        forward = plots.nth(0)
        forward.focus()
        page.keyboard.press("ArrowRight")
        assert forward.get_attribute("aria-valuenow") == "2"
        assert forward.get_attribute("aria-valuetext").startswith("scaled_mm_0, RMS ")
        page.keyboard.press("End")
        assert forward.get_attribute("aria-valuenow") == forward.get_attribute("aria-valuemax")
        page.keyboard.press("Home")
        assert page.locator(".tip").first.is_visible()
        page.keyboard.press("Enter")  # the value is an operand: that is what opens
        assert heading(page) == "value_0_0" and "scaled_mm_0" in page.url
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.getAttribute('role')") == "slider"
        plots.nth(1).click(position={"x": 300, "y": 80})
        assert heading(page).startswith("mm_") and "backward" in page.locator("#panel").inner_text()
        page.keyboard.press("Escape")
        page.get_by_label("Range shown as a band").select_option("e5m2")
        assert page.locator(".depth").nth(0).locator("rect.range").count() == 2
        page.get_by_label("Range shown as a band").select_option("")
        assert page.locator("rect.range").count() == 0
        page.get_by_text("Numbers of this chart").first.click()
        numbers = page.locator(".depth").nth(0).locator("tbody tr")
        numbers.first.wait_for()
        assert numbers.count() == 28 and "value_0_0" in numbers.first.inner_text()


def test_the_page_of_a_training_step(browser, files):
    with Opened(browser, files["training"]) as page:
        assert page.get_by_role("slider").count() == 3
        choose(page, "phase", "backward")
        assert set(column(page, "phase")) == {"backward"}
        page.locator("#tensors tbody tr:not([hidden]) a").first.click()
        assert heading(page).startswith("mm_")
        assert page.locator("#panel .range").count() == 2  # of e4m3, as in the charts
        page.keyboard.press("Escape")
        assert page.evaluate(ACCESSIBILITY) == []


def test_the_page_of_a_prepared_model(browser, files):
    with Opened(browser, files["prepared"]) as page:
        choose(page, "role", "dgrad.dy")
        page.locator("#tensors tbody tr:not([hidden]) a").first.click()
        said = page.locator("#panel").inner_text()
        assert heading(page) == "mm_3" and "stochastic" in said and "16 layer" in said
        assert "Figures" not in said  # there are none
        choose(page, "role", "")
        assert page.evaluate(ACCESSIBILITY) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_anyone_can_read_it(browser, files, scheme):
    with Opened(browser, f"{files['full']}#t=scaled_mm_9:{WEIGHT}", color_scheme=scheme) as page:
        for summary in page.locator("summary").all():
            summary.click()
        assert page.evaluate(ACCESSIBILITY) == []


def test_what_few_can_read_is_found(browser, files):
    with Opened(browser, files["full"]) as page:
        page.evaluate("""() => {
            document.documentElement.style.setProperty("--muted", "#8a8a8a");
            document.querySelector("caption").remove();
            document.querySelector("h2").outerHTML = "<h4>Overview</h4>";
            document.querySelector("#panel button").removeAttribute("aria-label");
            document.querySelector("#panel button").textContent = "";
        }""")
        found = "\n".join(page.evaluate(ACCESSIBILITY))
        for expected in ("contrast 3.", "no caption", "a level is skipped", "no name: <button",
                         "names what is not there"):
            assert expected in found


def test_the_theme_follows_the_system_or_the_choice(browser, files):
    paper = "getComputedStyle(document.body).backgroundColor"
    with Opened(browser, files["full"], color_scheme="dark") as page:
        assert page.evaluate(paper) == "rgb(20, 23, 27)"
        page.get_by_label("Theme").select_option("light")
        assert page.evaluate(paper) == "rgb(255, 255, 255)"
        page.reload()
        assert page.evaluate(paper) == "rgb(255, 255, 255)"
        page.get_by_label("Theme").select_option("")
        assert page.evaluate(paper) == "rgb(20, 23, 27)"


def test_the_focus_is_always_seen(browser, files):
    with Opened(browser, files["full"]) as page:
        seen: set[str] = set()
        for _ in range(80):
            page.keyboard.press("Tab")
            tag, outline = page.evaluate(
                "[document.activeElement.tagName, "
                "getComputedStyle(document.activeElement).outlineStyle]")
            if tag == "BODY":
                break
            assert outline != "none", tag
            seen.add(tag)
        assert {"A", "SELECT", "INPUT", "DIV", "SUMMARY"} <= seen


def test_a_small_screen_does_not_scroll_sideways(browser, files):
    small = {"width": 360, "height": 640}
    with Opened(browser, files["training"], viewport=small) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    with Opened(browser, files["full"], viewport=small) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("(box => box.scrollWidth > box.clientWidth)"
                             "(document.querySelector('.block'))")  # it scrolls in its own box
        page.locator(".worst a").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        box = page.locator("#panel").bounding_box()
        assert (box["x"], box["width"]) == (0, 360)


def test_it_prints_charts_and_table_without_controls(browser, files):
    with Opened(browser, f"{files['full']}#t=scaled_mm_9:{WEIGHT}", color_scheme="dark") as page:
        assert len(page.pdf(format="A4")) > 20_000
        page.emulate_media(media="print")
        for selector in ("#panel", ".controls", "nav", "#theme"):
            assert not page.locator(selector).first.is_visible()
        for selector in (".cards", ".depth svg", ".block svg", "#tensors"):
            assert page.locator(selector).first.is_visible()
        assert page.locator("#tensors tbody tr").last.is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == \
            "rgb(255, 255, 255)"
        assert page.evaluate("document.querySelector('#tensors').closest('.scroll').scrollHeight <="
                             " document.querySelector('#tensors').closest('.scroll').clientHeight")


def test_without_scripts_the_table_is_complete(browser, files):
    with Opened(browser, files["full"], java_script_enabled=False) as page:
        rows = page.locator("#tensors tbody tr")
        assert rows.count() == 37 and rows.last.is_visible()
        assert not page.locator("#theme").is_visible()
        assert not page.get_by_text("Search (press /)").is_visible()
        assert page.get_by_text("The charts need JavaScript").is_visible()
        page.locator(".worst a").first.click()  # leads to the row
        assert page.locator("#tensors tr:target").count() == 1


def test_the_rows_of_a_long_table_are_all_there(browser, files):
    with Opened(browser, files["full"]) as page:
        whole = shown(page)
    with Opened(browser, files["long"]) as page:
        assert shown(page) == whole and page.locator("#shown").inner_text().startswith("37 of 37")
        page.locator("#tensors tbody tr").last.locator("a").click()
        assert page.locator("#panel").is_visible()
    with Opened(browser, files["long"], java_script_enabled=False) as page:
        assert page.locator("#tensors tbody tr").count() == 10
        assert page.get_by_text("The first 10 of 37: scripts show the others").is_visible()


def test_an_empty_report_is_a_page(browser, files):
    with Opened(browser, files["empty"]) as page:
        assert page.get_by_text("There are no tensors in this report.").is_visible()
        assert page.locator("#depth").count() == 0


def test_zeros_strange_formats_and_saturation_in_the_last_power_of_two(browser, tmp_path):
    nothing = Values(count=8, amax=0.0, rms=0.0, mean=0.0, zeros=1.0, scales=(0.0, 0.0))
    given: Any = dict(node="mm", op="aten.linear", role="fprop.x", shape=(8,), decided_by="p")
    Report(recipe="r", records=(
        TensorRecord(operand="x", format="mxfp4", values=nothing, **given),
        TensorRecord(operand="y", format="constructor", values=nothing, **given),
        TensorRecord(operand="z", format="mxfp4", saturated=0.1, values=dataclasses.replace(
            nothing, scaled={1: 7, 2: 1}), **given),
    )).save(tmp_path / "strange.html")
    with Opened(browser, (tmp_path / "strange.html").as_uri()) as page:
        assert page.locator("#charts figure").count() == 1
        page.locator("#range").select_option("e4m3")
        page.get_by_role("link", name="mm").nth(1).click()
        assert "constructor" in page.locator("#panel").inner_text()
        page.get_by_role("link", name="mm").nth(2).click()
        said = page.locator("#panel figcaption").first.inner_text()
        assert "some of the largest saturate" in said and "all are in" not in said
