"""A real browser and a real server."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.e2e.page import Page
from tests.server.conftest import Server

ROOT = Path(__file__).parent.parent.parent
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,800"
).split()


class Site(Server):
    """A server whose pictures can be had without a browser, too."""

    def made(self, **request: int) -> list[bytes]:
        """The pictures of a request, by the plainest way there is."""
        answer = self.client.post("/generate", json=request, headers={"accept": "application/json"})
        images: list[dict[str, Any]] = answer.raise_for_status().json()["images"]
        return [self.client.get(image["url"]).content for image in images]


@pytest.fixture(scope="package")
def site() -> Iterator[Site]:
    """One server for all tests, which starts while the browser does; it may have been restarted since the last one."""
    running = Site(ROOT / "weights")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="package")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One browser for all tests."""
    browser, helper = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or helper is None:
        pytest.skip("needs chromium and chromedriver (on Debian: apt-get install chromium-driver)")
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = Chrome(options=options, service=Service(executable_path=helper))
    try:
        yield made
    finally:
        made.quit()


@pytest.fixture
def page(site: Site, driver: Chrome) -> Page:
    """The page, opened by somebody who was never here."""
    site.wait_until_ready()
    return Page(driver, f"http://127.0.0.1:{site.port}/").open_anew()
