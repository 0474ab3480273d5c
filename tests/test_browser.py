"""The page in a real Chromium: what it draws, and what keys, filters and the viewer do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anysite.report import write_report
from browser import Browser, Page, browsing, find_chromium
from volumes_predicted import write_predictions

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
CURRENT = "document.activeElement.dataset.case"
DRAWN = "document.getElementById('viewer').dataset.drawn"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report([write_predictions(folder / "balls")], folder / "report.html", volumes=4)


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    page = browser.new_page()
    page.open(report)
    yield page
    assert page.complaints == []


def choose(page: Page, form: str, name: str, value: str) -> None:
    """Set a field as a user does."""
    field = f"document.querySelector({json.dumps(form)}).elements[{json.dumps(name)}]"
    page.ask(
        f"{field}.value = {json.dumps(value)}, {field}.dispatchEvent(new Event('input', {{bubbles: true}}))"
    )


def rows_of(page: Page) -> list[str]:
    return page.ask(
        "[...document.querySelectorAll('.browser tbody tr')].filter(r => r.checkVisibility()).map(r => r.dataset.case)"
    )


def stage_of(page: Page) -> np.ndarray:
    """Return the canvas of the viewer, `(H, W, 3)`."""
    page.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    left, top, width, height = page.ask(
        "(({x, y, width, height}) => [x, y, width, height].map(Math.round))"
        "(document.getElementById('viewer-canvas').getBoundingClientRect())"
    )
    return page.photograph()[top + 4 : top + height - 4, left + 4 : left + width - 4]


def is_near(pixels: np.ndarray, colour: tuple[int, int, int], tolerance: int = 40) -> np.ndarray:
    return np.asarray((abs(pixels.astype(int) - colour) < tolerance).all(axis=-1))


def test_keys_step_through_the_cases_and_the_focus_is_seen(page: Page) -> None:
    page.press("j")
    assert page.ask(CURRENT) == "case005"
    page.press("j", "j")
    assert page.ask(CURRENT) == "case003"
    assert page.ask("document.querySelector('.one-case.current h3').textContent") == "case003"
    assert (
        page.ask("[...document.querySelectorAll('.one-case')].filter(c => c.checkVisibility()).length") == 1
    )
    page.press("k")
    assert page.ask(CURRENT) == "case004"
    page.press("ArrowDown", "ArrowDown", "ArrowUp")
    assert page.ask(CURRENT) == "case003"
    assert page.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(*"jjjjjj")  # the last stays the last
    assert page.ask(CURRENT) == "case000"
    top, bottom = page.ask(
        "(({top, bottom}) => [top, bottom])(document.activeElement.getBoundingClientRect())"
    )
    assert 0 <= top < bottom <= 900
    page.press("?")
    assert page.ask("document.getElementById('help').open")
    page.press("j", "Escape")
    page.wait("!document.getElementById('help').open")
    assert page.ask(CURRENT) == "case000"


def test_filters_leave_what_was_asked_for(page: Page) -> None:
    assert len(rows_of(page)) == 6
    choose(page, ".cases .filters", "site", "B")
    assert rows_of(page) == ["case005", "case003", "case001"]
    choose(page, ".cases .filters", "verdict", "reject")
    assert rows_of(page) == ["case005"]
    assert page.ask("document.querySelector('.cases output').textContent") == "1 of 6 cases"
    choose(page, ".cases .filters", "site", "")
    assert rows_of(page) == ["case005", "case002"]
    choose(page, ".cases .filters", "verdict", "")
    page.press("/", *"E00")
    assert rows_of(page) == [f"case{number:03d}" for number in (5, 4, 3, 2, 1, 0)]
    page.press("3")
    assert rows_of(page) == ["case003"]
    assert page.ask("document.querySelector('.one-case.current h3').textContent") == "case003"
    page.press("z")
    assert rows_of(page) == []
    assert page.ask("document.querySelector('.one-case.current')") is None


def test_a_click_on_a_heading_sorts_and_the_cases_beside_stay_the_right_ones(page: Page) -> None:
    page.ask("document.querySelector('.browser thead button').click()")
    assert rows_of(page) == [f"case{number:03d}" for number in range(6)]
    page.ask("document.querySelectorAll('.browser tbody tr')[1].click()")
    assert page.ask("document.querySelector('.one-case.current h3').textContent") == "case001"


def test_the_contents_lead_to_sections_and_mark_the_one_that_is_read(page: Page) -> None:
    marked = "document.querySelector('.contents a[aria-current]').textContent.trim()"
    assert page.ask(marked).startswith("Overview")
    page.press("Tab", "Tab", "Tab", "Enter")  # skip link, overview, results by site
    page.wait(f"{marked} === 'Results by site'")
    assert page.ask("document.getElementById('sites').getBoundingClientRect().top") < 100


def test_the_viewer_draws_image_and_masks(page: Page) -> None:
    assert page.ask("window.niivue") is None  # nothing is unpacked before it is asked for
    page.press("j", "v")
    page.wait(f"{DRAWN} === 'case005 prediction all 0.7'")
    choose(page, "#viewer-controls", "opacity", "1")
    page.wait(f"{DRAWN} === 'case005 prediction all 1'")
    stage = stage_of(page)
    assert stage.std() > 20
    shell, core = is_near(stage, (86, 180, 233), 60).sum(), is_near(stage, (230, 159, 0), 60).sum()
    assert shell > core > 500
    choose(page, "#viewer-controls", "layer", "differences")
    page.wait(f"{DRAWN} === 'case005 differences all 1'")
    assert is_near(stage_of(page), (213, 94, 0), 60).sum() > 500  # what was missed
    choose(page, "#viewer-controls", "layer", "none")
    page.wait(f"{DRAWN} === 'case005 none all 1'")
    grey = stage_of(page).astype(int)
    assert (grey.max(axis=-1) - grey.min(axis=-1) < 12).mean() > 0.99
    assert page.ask("document.getElementById('viewer-legend').textContent") == ""
    choose(page, "#viewer-controls", "layer", "prediction")
    choose(page, "#viewer-controls", "view", "structures")
    page.wait(f"{DRAWN} === 'case005 prediction structures 1'")
    assert is_near(stage_of(page), (86, 180, 233), 90).mean() > 0.02
    page.press("j")
    page.wait(f"{DRAWN} === 'case004 prediction structures 1'")
    assert page.ask("document.getElementById('viewer-title').textContent") == "case004"
    page.press("Escape")
    page.wait(f"{CURRENT} === 'case004'")


def test_cases_without_a_volume_have_no_viewer(page: Page) -> None:
    page.press("j")
    choose(page, ".cases .filters", "text", "case003")
    page.ask("document.activeElement.blur()")
    without = page.ask(
        "[...document.querySelectorAll('.one-case')].filter(c => !c.querySelector('.open-viewer'))"
        ".map(c => c.dataset.case)"
    )
    assert len(without) == 2
    choose(page, ".cases .filters", "text", without[0])
    page.press("v")
    assert not page.ask("document.getElementById('viewer').open")


def test_without_webgl_the_page_says_so_and_the_slices_stay(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    page.send(
        "Page.addScriptToEvaluateOnNewDocument",
        source="HTMLCanvasElement.prototype.getContext = () => null;",
    )
    page.open(report)
    page.press("j", "v")
    page.wait("!document.querySelector('#viewer .message').hidden")
    assert "no WebGL 2" in page.ask("document.querySelector('#viewer .message').textContent")
    assert not page.ask("document.getElementById('viewer-canvas').checkVisibility()")
    page.press("Escape")
    assert page.ask("document.querySelector('.one-case.current svg.case').checkVisibility()")
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_scheme_and_fits_narrow_windows(browser: Browser, report: Path, scheme: str) -> None:
    page = browser.new_page()
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for width in (1400, 900, 390):
        page.open(report, width=width)
        assert (page.photograph().mean() > 128) == (scheme == "light")
        assert page.ask("document.documentElement.scrollWidth") <= width
    assert page.complaints == []


def test_print_shows_every_case_and_no_controls(page: Page) -> None:
    choose(page, ".cases .filters", "text", "case003")
    page.send("Emulation.setEmulatedMedia", media="print")
    assert len(rows_of(page)) == 6
    visible = "[...document.querySelectorAll({})].filter(e => e.checkVisibility()).length"
    assert page.ask(visible.format("'.one-case'")) == 6
    for hidden in (".contents", ".filters", ".open-viewer", ".keys", "input", "select"):
        assert page.ask(visible.format(json.dumps(hidden))) == 0
