"""A real browser and real servers: two of ours, and one of another site."""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.e2e.page import Page
from tests.server.conftest import Server

KEY, PREFIX = "open sesame", "/ddpm"
ROOT = Path(__file__).parent.parent.parent
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,800"
).split()


class Site(Server):
    """A server whose pictures can be had without a browser, too."""

    def made(self, **request: int | str) -> list[bytes]:
        """The pictures of a request, by the plainest way there is."""
        answer = self.client.post("/generate", json=request, headers={"accept": "application/json"})
        images: list[dict[str, Any]] = answer.raise_for_status().json()["images"]
        return [self.client.get(image["url"]).content for image in images]


class Elsewhere(ThreadingHTTPServer):
    """Another site, which serves a folder. It has two origins: pages of `allowed` may use our servers, pages of
    `refused` may not."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
        self.folder, self.allowed = folder, f"http://localhost:{self.server_port}"
        self.refused = f"http://127.0.0.1:{self.server_port}"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing: it would stand between the tests."""


@pytest.fixture(scope="package")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """Another site."""
    with Elsewhere(tmp_path_factory.mktemp("elsewhere")) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture(scope="package")
def site(elsewhere: Elsewhere) -> Iterator[Site]:
    """One server for all tests, which starts while the browser does; it may have been restarted since the last one."""
    running = Site(
        ROOT / "weights" / "digits", DDPM_ALLOWED_ORIGINS=elsewhere.allowed, DDPM_FRAME_ANCESTORS=elsewhere.allowed
    )
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="package")
def locked(elsewhere: Elsewhere, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server that needs KEY, and is offered under PREFIX."""
    keys = tmp_path_factory.mktemp("locked") / "keys"
    keys.write_text(f"alice:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    ours = {"DDPM_API_KEYS": str(keys), "DDPM_PATH_PREFIX": PREFIX}
    theirs = dict.fromkeys(("DDPM_ALLOWED_ORIGINS", "DDPM_FRAME_ANCESTORS"), elsewhere.allowed)
    running = Site(ROOT / "weights" / "digits", **ours, **theirs)
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
