"""The report in a real browser, Debian's chromium without a head: on a desk and on a phone, light, dark and on paper.

DUET_SCREENSHOTS names a folder for pictures of what was seen.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="there is no chromium with its driver"),
]
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


def look(browser: Any, path: Path, width: int, *, dark: bool) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": scheme})
    browser.get(path.as_uri())


def picture(browser: Any, name: str) -> None:
    if folder := os.environ.get("DUET_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


# Elements that stand out of the window and are in no box that scrolls; drawings' letters that nobody can read; and
# the least contrast of text to what is behind it, by WCAG 2.1.
SEEN = """
const box = e => e.getBoundingClientRect();
const scrolls = e => e.closest('.wide, .example pre') !== null;
const out = [...document.querySelectorAll('main *')].filter(
  e => box(e).width && (box(e).right > innerWidth + 1 || box(e).left < -1) && !scrolls(e) && !e.closest('svg'));
const letters = [...document.querySelectorAll('svg text')].filter(e => e.textContent.trim())
  .map(e => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b));
const light = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = e => {
  for (let at = e; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
};
const contrast = e => {
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
};
const words = [...document.querySelectorAll('p, td, th, h1, h2, h3, b, span.soft, figcaption, li, summary, pre')]
  .filter(e => e.textContent.trim());
return {
  out: out.map(e => e.outerHTML.slice(0, 120)),
  wide: document.documentElement.scrollWidth > innerWidth || innerWidth !== arguments[0],
  letters: Math.min(...letters, 100),
  contrast: Math.min(...words.map(contrast)),
  paper: light(getComputedStyle(document.body).backgroundColor),
};
"""


@pytest.mark.parametrize("name", ["four", "three", "begun", "selection"])
def test_the_page_fits_and_can_be_read_everywhere(browser: Any, pages: dict[str, Path], name: str) -> None:
    title = None
    for width in WIDTHS:
        for dark in (False, True):
            look(browser, pages[name], width, dark=dark)
            picture(browser, f"{name}-{width}-{'dark' if dark else 'light'}")
            seen = browser.execute_script(SEEN, width)
            assert not seen["out"] and not seen["wide"], (width, seen)
            assert seen["letters"] >= 8, (width, seen)
            assert seen["contrast"] >= 4.5, (width, dark, seen)
            assert seen["paper"] < 0.1 if dark else seen["paper"] > 0.9
            assert title in (None, browser.title)
            title = browser.title
    # Nothing was asked for but the page, and nothing was stopped.
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {each["params"]["request"]["url"] for each in log if each["method"] == "Network.requestWillBeSent"}
    assert asked <= {pages[name].as_uri(), "data:,"}
    assert not [entry["message"] for entry in browser.get_log("browser")]


def test_what_is_too_wide_scrolls_by_keyboard_and_the_first_column_stays(browser: Any, pages: dict[str, Path]) -> None:
    look(browser, pages["four"], 390, dark=False)
    found = browser.execute_script(
        "const wide = document.querySelector('[aria-label=\"all rounds\"]'); wide.focus(); wide.scrollLeft = 300;"
        "const cell = wide.querySelector('tbody td');"
        "return [document.activeElement === wide, wide.scrollLeft, wide.scrollWidth > wide.clientWidth,"
        "cell.getBoundingClientRect().left - wide.getBoundingClientRect().left]"
    )
    assert found == [True, 300, True, 0]


def test_on_paper_it_is_dark_on_white_and_nothing_is_cut_off(browser: Any, pages: dict[str, Path]) -> None:
    look(browser, pages["three"], 1280, dark=True)
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": scheme})
    seen = browser.execute_script(SEEN, 1280)
    assert seen["paper"] > 0.9 and seen["contrast"] >= 4.5
    (overflow,) = browser.execute_script(
        "return [[...document.querySelectorAll('.wide')].map(e => getComputedStyle(e).overflowX)]"
    )
    assert set(overflow) == {"visible"}


def test_the_mixture_is_copied_by_one_click(browser: Any, pages: dict[str, Path]) -> None:
    look(browser, pages["four"], 390, dark=False)
    pre = browser.find_element("css selector", "pre.copy")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", pre)
    pre.click()
    chosen = browser.execute_script("return getSelection().toString()")
    assert chosen.startswith('mixture: {"') and chosen.endswith("}") and chosen == pre.text
