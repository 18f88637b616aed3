"""Headless Chromium without a network, for the tests of pages."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 60
"""For whatever is awaited; nothing takes so long unless it never comes."""


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser; skips with the reason where there is none."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1400,1000",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(programs["chromedriver"])))
    try:
        driver.set_page_load_timeout(LIMIT_S)
        driver.set_script_timeout(LIMIT_S)
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """What the tests do with a page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        """Load a page and wait until its timelines are drawn."""
        self.complaints()
        self.requests()
        self.driver.get(page.as_uri())
        self.wait("return document.documentElement.classList.contains('drawn')")

    def run(self, script: str, *arguments: object) -> Any:
        """The value of a script; `line` is the first timeline in it."""
        return self.driver.execute_script(
            f"const line = window.kvmtick && kvmtick.timelines[0]; {script}", *arguments
        )

    def wait(self, script: str, *arguments: object) -> None:
        """Until a script gives true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, LIMIT_S, 0.02).until(lambda _: self.run(script, *arguments))

    def settle(self) -> None:
        """Until whatever was to be drawn is drawn."""
        self.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
        )

    def find(self, selector: str) -> Any:
        """The first element."""
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What can be read in the first element, on one line."""
        return " ".join(str(self.find(selector).get_attribute("innerText")).split())

    def mouse(self, start: tuple[float, float], end: tuple[float, float] | None = None) -> None:
        """Click on the first canvas, or drag; places as `Timeline.place` gives them."""
        from selenium.webdriver.common.action_chains import ActionChains

        canvas = self.find("canvas")
        self.run("line.canvas.scrollIntoView({block: 'center'})")
        middle = canvas.size["width"] / 2, canvas.size["height"] / 2
        chain = ActionChains(self.driver, duration=20)
        chain.move_to_element_with_offset(canvas, start[0] - middle[0], start[1] - middle[1])
        chain.click_and_hold()
        if end is not None:
            chain.move_to_element_with_offset(canvas, end[0] - middle[0], end[1] - middle[1])
        chain.release().perform()
        self.settle()

    def keys(self, *keys: str) -> None:
        """Press keys on the first canvas."""
        self.run("line.canvas.focus()")
        self.find("canvas").send_keys(*keys)
        self.settle()

    def complaints(self) -> list[str]:
        """What the console got since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """What was asked for since the last time, but for what the page's own policy stopped."""
        asked: dict[str, str] = {}
        for entry in self.driver.get_log("performance"):
            told = json.loads(entry["message"])["message"]
            about = told["params"]
            if told["method"] == "Network.requestWillBeSent":
                asked[about["requestId"]] = about["request"]["url"]
            elif about.get("blockedReason") == "csp":
                asked.pop(about["requestId"], None)
        return list(asked.values())
