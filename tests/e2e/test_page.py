"""The pages in a real browser that has nothing but this server, beside what `POST /generate` gives."""

import os
import signal
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from server.settings import Settings
from server.web.app import create_app
from tests.e2e.conftest import KEY, PREFIX, ROOT, Site
from tests.e2e.page import Page
from tests.model.convert.directories import write_model
from tests.server.fakes import FakeBackend
from tests.server.web.lines import threaded

OTHER_MODELS = """
const real = fetch;
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (path !== "models") return answer;
  const { models: [digits] } = await answer.json();
  const first = { ...digits, name: "first" }, second = { ...digits, plans: [{ name: "lost" }] };
  return Response.json({ models: [first, second], default: "digits", max_n: 4 });
};
"""
SCREENSHOTS = ROOT / "build" / "screenshots"


def test_a_picture_denoises_before_your_eyes_and_can_be_scrubbed_and_saved(page: Page, site: Site) -> None:
    page.build(seed=7, steps=100, n=2)
    page.until_half_done()
    early = page.drawn
    page.until(lambda: page.drawn != early)
    page.until_words("Built in")
    page.until(lambda: page.point.startswith("after 100 of 100"))

    finished, middle, noise = page.drawn, page.scrub(page.last_place // 2), page.scrub(0)
    assert len({tuple(drawn) for drawn in (finished, middle, noise)}) == 3
    assert page.point.startswith("after 0 of 100 steps")
    assert page.scrub(page.last_place) == finished
    assert page.pictures() == site.made(label="random", seed=7, steps=100, n=2)
    assert page.errors() == []


def test_a_cancelled_job_says_so_and_keeps_the_frames_that_were_seen(page: Page, site: Site) -> None:
    page.build(seed=1, steps=1000, n=2)
    page.until(lambda: page.last_place > 2)
    page.find("cancel").click()

    assert page.until_words("Cancelled") == "Cancelled"
    assert site.client.get(f"/jobs/{page.job}").json()["status"] == "cancelled"
    page.until(lambda: page.point.startswith("after"))
    assert page.drawn != page.scrub(0)


def test_history_survives_a_reload_and_shows_a_job_with_its_frames(page: Page) -> None:
    page.build(seed=3, steps=20, n=1)
    page.until_words("Built in")
    page.build(seed=4, steps=20, n=1)
    page.until_words("Built in")
    page.until(lambda: len(page.history) == 2)
    page.open()

    assert page.history == ["4", "3"]
    page.recall(1)
    page.until(lambda: page.field("seed").get_attribute("value") == "3")
    page.until_words("Built in")
    page.until(lambda: page.last_place == 20)
    finished = page.drawn
    assert page.scrub(0) != finished
    assert (
        page.run("return document.activeElement.ariaCurrent") == "true"
    )  # who has come there with keys is there still

    page.find("forget").click()
    assert page.open().history == []


@pytest.mark.long
def test_a_reload_in_the_middle_of_a_job_goes_on_watching_it(page: Page, site: Site) -> None:
    page.build(seed=5, steps=300, n=1)
    page.until_half_done()
    job = page.job
    page.open()

    page.until_words("Built in")
    assert page.job == job
    assert page.pictures() == site.made(label="random", seed=5, steps=300)


@pytest.mark.long
def test_a_server_that_is_killed_and_started_again_ends_with_the_same_picture(page: Page, site: Site) -> None:
    page.build(seed=8, steps=400, n=1)
    page.until_half_done()
    job = page.job
    site.kill()
    page.until_words("The connection was lost; trying again")
    page.until(lambda: "does not answer" in page.find("state").text)
    site.start()
    page.until_words("The server was restarted; the same picture is being made again")

    assert page.until_words("Built in").endswith("although the server was restarted on the way")
    assert page.job == job
    assert page.pictures() == site.made(label="random", seed=8, steps=400)
    assert page.history == ["8"]


def test_history_that_the_server_has_lost_is_made_again(page: Page, site: Site) -> None:
    page.build(seed=9, steps=20, n=1)
    page.until_words("Built in")
    before = page.pictures()
    page.lose_newest()
    page.open()

    page.recall(0)
    page.until_words("Built in")
    assert page.pictures() == before == site.made(label="random", seed=9, steps=20)


@pytest.mark.parametrize("method", ["DELETE", "POST"])
def test_a_refusal_that_comes_late_is_not_told_of_another_job(page: Page, site: Site, method: str) -> None:
    page.build(seed=12, steps=20, n=1)
    page.until_words("Built in")
    page.build(seed=13, steps=1000 if method == "DELETE" else 20, n=1)
    if method == "DELETE":
        other = page.job
        page.hold_requests(method)
        page.find("cancel").click()
    else:
        page.until_words("Built in")
        page.until(lambda: len(page.driver.find_elements(By.CSS_SELECTOR, "#history img")) == 2)  # all is remembered
        page.lose_newest()
        page.open()
        page.hold_requests(method)
        page.recall(0)
        page.until_words("The server no longer has this job")
    page.recall(1)
    built = page.until_words("Built in")
    page.refuse_held()

    assert (page.words, page.find("build").get_attribute("aria-disabled")) == (built, "false")
    if method == "DELETE":
        site.client.delete(f"/jobs/{other}")


def test_the_form_begins_with_the_default_model_and_no_more_pictures_than_may_be(page: Page, driver: Chrome) -> None:
    assert (page.field("model").get_attribute("value"), page.field("n").get_attribute("max")) == ("digits", "64")
    script = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": OTHER_MODELS})
    try:
        page.open()
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)

    assert page.field("model").get_attribute("value") == "digits"
    assert [page.field("n").get_attribute(name) for name in ("value", "max")] == ["4", "4"]
    assert page.find("api").is_displayed()
    Select(page.field("preset")).select_by_value("custom")
    Select(page.field("plan")).select_by_value("lost")
    assert not page.field("sampler").is_displayed()
    page.build()  # with the plan alone, or the server would name the fields beside it
    assert page.find("wrong-plan").text.startswith("plan must be one of ")


def test_models_that_are_refused_are_shown_with_their_reasons_and_cannot_be_chosen(
    driver: Chrome, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "weights" / "good").parent
    write_model(folder / "labels", {"num_class_embeds": 0})
    (folder / "half-copied").mkdir()
    app = create_app(Settings(weights=str(folder), data_dir=tmp_path / "data"), FakeBackend())
    with threaded(app) as made:
        page = Page(driver, f"{made.url}/").open_anew()
        models = [(each.text, each.is_enabled()) for each in Select(page.field("model")).options]
        told = page.find("refused").text.splitlines()
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(SCREENSHOTS / "refused.png"))

    assert models == [("good", True), ("half-copied", False), ("labels", False)]
    assert told[0] == "half-copied is refused: config.json is missing"
    assert told[1] == "labels is refused: config.json: num_class_embeds must be an integer in 1..65536, got 0"


@pytest.mark.long
def test_an_engine_that_is_killed_is_told_of_and_the_picture_is_the_same(page: Page, site: Site) -> None:
    page.build(seed=10, steps=400, n=1)
    page.until_half_done()
    os.kill(site.engine_pid, signal.SIGKILL)
    page.until_words("The engine failed and is being replaced")

    assert page.until_words("Built in").endswith("although the engine was replaced on the way")
    assert page.pictures() == site.made(label="random", seed=10, steps=400)


def test_everything_can_be_done_with_keys_alone(page: Page) -> None:
    page.go_to("seed", Keys.TAB)
    page.press(Keys.CONTROL, "a", Keys.NULL, "11", Keys.ENTER)
    page.until_words("Built in")
    page.until(lambda: page.point.startswith("after 10 of 10"))

    finished = page.drawn
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.until(lambda: page.point.startswith("after 8 of 10"))
    assert page.drawn != finished
    page.press(Keys.ARROW_RIGHT)
    page.until(lambda: page.point.startswith("after 9 of 10"))
    page.press(Keys.ARROW_RIGHT, " ")
    page.until(lambda: page.find("play").text == "Pause")
    page.until(lambda: page.find("play").text == "Play")
    assert page.point.startswith("after 10 of 10")

    page.press("r")
    assert page.field("seed").get_attribute("value") != "11"
    page.go_to("preset", Keys.SHIFT, Keys.TAB, Keys.NULL)
    page.press("fu", Keys.TAB, Keys.ENTER)  # the full preset lasts long enough to be cancelled
    page.until(lambda: page.find("cancel").is_enabled())
    page.press(Keys.ESCAPE)
    page.until_words("Cancelled")


def test_fields_beside_the_preset_are_for_custom_requests(page: Page, site: Site) -> None:
    fields = ("steps", "sampler", "variance", "spacing", "clip", "order", "plan")
    preset = Select(page.field("preset"))
    assert page.field("preset").get_attribute("value") == "fast"
    assert [name for name in fields if page.field(name).is_displayed()] == []
    page.build(seed=207, n=1)
    page.until_words("Built in")
    assert page.pictures() == site.made(label="random", seed=207, preset="fast")

    preset.select_by_value("full")
    preset.select_by_value("custom")
    assert [name for name in fields if page.field(name).is_displayed()] == [*fields[:5], "plan"]
    assert [page.field(name).get_attribute("value") for name in ("steps", "sampler")] == ["100", "ddpm"]
    page.recall(0)
    page.until_words("Built in")
    assert page.field("preset").get_attribute("value") == "fast"


def test_few_labels_have_buttons_and_many_a_field(driver: Chrome, tmp_path: Path) -> None:
    names = {str(label): name for label, name in enumerate(["cat", "dog", "hare"])}
    write_model(tmp_path / "weights" / "few", labels=4, index={"id2label": names, "null_label": 3, "guidance": 2.25})
    write_model(tmp_path / "weights" / "many", labels=50)
    write_model(tmp_path / "weights" / "plain")
    backend = FakeBackend()
    backend.models = dict.fromkeys(("few", "many", "plain"), backend.models["tiny"])
    app = create_app(Settings(weights=str(tmp_path / "weights"), data_dir=tmp_path / "data"), backend)

    def asked() -> tuple[tuple[int, ...], float | None]:
        """What the last job was asked for."""
        page.until_words("Built in")
        spec = backend.specs[-1]
        return tuple(spec.labels.values()), spec.sampling.guidance

    with threaded(app) as made:
        page = Page(driver, f"{made.url}/").open_anew()
        words = [each.text for each in page.find("few").find_elements(By.TAG_NAME, "label")]
        assert (words, page.find("many").is_displayed()) == (["random", "no label", "cat", "dog", "hare"], False)
        assert page.find("guidance-says").text == "2.25, at twice the work"
        driver.save_screenshot(str(SCREENSHOTS / "labels.png"))

        page.choose_label("dog")
        page.build(seed=3, n=2)
        assert asked() == ((1, 1), 2.25)
        page.choose_label("random")
        page.build(seed=8, n=4)
        several, _ = asked()
        assert len({*several}) > 1
        page.recall(0)
        page.until(lambda: page.chosen_label == "" and page.find("mixed").is_displayed())
        page.build(seed=9)
        assert asked() == (several, 2.25)
        page.choose_label("no label")
        assert not page.find("guidance").is_displayed()
        page.build(seed=4, n=1)
        assert asked() == ((), None)
        page.recall(3)  # the dogs
        page.until(lambda: page.chosen_label == "dog")

        Select(page.field("model")).select_by_value("many")
        assert (page.find("few").is_displayed(), page.find("many").is_displayed()) == (False, True)
        page.build(seed=5, n=1, label="49")
        assert asked() == ((49,), 1.0)
        page.build(seed=6, n=1, label="50")
        assert page.find("wrong-label").text == "label must be random or a label 0..49, got '50'"
        Select(page.field("model")).select_by_value("plain")
        assert not page.find("labels").is_displayed()
        page.build(seed=7, n=1)
        assert asked() == ((), None)


def test_clamping_follows_the_sampler_until_it_is_chosen(page: Page) -> None:
    Select(page.field("preset")).select_by_value("full")
    Select(page.field("preset")).select_by_value("custom")
    sampler, seen = Select(page.field("sampler")), list[bool]()
    for name in ("ddpm", "unipc", "ddim"):
        seen.append(page.field("clip").is_selected())
        sampler.select_by_value(name)

    assert [*seen, page.field("clip").is_selected()] == [True, True, False, True]
    page.field("clip").click()
    Select(page.field("spacing")).select_by_value("leading")
    assert not page.field("clip").is_selected()


def test_a_refusal_is_told_in_words_at_its_field(page: Page) -> None:
    page.run("arguments[0].removeAttribute('max')", page.field("steps"))
    page.build(steps=100_000)
    page.until(lambda: page.field("steps").get_attribute("aria-invalid") == "true")

    described_by = page.field("steps").get_attribute("aria-describedby")
    assert page.find(str(described_by)).text == "steps must lie in 1..1000, got 100000"
    assert page.trouble == "The server refused what is marked above."
    assert page.driver.switch_to.active_element == page.field("steps")
    page.build(steps=10)
    page.until_words("Built in")
    assert page.field("steps").get_attribute("aria-invalid") is None


def test_the_load_is_shown(page: Page) -> None:
    page.until(lambda: page.find("slots").text == "0 of 4")
    page.build(steps=300, n=2)  # guided: two slots each
    page.until(lambda: page.find("slots").text == "4 of 4" and page.find("step").text.endswith("ms"))
    page.find("cancel").click()
    page.until_words("Cancelled")


@pytest.mark.parametrize(
    ("name", "width", "height", "scheme"),
    [
        ("phone", 390, 844, "light"),
        pytest.param("desktop", 1280, 800, "light", marks=pytest.mark.long),
        pytest.param("dark", 1280, 800, "dark", marks=pytest.mark.long),
    ],
)
def test_it_fits_every_screen(page: Page, driver: Chrome, name: str, width: int, height: int, scheme: str) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": name == "phone"}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page.build(steps=100, n=6 if name != "phone" else 2)
        page.until_half_done()
        driver.save_screenshot(str(SCREENSHOTS / f"{name}-building.png"))
        page.until_words("Built in")
        page.until(lambda: page.point.startswith("after 100"))
        driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))

        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.long
def test_a_server_that_needs_a_key_is_asked_with_it_once_it_was_given(driver: Chrome, locked: Site) -> None:
    """It is offered under a path, too."""
    locked.wait_until_ready()
    page = Page(driver, f"http://127.0.0.1:{locked.port}{PREFIX}/")
    driver.get(page.url.rstrip("/"))
    assert driver.current_url == page.url
    for key in ("wrong", KEY):
        page.until(lambda: page.find("state").text == "waiting for your key" and page.field("key").is_displayed())
        assert not page.find("load").is_displayed()
        page.field("key").send_keys(key, Keys.ENTER)
        page.until(lambda: page.find("unknown").is_displayed() or page.find("state").text == "ready")

    page.build(seed=7, steps=20, n=2)
    page.until_words("Built in")
    page.open()  # the key is kept as long as the tab
    page.until_words("Built in")
    assert len(page.pictures()) == 2
    assert "$DDPM_KEY" in str(page.find("curl").get_attribute("textContent"))
    assert "sesame" not in driver.page_source
    page.until(lambda: page.find("slots").text == "0 of 4")

    page.find("api").click()
    WebDriverWait(driver, 20).until(lambda _: driver.find_elements(By.ID, "GenerateRequest"))
    assert driver.current_url == f"{page.url}docs"
    assert str(page.find("document").get_attribute("href")).startswith("blob:")


def test_the_reference_asks_for_the_key_that_the_server_needs(driver: Chrome, locked: Site) -> None:
    locked.wait_until_ready()
    page = Page(driver, f"http://127.0.0.1:{locked.port}{PREFIX}/docs")
    driver.get(page.url)
    page.run("sessionStorage.clear()")
    driver.get(page.url)
    page.until(lambda: page.field("key").is_displayed())
    assert not driver.find_elements(By.ID, "GenerateRequest")
    page.field("key").send_keys(KEY, Keys.ENTER)

    page.until(lambda: driver.find_elements(By.ID, "GenerateRequest"))


def test_the_reference_shows_what_the_server_says_of_itself(driver: Chrome, site: Site) -> None:
    site.wait_until_ready()
    driver.get_log("browser")  # type: ignore[no-untyped-call]  # what was logged before is gone with this
    driver.get(f"http://127.0.0.1:{site.port}/docs#GenerateRequest")
    WebDriverWait(driver, 20).until(lambda _: driver.find_elements(By.ID, "GenerateRequest"))
    document = site.client.get("/openapi.json").json()
    routes = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    titles = [title.text for title in driver.find_elements(By.CSS_SELECTOR, "#reference h2")]
    rows = [row.text for row in driver.find_elements(By.CSS_SELECTOR, "#GenerateRequest tr")]

    assert titles == [*routes, *document["components"]["schemas"]]
    assert [row for row in rows if row.startswith("n integer 1 … 64 or null 1 pictures")]
    assert [row for row in rows if row.startswith("seed integer 0 … 9007199254740991 or null drawn")]
    assert [row for row in rows if row.startswith("frames Frames or null")]
    assert driver.get_log("browser") == []  # type: ignore[no-untyped-call]
