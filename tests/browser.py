"""Headless Chromium for tests of pages: no network, and every request it makes is known."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of Debian's chromium; skips the test where selenium, chromium or its driver are missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; pip install selenium")
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    # A proxy that does not answer: whatever asks for a host but this one gets nothing, and is in the log all the same.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1200"):
        options.add_argument(argument)
    options.add_argument("--proxy-server=127.0.0.1:9")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths["chromedriver"]))
    try:
        driver.set_script_timeout(20)
        yield driver
    finally:
        driver.quit()


def requests_of(driver: Any) -> list[str]:
    """Addresses that pages have asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def open_page(driver: Any, page: Path) -> None:
    """Open a file and wait until its video can be drawn."""
    driver.get(page.as_uri())
    wait = """const done = arguments[0], video = document.querySelector("video");
        if (video.readyState >= 2) done(); else video.addEventListener("loadeddata", () => done(), {once: true});"""
    driver.execute_async_script(wait)


def seek(driver: Any, frame: int) -> None:
    """Go to a frame and wait until it is drawn."""
    driver.execute_async_script(
        """const [frame, done] = arguments, video = document.querySelector("video");
        const slider = document.querySelector("#seek");
        video.addEventListener("seeked", () => requestAnimationFrame(() => requestAnimationFrame(done)), {once: true});
        slider.value = frame; slider.dispatchEvent(new Event("input"));""",
        frame,
    )


def pixels(driver: Any, canvas: str) -> np.ndarray:
    """RGBA uint8 [H, W, 4] of the canvas that a selector finds."""
    size, data = driver.execute_script(
        """const canvas = document.querySelector(arguments[0]);
        const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let text = ""; for (let i = 0; i < image.data.length; i += 8192)
          text += String.fromCharCode(...image.data.subarray(i, i + 8192));
        return [[canvas.height, canvas.width], btoa(text)];""",
        canvas,
    )
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(*size, 4)


def painted(driver: Any, canvas: str) -> str:
    """The same for the same picture on the canvas that a selector finds."""
    return str(driver.execute_script("return document.querySelector(arguments[0]).toDataURL()", canvas))


def choose(driver: Any, field: str, value: str) -> None:
    """Choose an option of a field."""
    driver.execute_script(
        "const f = document.getElementById(arguments[0]); f.value = arguments[1]; f.dispatchEvent(new Event('change'))",
        field,
        value,
    )
