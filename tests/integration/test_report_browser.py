"""The report as a browser shows it: headless Chromium, driven over WebDriver with the standard library."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report.page import SECTIONS, render
from pipeline.report.page_compare import render_comparison
from pipeline.stages.report import gather
from pipeline.stages.report_folder import kept_run
from pipeline.stages.report_pairs import pairs
from tests.madefolder import make_run

_CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
_DRIVER = shutil.which("chromedriver") or ""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not (_CHROMIUM and _DRIVER), reason="needs Debian's packages chromium and chromium-driver"),
]
ENTER, DOWN, TAB = "\ue007", "\ue015", "\ue004"
CLASSES = [f"kind {k}" for k in range(60)]
TEACHERS = [f"teacher {k}" for k in range(50)]


class Browser:
    """One window of a headless Chromium."""

    def __init__(self, url: str, profile: Path) -> None:
        self._url = url
        options = {
            "binary": _CHROMIUM,
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={profile}",
            ],
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _ask(self, method: str, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self._url + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def ask(self, method: str, path: str, data: Any = None) -> Any:
        """Send a command of the session."""
        return self._ask(method, f"/session/{self._session}{path}", data)

    def open(self, path: Path, query: str = "") -> None:
        """Open a page and wait until it is loaded."""
        self.ask("POST", "/url", {"url": f"{path.as_uri()}{query}"})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of Chromium's own protocol."""
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def write(self, selector: str, text: str) -> None:
        """Put a text into a field as if it had been typed."""
        script = """const field = document.querySelector(arguments[0]);
            field.value = arguments[1];
            field.dispatchEvent(new Event("input"))"""
        self.run(script, selector, text)

    def picture(self) -> np.ndarray:
        """Return what the window shows, (H, W, 3)."""
        content = base64.b64decode(self.ask("GET", "/screenshot"))
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))

    def complaints(self) -> list[str]:
        """Return all that was written to the console."""
        return [one["message"] for one in self.ask("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        """End the browser."""
        self.ask("DELETE", "")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = make_run(folder / "made", classes=CLASSES, teachers=TEACHERS, per_class=4)
    other = make_run(folder / "other", classes=CLASSES, teachers=TEACHERS, per_class=4, seed=1, name="other")
    runs = [kept_run(made.root), kept_run(other.root)]
    facts = [gather(run) for run in runs]
    (folder / "report.html").write_text(render(facts[0]), encoding="utf-8")
    (folder / "comparison.html").write_text(render_comparison(facts, pairs(runs)), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in ("report", "comparison")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    with subprocess.Popen(
        [_DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        try:
            assert driver.stdout is not None
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            opened = Browser(f"http://127.0.0.1:{port}", folder / "profile")
            try:
                yield opened
            finally:
                opened.close()
        finally:
            driver.terminate()


@pytest.fixture
def shown(browser: Browser, pages: dict[str, Path]) -> Browser:
    browser.complaints()  # those of former tests
    browser.devtools("Emulation.setDeviceMetricsOverride", width=1300, height=1000, deviceScaleFactor=1, mobile=False)
    browser.open(pages["report"])
    return browser


def visible(browser: Browser, table: str) -> list[str]:
    """Return the first words of the rows of a table that can be seen."""
    script = """return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].filter((row) => row.offsetHeight)
        .map((row) => row.querySelector("th").dataset.value ?? row.querySelector("th").textContent)"""
    return browser.run(script, table)


def test_all_is_there_and_nothing_complains(shown: Browser, pages: dict[str, Path]) -> None:
    for name, _ in SECTIONS:
        assert shown.run("return document.getElementById(arguments[0]).offsetHeight", name) > 20, name
    assert shown.run("return document.querySelectorAll('#transport-plots svg').length") == 4
    assert shown.run("return document.querySelectorAll('#confusion-1 rect.cell').length") > 20
    broken = "return [...document.images].filter((one) => !one.complete || !one.naturalWidth).length"
    assert shown.run(broken) == 0 and shown.run("return document.images.length") > 20
    assert (
        shown.run("return performance.getEntriesByType('resource').filter((r) => !r.name.startsWith('data:')).length")
        == 0
    )
    assert shown.complaints() == []
    shown.open(pages["comparison"])
    assert shown.run("return document.querySelectorAll('main section').length") == 7
    assert shown.complaints() == []


def test_tables_show_the_first_rows_those_that_are_searched_for_or_all(shown: Browser) -> None:
    first = visible(shown, "ranking-table")
    assert first == TEACHERS[:12]
    shown.write(".tools[data-for=ranking-table] input", "teacher 3")
    assert visible(shown, "ranking-table") == [name for name in TEACHERS if "teacher 3" in name]
    assert shown.run("return document.querySelector('.tools[data-for=ranking-table] output').textContent") == "11 of 50"
    shown.write(".tools[data-for=ranking-table] input", "nobody of that name")
    assert visible(shown, "ranking-table") == []
    shown.write(".tools[data-for=ranking-table] input", "")
    shown.run("document.querySelector('.tools[data-for=ranking-table] button').click()")
    assert visible(shown, "ranking-table") == TEACHERS


def test_tables_are_sorted_by_the_keyboard(shown: Browser) -> None:
    shown.run("document.querySelectorAll('#ranking-table th button')[5].focus()")  # parameters
    shown.press(ENTER)
    assert visible(shown, "ranking-table")[:3] == TEACHERS[:-4:-1]
    assert shown.run("return document.querySelectorAll('#ranking-table th')[5].ariaSort") == "descending"
    shown.press(ENTER)
    assert visible(shown, "ranking-table")[:3] == TEACHERS[:3]


def test_plots_of_classes_can_be_searched_and_walked_through(shown: Browser) -> None:
    columns = "return [...document.querySelectorAll('#confusion-1 text.name title')].map((one) => one.textContent)"
    assert len(shown.run(columns)) == 40  # twenty rows and columns: those with most errors
    shown.write(".tools[data-for=confusion-1] input", "kind 17")
    names, data = shown.run(columns), shown.run("return document.getElementById('data-confusion-1').textContent")
    near = {CLASSES[k] for cell in json.loads(data)["cells"] for k in cell[:2] if 17 in cell[:2]}
    assert set(names) == near and {"kind 17"} < near  # with those that it is taken for, and that are taken for it
    shown.run("document.querySelector('#confusion-1 svg').focus()")
    shown.press(DOWN)
    told = shown.run("return document.querySelector('#confusion-1 .readout').textContent")
    assert re.fullmatch(r"kind \d+: .* right|.* of kind \d+ taken for kind \d+", told), told
    shown.write("#transport .tools label:nth-of-type(1) input", "teacher 1")
    shown.write("#transport .tools label:nth-of-type(2) input", "kind 59")
    panels = (
        "return [...document.querySelectorAll('#transport-plots figcaption')].map((one) => one.firstChild.textContent)"
    )
    assert shown.run(panels) == ["teacher 1"]
    assert "kind 59" in shown.run("return document.querySelector('#transport-plots').textContent")


@pytest.mark.parametrize("phone", [False, True])
def test_it_can_be_seen_in_light_and_dark(shown: Browser, pages: dict[str, Path], phone: bool) -> None:
    if phone:
        shown.devtools("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    brightness = {}
    for theme in ("light", "dark"):
        shown.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        shown.open(pages["report"])
        picture = shown.picture()
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # not blank
        brightness[theme] = picture.mean()
        assert shown.run("return document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
        texts = (
            "return [...document.querySelectorAll('svg.chart text')].map((one) => one.getBoundingClientRect().height)"
        )
        assert min(shown.run(texts)) > 8  # can be read
    assert brightness["dark"] < 80 < 200 < brightness["light"]
    shown.run("document.querySelector('.themes button[value=light]').click()")  # stronger than the system's
    assert shown.picture().mean() > 200
    shown.run("localStorage.clear()")


def test_the_keyboard_reaches_the_verdict_first(shown: Browser) -> None:
    shown.press(TAB)
    assert shown.run("return document.activeElement.className") == "skip"
    assert shown.run("return document.activeElement.getBoundingClientRect().left") >= 0  # it can be seen now
    shown.press(ENTER)
    assert shown.run("return location.hash") == "#verdict"
