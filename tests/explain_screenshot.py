"""`python tests/explain_screenshot.py PAGE PICTURE`: a page of `swim explain` in Chromium, 1280 pixels wide."""

import sys
from pathlib import Path

from browser import chromium, open_page, seek


def main(page: str, picture: str, *, frame: int = 2) -> None:
    with chromium() as driver:
        open_page(driver, Path(page).resolve())
        seek(driver, frame)
        height = driver.execute_script("return document.querySelector('.about').getBoundingClientRect().top")
        outer = driver.execute_script("return window.outerHeight - window.innerHeight")
        driver.set_window_size(1280, int(height) + outer)
        seek(driver, frame)
        driver.save_screenshot(picture)


if __name__ == "__main__":
    main(*sys.argv[1:3])
