"""Makes the pictures of docs/linux-boot.md again: parts of the report's page, in Chromium.

    python docs/recordings/pictures.py

Needs selenium, chromium and chromedriver.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

FOLDER = Path(__file__).parent
RECORDING = FOLDER / "linux-boot.ktrace"
TABLE_WIDTH, TIMELINE_WIDTH, HEIGHT = 1180, 980, 1400
PIT, LAPIC = 0, 1

TIMELINES = {
    "linux-boot-pit": (PIT, 0.185, 0.325),
    "linux-boot-idle": (LAPIC, 0.0, 3.43),
}
"""Which timer, from which second to which: the time from tick to tick."""

SHOW = """
const [number, from, to] = arguments;
const line = kvmtick.timelines[number];
const select = line.root.querySelector("select");
select.value = "interval";
select.dispatchEvent(new Event("change"));
line.zoom(from * 1e9, to * 1e9);
"""
DRAWN = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"


def main() -> None:
    """Write them all."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "linux-boot.html"
        words = ["report", str(RECORDING), "--html", str(page)]
        subprocess.run(
            [sys.executable, "-m", "kvmtick", *words], check=True, stdout=subprocess.DEVNULL
        )
        driver = browser()
        try:
            driver.set_window_size(TABLE_WIDTH, HEIGHT)
            driver.get(page.as_uri())
            save(driver, "#vm0 > section.card", "linux-boot-phases")
            driver.set_window_size(TIMELINE_WIDTH, HEIGHT)
            for name, (number, *span) in TIMELINES.items():
                driver.execute_script(SHOW, number, *span)
                driver.execute_async_script(DRAWN)
                save(driver, f"#vm0-source{number} .main > section.card", name)
        finally:
            driver.quit()


def browser() -> Any:
    """Without a window."""
    options = ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    return Chrome(options=options, service=Service(shutil.which("chromedriver")))


def save(driver: Any, selector: str, name: str) -> None:
    """A picture of one element."""
    path = FOLDER.parent / f"{name}.png"
    element = driver.find_element("css selector", selector)
    driver.execute_script("arguments[0].scrollIntoView()", element)
    path.write_bytes(element.screenshot_as_png)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
