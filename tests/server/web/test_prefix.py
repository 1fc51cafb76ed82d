"""Behind a proxy that offers the server under a path, everything that a client is told leads back through the proxy,
whether the proxy takes the path off or leaves it."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ddpm_client import Client
from starlette.testclient import TestClient

from server.errors import SettingsError
from server.settings import Settings
from server.web.app import create_app
from server.web.info import STATIC
from tests.server.fakes import FakeBackend
from tests.server.web.lines import Threaded, threaded
from tests.server.web.raw import ask, connected, problem_in, request, statuses

PREFIX = "/apps/ddpm"
as_it_comes = pytest.mark.parametrize("sent", [PREFIX, ""], ids=["left", "taken off"])


def settings(weights: Path, folder: Path, prefix: str = PREFIX, **others: str) -> Settings:
    """A server under a path."""
    return Settings.read({}, {"weights": weights, "data_dir": folder, "path_prefix": prefix, **others})


@pytest.fixture
def behind(weights: Path, tmp_path: Path) -> Iterator[TestClient]:
    """What a proxy sends goes to this server."""
    app = create_app(settings(weights, tmp_path), FakeBackend())
    with TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False) as made:
        yield made


@as_it_comes
def test_what_a_client_is_told_has_the_prefix(behind: TestClient, sent: str) -> None:
    later = behind.post(f"{sent}/generate", json={"seed": 1, "n": 2}, headers={"prefer": "respond-async"})
    id = later.json()["id"]
    events = behind.get(f"{sent}/jobs/{id}/events").text
    document = behind.get(f"{sent}/jobs/{id}").json()
    theirs = behind.post(f"{sent}/v1/images/generations", json={"response_format": "url"})
    openapi = behind.get(f"{sent}/openapi.json").json()

    assert later.headers["location"] == f"{PREFIX}/jobs/{id}"
    assert [image["url"] for image in document["images"]] == [f"{PREFIX}/jobs/{id}/images/{i}" for i in range(2)]
    assert re.findall(r'"url": "([^"]+)"', events) == [image["url"] for image in document["images"]]
    assert theirs.json()["data"][0]["url"].startswith(f"http://localhost:8000{PREFIX}/jobs/")
    assert openapi["servers"] == [{"url": PREFIX}]
    assert behind.get(document["images"][0]["url"]).headers["content-type"] == "image/png"


@as_it_comes
def test_a_request_that_still_runs_is_found_under_the_prefix(behind: TestClient, sent: str) -> None:
    behind.app.state.jobs.backend.gate.clear()  # type: ignore[attr-defined]
    keyed, asked = {"idempotency-key": "a"}, {"frames": None}
    first = behind.post(f"{sent}/generate", headers={**keyed, "prefer": "respond-async"}, json=asked)
    again = behind.post(f"{sent}/generate", headers=keyed, json=asked)

    assert (first.status_code, again.status_code) == (202, 409)
    assert again.headers["location"] == first.headers["location"] == f"{PREFIX}/jobs/{first.json()['id']}"


@as_it_comes
def test_the_pages_find_their_files_and_the_api(behind: TestClient, sent: str) -> None:
    for page in ("/", "/docs"):
        text = behind.get(f"{sent}{page}").text
        links = [link for link in re.findall(r'(?:src|href)="([^"#]+)"', text) if not link.startswith("data:")]
        assert links
        for link in links:
            assert not link.startswith("/")
            assert behind.get(f"{sent}/{link.removeprefix('.')}").status_code == 200
    for script in STATIC.glob("*.js"):
        assert re.findall(r'(?:ask|fetch|new URL)\(["`]/', script.read_text()) == []


@as_it_comes
def test_errors_websockets_and_open_paths_are_the_same(behind: TestClient, sent: str) -> None:
    with behind.websocket_connect(f"{sent}/generate/stream") as socket:
        socket.send_json({"seed": 1})
        assert socket.receive_json()["type"] in ("queued", "started")
    assert behind.get(f"{sent}/nothing").status_code == 404
    assert "error" in behind.post(f"{sent}/v1/images/generations", json={"n": 0}).json()
    assert behind.get(f"{sent}/healthz", headers={"host": "evil.example"}).status_code == 200


def test_the_prefix_alone_leads_to_the_page(behind: TestClient) -> None:
    answer = behind.get(PREFIX, follow_redirects=False)

    assert (answer.status_code, answer.headers["location"]) == (308, f"{PREFIX}/")
    assert behind.get(PREFIX).text == behind.get("/").text


def test_a_path_that_only_begins_like_the_prefix_is_not_under_it(behind: TestClient) -> None:
    for path in (f"{PREFIX}x/healthz", f"{PREFIX}{PREFIX}/healthz", f"x{PREFIX}/healthz", "/apps/healthz"):
        assert behind.get(path).status_code == 404


def test_keys_are_needed_under_the_prefix_as_without_it(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"a:{'0' * 64}\n")
    app = create_app(settings(weights, tmp_path / "data", api_keys=str(tmp_path / "keys")), FakeBackend())
    with TestClient(app, base_url="http://localhost") as locked:
        for path, status in {"/": 200, "/static/app.js": 200, "/readyz": 200, "/jobs": 401, "/metrics": 401}.items():
            assert [locked.get(f"{sent}{path}").status_code for sent in ("", PREFIX)] == [status] * 2


@pytest.mark.parametrize(
    "prefix", ["ddpm", "/", "/ddpm/", "//ddpm", "/a b", "/..", "/a/../b", "/jobs", "/v1", "/static/x", "/docs", "/ä"]
)
def test_a_prefix_that_cannot_be_one_stops_the_start(weights: Path, tmp_path: Path, prefix: str) -> None:
    with pytest.raises(SettingsError, match="DDPM_PATH_PREFIX"):
        create_app(settings(weights, tmp_path, prefix), FakeBackend())


@pytest.fixture
def grey(weights: Path, tmp_path: Path) -> Iterator[Threaded]:
    """The same over real connections."""
    with threaded(create_app(settings(weights, tmp_path), FakeBackend())) as made:
        yield made


def test_the_client_works_under_the_prefix(grey: Threaded) -> None:
    with Client(f"{grey.url}{PREFIX}", timeout_s=20) as far, Client(grey.url, timeout_s=20) as near:
        made = far.generate(seed=3, steps=2, frames={"every": 1})
        job = far.job(made.job["id"])

        assert [picture.png for picture in job.images()] == [made.png]
        assert job.trajectory("gif").startswith(b"GIF89a")
        assert [picture.png for picture in near.job(made.job["id"]).images()] == [made.png]


def test_health_is_answered_under_the_prefix_too_when_there_are_as_many_connections_as_may_be(grey: Threaded) -> None:
    with ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(connected(grey.port))
        answers = {path: ask(grey.port, request(path, method="GET")) for path in ("/healthz", f"{PREFIX}/healthz")}
        others = {path: ask(grey.port, request(path, method="GET")) for path in (f"{PREFIX}/jobs", f"{PREFIX}healthz")}

    assert [statuses(answer) for answer in answers.values()] == [[200], [200]]
    assert [problem_in(answer)["code"] for answer in others.values()] == ["too-many-connections"] * 2


def test_a_refusal_of_the_protocol_has_the_form_of_openai_under_the_prefix_too(grey: Threaded) -> None:
    def refused(path: str) -> dict[str, object]:
        return problem_in(ask(grey.port, request(path, content_length="9999999")))

    assert ["error" in refused(f"{sent}/v1/images/generations") for sent in ("", PREFIX)] == [True, True]
    assert "error" not in refused(f"{PREFIX}/generate")
