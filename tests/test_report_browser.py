"""The page of ``golden report`` in a browser: quiet, drawn, and usable by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import every

from goldenlayers.report import page

sync_api = pytest.importorskip("playwright.sync_api", reason="there is no Playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    page.write(every(folder / "runs"), folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, NAMES)), None)
        try:
            found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"there is no browser ({str(error).splitlines()[0][:80]})")
        yield found
        found.close()


class Tab:
    """The page, drawn, with all that it asked for and complained of."""

    def __init__(self, browser: Any, place: Path, **how: Any) -> None:
        self.context = browser.new_context(**how)
        self.tab = self.context.new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        self.tab.route("**/*", self._ask)
        self.tab.on("console", lambda m: self.said.append(m.text))
        self.tab.on("pageerror", lambda e: self.said.append(str(e)))
        self.tab.goto(place.as_uri())
        self.tab.wait_for_selector("html[data-drawn]", state="attached", timeout=120_000)

    def _ask(self, route: Any) -> None:
        self.asked.append(route.request.url)
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            route.abort()


def test_it_is_drawn_in_peace(browser: Any, place: Path) -> None:
    seen = Tab(browser, place, viewport={"width": 1280, "height": 900}, color_scheme="light")
    tab = seen.tab
    assert seen.asked == [place.as_uri()] and not seen.said
    assert tab.evaluate("window.evil") is None
    charts = tab.locator(".chart")
    count = charts.count()
    assert count >= 14
    assert tab.locator(".chart .main-svg").count() >= count
    assert tab.evaluate("[...document.querySelectorAll('.chart')].every(c => c.ariaLabel)")

    # Hover tells a cell's fact, layer and score.
    heat = tab.locator("figure", has_text="Layer × fact").first
    cells = heat.locator(".chart .nsewdrag").first
    cells.scroll_into_view_if_needed()
    cells.hover()
    told = heat.locator(".hoverlayer .hovertext").first
    told.wait_for(timeout=20_000)
    assert "layer" in (told.text_content() or "")

    # Another metric by keyboard alone.
    picker = tab.locator("select").first
    before = tab.evaluate("document.querySelector('select').closest('figure').innerHTML.length")
    picker.focus()
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.querySelector('select').selectedIndex") == 1
    after = tab.evaluate("document.querySelector('select').closest('figure').innerHTML.length")
    assert after != before

    # The table behind a chart, by keyboard.
    assert not tab.locator("figure table").first.is_visible()
    tab.locator("figure summary").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("figure table").first.is_visible()
    tab.keyboard.press("Tab")  # into the table, so that it can be scrolled
    assert tab.evaluate("document.activeElement.className") == "wide"
    assert not seen.said
    seen.context.close()


def test_it_fits_a_phone_in_the_dark(browser: Any, place: Path) -> None:
    seen = Tab(browser, place, viewport={"width": 400, "height": 800}, color_scheme="dark")
    tab = seen.tab
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    colour = "getComputedStyle(document.body).backgroundColor"
    axis = "getComputedStyle(document.querySelector('.xtick text')).fill"
    dark, light = tab.evaluate(colour), tab.evaluate(axis)
    assert (dark, light) == ("rgb(22, 22, 24)", "rgb(236, 236, 236)")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")  # paper is white
    assert tab.evaluate(colour) == "rgb(255, 255, 255)"
    assert tab.evaluate(axis) == "rgb(27, 27, 27)"
    assert not seen.said
    seen.context.close()
