"""`GET /status`: what the server is doing, for whoever may use it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.jobs.eta import Pace
from server.settings import Settings
from server.web.app import create_app
from server.web.auth import hash_of_key
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.server.jobs.test_metrics import read
from tests.waiting import until

IDLE = {
    "ready": True,
    "reason": None,
    "jobs_running": 0,
    "jobs_waiting": 0,
    "steps_waiting": 0,
    "slots": 4,
    "slots_used": 0,
    "viewers": 0,
    "image_steps_per_s": 0.0,
    "step_s": None,
    "engines": [{"up": True, "loaded": ["tiny"]}],
    "models": ["tiny"],
}


@pytest.fixture
def locked(weights: Path, tmp_path: Path) -> Iterator[TestClient]:
    """An application that needs a key, and has none for /metrics."""
    (tmp_path / "keys").write_text(f"alice:{hash_of_key(b'open sesame').hex()}\n")
    settings = Settings(weights=str(weights), data_dir=tmp_path / "data", api_keys=str(tmp_path / "keys"))
    with TestClient(create_app(settings, FakeBackend())) as made:
        yield made


def test_the_ordinary_key_opens_it(locked: TestClient) -> None:
    key = {"authorization": "Bearer open sesame"}

    assert locked.get("/status").status_code == 401
    assert locked.get("/metrics", headers=key).status_code == 401
    answer = locked.get("/status", headers=key)
    assert (answer.json(), answer.headers["cache-control"]) == (IDLE, "no-store")


def test_it_says_why_no_jobs_are_accepted(client: TestClient) -> None:
    client.app.state.jobs.backend.trouble = "the engine is being replaced"  # type: ignore[attr-defined]
    client.app.state.jobs.backend.models = {}  # type: ignore[attr-defined]
    status, ready = client.get("/status"), client.get("/readyz")

    assert (status.status_code, ready.status_code) == (200, 503)
    assert (status.json()["ready"], status.json()["reason"]) == (False, ready.json()["detail"])
    assert status.json()["engines"] == [{"up": False, "loaded": []}]


def test_it_says_what_the_metrics_say(server: Server) -> None:
    asked = {"steps": 30, "n": 64, "seed": 1}
    job = server.client.post("/generate", json=asked, headers={"prefer": "respond-async"}).json()["id"]
    busy = until(lambda: (now := server.client.get("/status").json())["image_steps_per_s"] and now["step_s"] and now)
    until(lambda: server.client.get(f"/jobs/{job}").json()["status"] == "succeeded")
    idle, metrics = server.client.get("/status").json(), read(server.client.get("/metrics").text)

    assert 0 < busy["step_s"] < 10 and busy["image_steps_per_s"] > 0
    assert (busy["engines"], busy["models"]) == ([{"up": True, "loaded": ["tiny"]}], ["tiny"])
    for name in ("slots", "jobs_running", "jobs_waiting", "steps_waiting"):
        assert idle[name] == metrics[f"ddpm_{name}"]


def test_the_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    measured = [pace.measure()]
    for second in range(20):
        busy = min(second, 10)
        pace.look(100.0 + second, image_steps=8 * busy, steps=2 * busy, steps_s=0.5 * busy)
        measured.append(pace.measure())

    assert measured[:2] == [(0.0, None)] * 2
    assert measured[2:12] == [(8.0, 0.25)] * 10
    assert measured[14:] == [(0.0, None)] * 7
