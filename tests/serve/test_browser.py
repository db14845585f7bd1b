"""The pages in a real browser, Debian's chromium without a head: talk, rate, decide, at both widths and by keyboard.

DUET_SCREENSHOTS names a folder for pictures of what was seen.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("selenium", "uvicorn", "starlette", "httpx"):
    pytest.importorskip(package, reason=f"{package} is not installed")

import uvicorn  # noqa: E402
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="there is no chromium with its driver"),
]
SCRIPT = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
PATIENCE = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--force-color-profile=srgb",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    found.set_script_timeout(PATIENCE)
    yield found
    found.quit()


@pytest.fixture
def served(tmp_path: Path, make_house: Any, people_config: Any) -> Iterator[Callable[..., tuple[Any, str]]]:
    servers = []

    def start(**people: Any) -> tuple[Any, str]:
        house = make_house(tmp_path / "study", people_config(**people), trials=3)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(house.app, lifespan="off", log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return house, f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def look(browser: Any, width: int, height: int, *, dark: bool = False) -> None:
    """Shows the page at this size, which a window without a head may not have."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def picture(browser: Any, name: str) -> None:
    if folder := os.environ.get("DUET_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        time.sleep(0.3)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def until(browser: Any, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, PATIENCE, ignored_exceptions=[Exception]).until(lambda _: condition())


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def fits(browser: Any, width: int) -> bool:
    """Whether nothing is wider than the window, which would shrink it, and every button is large enough for a thumb."""
    return browser.execute_script(
        "const large = [...document.querySelectorAll('button')].every(b => b.getBoundingClientRect().height >= 40);"
        "return large && document.documentElement.scrollWidth <= innerWidth && innerWidth === arguments[0]",
        width,
    )


def complaints(browser: Any) -> list[str]:
    """What the console says is wrong, which includes whatever the content security policy has stopped."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_a_tester_talks_and_rates_by_keyboard(browser: Any, served: Any) -> None:
    house, address = served(instructions="Ask for a short story, and then for its end.\nRate how kind it is.")
    look(browser, 1200, 800)
    browser.get(f"{address}/?token={house.tokens.tester}")
    assert browser.current_url == f"{address}/" and browser.title == "Talk and rate"
    # The message's field has the focus, and Enter sends.
    browser.switch_to.active_element.send_keys("Tell me of a fox.", Keys.ENTER)
    until(browser, lambda: texts(browser, ".theirs p") == ["You said Tell me of a fox."])
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".rating button")) == 5)
    # Stars have names, are reached by the tabulator and pressed by the space bar.
    names = [b.accessible_name for b in browser.find_elements(By.CSS_SELECTOR, ".rating button")]
    assert names == [f"{i} of 5 stars" for i in range(1, 6)]
    for _ in range(5):
        browser.switch_to.active_element.send_keys(Keys.SHIFT + Keys.TAB)
        if browser.switch_to.active_element.accessible_name == "4 of 5 stars":
            break
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    until(browser, lambda: texts(browser, ".rating span") == ["Thank you!"])
    until(browser, lambda: texts(browser, "#count") == ["Thank you! 1 rating from you so far."])
    assert [vote.stars for vote in house.ratings.votes()] == [4]
    picture(browser, "chat-desktop-light")
    browser.find_element(By.ID, "text").send_keys(SCRIPT, Keys.ENTER)
    until(browser, lambda: texts(browser, ".theirs p")[1:] == [f"You said {SCRIPT}"])
    assert browser.title == "Talk and rate" and not browser.find_elements(By.CSS_SELECTOR, ".message img")
    assert complaints(browser) == []
    for width, dark, name in (
        (1200, True, "chat-desktop-dark"),
        (380, False, "chat-phone-light"),
        (380, True, "chat-phone-dark"),
    ):
        look(browser, width, 760, dark=dark)
        assert fits(browser, width), name
        picture(browser, name)
    requested = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert requested and all(name.startswith(address) for name in requested)


def test_thumbs_for_a_whole_conversation_and_a_full_queue(browser: Any, served: Any) -> None:
    house, address = served(stars=2, per="conversation")
    look(browser, 380, 760)
    browser.get(f"{address}/?token={house.tokens.tester}")
    field = browser.find_element(By.ID, "text")
    house.parrot.busy = True
    field.send_keys("Hello", Keys.ENTER)
    until(browser, lambda: "Trying again" in texts(browser, "#notice")[0])
    house.parrot.busy = False
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#whole button")) == 2)
    picture(browser, "thumbs-phone")
    browser.find_element(By.CSS_SELECTOR, "#whole button[aria-label=Good]").click()
    until(browser, lambda: [vote.stars for vote in house.ratings.votes()] == [2])
    # Another opinion takes its place.
    browser.find_element(By.CSS_SELECTOR, "#whole button[aria-label=Bad]").click()
    until(browser, lambda: [vote.stars for vote in house.ratings.votes()] == [1])
    house.parrot.open = ()
    field.send_keys("And now?", Keys.ENTER)
    until(browser, lambda: "come to its end" in texts(browser, "#notice")[0])
    assert field.get_attribute("value") == "And now?"
    house.parrot.open = (2,)
    field.send_keys(Keys.ENTER)
    until(browser, lambda: texts(browser, ".theirs p")[-1] == "You said And now?")
    assert all("503" in message or "410" in message for message in complaints(browser))


def test_the_owner_looks_and_tells(browser: Any, served: Any) -> None:
    from duet_jax.serve.ratings import Vote

    house, address = served()
    votes = []
    for trial, rater, i in itertools.product(range(3), range(5), range(4)):
        stars = max(1, min(5, 2 + trial + (rater + i) % 3 - (rater == 4)))
        seconds = 0.2 if rater == 3 else 20.0
        key, item = f"{trial}{rater}{i}", f"{trial}{i}"
        vote = Vote(key=key, trial=trial, stars=stars, rater=f"rater{rater}", item=item, seconds=seconds, words=30)
        votes.append(vote)
    votes += [Vote(key=f"c{i}", trial=i % 3, stars=5, rater=SCRIPT[:40], item=str(i)) for i in range(12)]
    house.ratings.add(votes)
    look(browser, 1200, 1100)
    browser.get(f"{address}/owner?token={house.tokens.owner}")
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".card")) == 3)
    picture(browser, "owner-desktop-light")
    assert "0 of 4 rounds told · 72 ratings" in texts(browser, "#state")
    assert texts(browser, "#raters .doubt").count("always the same") == 1
    assert "faster than reading" in texts(browser, "#raters .doubt")
    browser.find_element(By.XPATH, "//tr[contains(., 'always the same')]//button").click()
    until(browser, lambda: "left out" in texts(browser, "#raters .doubt"))
    assert "0 of 4 rounds told · 60 ratings" in texts(browser, "#state")
    for width, dark, name in (
        (1200, True, "owner-desktop-dark"),
        (380, False, "owner-phone-light"),
        (380, True, "owner-phone-dark"),
    ):
        look(browser, width, 900, dark=dark)
        assert fits(browser, width), name
        picture(browser, name)
    look(browser, 1200, 900)
    browser.find_element(By.CSS_SELECTOR, ".card.best .main").click()
    browser.switch_to.alert.accept()
    until(browser, lambda: "1 of 4 rounds told · 60 ratings" in texts(browser, "#state"))
    assert house.study.trials()[2].feedback["ratings"] and browser.title != "owned"
    assert complaints(browser) == []
