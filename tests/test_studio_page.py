"""The page of ``golden studio`` in a browser: one server and one browser for all tests."""

from __future__ import annotations

import io
import shutil
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest
from families import tiny

from goldenlayers.studio import Workbench, bound, serve

MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}")
FACT = {"subject": "France", "prompt": "The capital of {} is", "new-answer": "Rome"}


@dataclass
class Studio:
    """A served page, and what was seen of its network and its console."""

    bench: Workbench
    context: Any
    url: str
    pages: list[Any] = field(default_factory=list)
    amiss: list[str] = field(default_factory=list)

    def tab(self, width: int = 1280, colours: str = "light") -> Any:
        """A new tab with the page loaded."""
        page = self.context.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=colours)
        self.pages.append(page)
        page.set_default_timeout(150_000)
        page.on("request", lambda one: self._see(one.url))
        page.on("response", lambda one: one.status < 400 or self.amiss.append(one.url))
        page.on("console", lambda one: one.type == "error" and self._read(one.text))
        page.on("pageerror", lambda error: self.amiss.append(str(error)))
        page.goto(self.url)
        page.wait_for_selector("#edits >> text=None yet")
        return page

    def _read(self, text: str) -> None:
        if "BodyStreamBuffer was aborted" not in text:  # said where a page is loaded anew
            self.amiss.append(text)

    def _see(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.amiss.append(url)


def filled(page: Any, **fields: str) -> None:
    for name, text in (FACT | fields).items():
        page.fill(f"#{name} textarea, #{name} input", text)


@pytest.fixture(scope="module")
def studio() -> Iterator[Studio]:
    from playwright.sync_api import Error, sync_playwright

    connected: list[Any] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            connected.append(address[0])
        return real(self, address)

    bench = Workbench(tiny("gpt2"), statistics="none")
    ready = threading.Event()
    told: list[Any] = []

    def on_ready(*one: Any) -> None:
        told.extend(one)
        ready.set()

    with pytest.MonkeyPatch.context() as patch, sync_playwright() as playwright:
        patch.setattr(socket.socket, "connect", connect)
        found = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error:
            pytest.skip("no chromium")
        server = threading.Thread(
            target=serve, args=(bench, bound(port=0)), kwargs={"on_ready": on_ready}, daemon=True
        )
        server.start()
        assert ready.wait(300)
        yield Studio(bench, browser.new_context(), told[0])
        browser.close()
        told[1]()
        server.join(20)
        assert not server.is_alive()
        assert set(connected) <= {"127.0.0.1", "::1"}


@pytest.fixture
def tab(studio: Studio) -> Iterator[Callable[..., Any]]:
    """``tab()`` opens one; at the end nothing went elsewhere and no error was in the console."""
    yield studio.tab
    for page in studio.pages:
        page.close()
    studio.pages.clear()
    assert not studio.amiss


def downloaded(page: Any, kind: str) -> bytes:
    with page.expect_download() as waiting:
        page.click(f".links >> text={kind}")
    return waiting.value.path().read_bytes()


def test_a_fact_is_looked_at_edited_asked_switched_downloaded_and_undone(
    studio: Studio, tab: Callable[..., Any]
) -> None:
    page = tab()
    filled(page)
    page.click("#look")
    page.wait_for_selector(".layers")
    assert page.locator(".layers li").count() == 4
    page.click("#make")
    page.wait_for_selector(".check tbody")
    page.wait_for_selector(".strip.done")
    assert "Nearest neighbours" in page.inner_text(".check")
    assert "1. France → Rome" in page.inner_text("#edits")
    page.click("#ask")  # the edited prompt stands there
    page.wait_for_selector(".sides")
    assert page.locator(".sides .next").count() == 2
    assert page.locator(".sides .next >> nth=1 >> li").count() == 5
    with zipfile.ZipFile(io.BytesIO(downloaded(page, "delta"))) as archive:
        assert "golden-edit-1/delta.safetensors" in archive.namelist()
    assert zipfile.is_zipfile(io.BytesIO(downloaded(page, "PEFT")))
    assert downloaded(page, "GGUF")[:4] == b"GGUF"
    page.uncheck("#on-1 input")
    (session,) = [one for one in studio.bench._sessions.values() if one._made]
    page.wait_for_function("!document.querySelector('#on-1 input').checked")
    for _ in range(600):  # the page says so before the server has heard it
        if not session.find(1).on:
            break
        page.wait_for_timeout(100)
    assert not session.find(1).on
    page.click("#ask")
    page.wait_for_selector("text=No edit is switched on")
    page.reload()  # the tab has its edits still, and as they were
    page.wait_for_selector("#on-1 input")
    assert not page.is_checked("#on-1 input")
    page.click("#undo-1")
    page.wait_for_selector("text=None yet")
    assert not session.edits


def test_a_tab_has_one_stream_of_results_which_stays_open(
    studio: Studio, tab: Callable[..., Any]
) -> None:
    streams: list[str] = []
    studio.context.on("request", lambda one: "/queue/data" in one.url and streams.append(one.url))
    page = tab()
    for place in ("Spain", "Chile", "Japan"):
        page.fill("#question textarea, #question input", f"The capital of {place} is")
        page.click("#ask")
        page.locator("#answers", has_text=place).locator(".sides").wait_for()
    assert len(streams) == 1
    tabs = [tab() for _ in range(4)]  # with the first one a browser's connections but for one
    for one in tabs:
        one.fill("#question textarea, #question input", "The capital of Spain is")
        one.click("#ask")
        one.wait_for_selector(".sides")
    assert len(streams) == 5


def test_a_second_tab_waits_its_turn_and_says_so(studio: Studio, tab: Callable[..., Any]) -> None:
    first, second = tab(), tab()
    with studio.bench.turn(len):
        for page in (first, second):
            page.fill("#question textarea, #question input", "The capital of Spain is")
            page.click("#ask")
            page.wait_for_selector("#answers .strip.busy >> text=Waiting for the model")
        assert "2 before you" in second.inner_text("#answers")
        assert not first.locator(".sides").count()
    for page in (first, second):
        page.wait_for_selector(".sides")


def test_it_fits_a_phone_is_dark_where_the_system_is_and_answers_wrong_input_in_words(
    tab: Callable[..., Any],
) -> None:
    page = tab(width=400, colours="dark")
    boxes = [one.bounding_box() for one in page.locator(".card").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 400 for box in boxes)
    assert len({box["x"] for box in boxes}) == 1  # one column
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    colour = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert sum(map(int, colour.strip("rgba()").split(",")[:3])) < 150
    for button, fields, said in (
        ("#look", {"subject": ""}, "The subject is empty"),
        ("#make", {"prompt": "The capital of Spain is"}, "is not in the prompt"),
        ("#make", {"prompt": "<b>${1+1} {{value}}</b>"}, "prompt '<b>${1+1} {{value}}</b>'"),
    ):
        filled(page, **fields)
        page.click(button)
        place = {"#look": "#scores", "#make": "#state"}[button]
        page.locator(f"{place} .strip.wrong", has_text=said).wait_for()
    assert "Traceback" not in page.inner_text("body")
