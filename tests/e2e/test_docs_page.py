"""The page at `/docs`, in a real browser that has nothing but this server."""

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.e2e.conftest import Site


def test_the_reference_shows_what_the_server_says_of_itself(driver: Chrome, site: Site) -> None:
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
