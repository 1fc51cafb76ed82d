"""The page as a person has it: what it says, what it shows, what can be pressed."""

import base64
from collections.abc import Callable
from typing import Any

from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

PATIENCE_S = 40
DRAWN = "return [...document.querySelectorAll('#tiles canvas')].map((canvas) => canvas.toDataURL())"
HISTORY = "return [...document.querySelectorAll('#history button')].map((button) => button.innerText.split('\\n')[0])"
BYTES_OF_LINK = """
const [index, done] = arguments;
fetch(document.querySelectorAll('#tiles a')[index].href)
  .then((answer) => answer.arrayBuffer())
  .then((buffer) => done(btoa(String.fromCharCode(...new Uint8Array(buffer)))));
"""
HOLD = """
const [method] = arguments, real = fetch;
window.fetch = (path, options) =>
  options?.method === method ? new Promise((done) => { window.answerHeld = done; }) : real(path, options);
"""
REFUSE = """
answerHeld(new Response("{}", { status: 422 }));
setTimeout(arguments[0], 100);
"""
LOSE = """
const kept = JSON.parse(localStorage.getItem("ddpm.jobs"));
kept[0].id = "lost";
localStorage.setItem("ddpm.jobs", JSON.stringify(kept));
"""


class Page:
    """The page at `url`, in a browser that remembers nothing of earlier tests."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> "Page":
        """Goes there, or loads it again; comes back once the server has said what it serves."""
        self.driver.get(self.url)
        self.until(lambda: self.find("state").text == "ready")
        return self

    def open_anew(self) -> "Page":
        """Goes there as somebody who was never here."""
        self.driver.get(f"{self.url}healthz")  # of the same origin, and nothing there that would write it down again
        self.run("localStorage.clear(); sessionStorage.clear()")
        self.open()
        self.driver.get_log("browser")  # type: ignore[no-untyped-call]  # what was logged before is gone with this
        return self

    def until(self, condition: Callable[[], object]) -> None:
        """Waits for a condition; if it does not come true, the failure tells what the page said."""
        try:
            WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())
        except TimeoutException:
            raise AssertionError(f"the page says {self.words!r} and {self.trouble!r}") from None

    def until_words(self, start: str) -> str:
        """Waits for words that start so; all of them."""
        self.until(lambda: self.words.startswith(start))
        return self.words

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, id: str) -> WebElement:
        """The element with an id."""
        return self.driver.find_element(By.ID, id)

    def field(self, name: str) -> WebElement:
        """A field of the form."""
        return self.driver.find_element(By.NAME, name)

    def choose_label(self, word: str) -> None:
        """Presses the button of a label."""
        labels = self.find("few").find_elements(By.TAG_NAME, "label")
        next(each for each in labels if each.text == word).click()

    @property
    def chosen_label(self) -> str:
        """The label whose button is pressed."""
        chosen = self.find("few").find_elements(By.CSS_SELECTOR, "label:has(:checked)")
        return chosen[0].text if chosen else ""

    def build(self, **fields: int | str) -> None:
        """Fills the form and presses Build; comes back once the job is on the stage, or was refused."""
        before = self.job
        if "steps" in fields:
            for preset in ("full", "custom"):  # the fields begin with what was chosen before
                Select(self.field("preset")).select_by_value(preset)
        for name, value in fields.items():
            self.run("arguments[0].value = arguments[1]", self.field(name), value)
        self.find("build").click()
        self.until(lambda: self.job != before or self.trouble)

    def until_half_done(self) -> None:
        """Waits for the middle of a job."""
        self.until(lambda: self.run("return document.getElementById('progress').value") > 0.3)

    def press(self, *keys: str) -> None:
        """Keys, wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def go_to(self, name: str, *keys: str) -> None:
        """Presses these keys until the focus is on a field of the form."""
        for _ in range(20):
            if self.run("return document.activeElement.name") == name:
                return
            self.press(*keys)

    def scrub(self, place: int) -> list[str]:
        """Moves the scrubber; what is drawn then."""
        before = self.point
        self.run("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", *self._to(place))
        self.until(lambda: self.point != before)
        return self.drawn

    def _to(self, place: int) -> tuple[WebElement, int]:
        return self.find("scrub"), place

    @property
    def words(self) -> str:
        """What goes on."""
        return self.find("words").text

    @property
    def trouble(self) -> str:
        """What was refused."""
        return self.find("trouble").text

    @property
    def point(self) -> str:
        """Where the scrubber is, in words."""
        return self.find("point").text

    @property
    def last_place(self) -> int:
        """The place of the scrubber's right end."""
        return int(self.find("scrub").get_attribute("max") or 0)

    @property
    def tiles(self) -> list[WebElement]:
        """The pairs of pictures."""
        return self.driver.find_elements(By.CSS_SELECTOR, "#tiles figure")

    @property
    def drawn(self) -> list[str]:
        """All pictures as they are drawn now: the noisy and the predicted one of each pair."""
        drawn: list[str] = self.run(DRAWN)
        return drawn

    @property
    def history(self) -> list[str]:
        """The seeds of what was made before, the newest first. Read at once: the page may be drawing it anew."""
        seeds: list[str] = self.run(HISTORY)
        return seeds

    def recall(self, place: int) -> None:
        """Clicks on a place of the history, wherever it is drawn by then."""

        def clicked() -> bool:
            try:
                self.driver.find_elements(By.CSS_SELECTOR, "#history button")[place].click()
            except StaleElementReferenceException:
                return False
            return True

        self.until(clicked)

    @property
    def job(self) -> str:
        """The id of the job on the stage."""
        return str(self.run("return sessionStorage.getItem('ddpm.current')"))

    def lose_newest(self) -> None:
        """From now on the server has never heard of the newest job of the history."""
        self.run(LOSE)

    def hold_requests(self, method: str) -> None:
        """Requests of a method are not sent any more, and not answered until `refuse_held`."""
        self.run(HOLD, method)

    def refuse_held(self) -> None:
        """The request that is held is refused. Comes back when that has been dealt with."""
        self.driver.execute_async_script(REFUSE)

    def pictures(self) -> list[bytes]:
        """The files behind the links that the page offers."""
        return [
            base64.b64decode(self.driver.execute_async_script(BYTES_OF_LINK, index)) for index in range(len(self.tiles))
        ]

    def errors(self) -> list[str]:
        """What the browser has complained of since this was last asked."""
        entries: list[dict[str, Any]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
