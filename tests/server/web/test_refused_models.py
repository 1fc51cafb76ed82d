"""Models that cannot be served are left out and told of, wherever it is found out; the others serve."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from model.checkpoint.card import WEIGHTS
from server.settings import Settings
from server.web.app import create_app
from tests.model.convert.directories import weights, write_model
from tests.server.conftest import Server
from tests.server.engines.test_supervisor import exit_of
from tests.server.fakes import FakeBackend
from tests.server.jobs.test_durability import ended, later
from tests.server.jobs.test_metrics import read

REASONS = {
    "header": f"{WEIGHTS} is not a safetensors file: "
    "it is a web page, such as a login or an error in place of the file",
    "labels": "config.json: num_class_embeds must be an integer in 1..65536, got 0",
    "nan": f"{WEIGHTS}: conv_in.bias holds numbers that are not finite",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good model and three that are not, of which two are refused before torch is imported."""
    made = tmp_path_factory.mktemp("weights")
    write_model(made / "good")
    (write_model(made / "header") / WEIGHTS).write_bytes(b"<html>not found</html>")
    write_model(made / "labels", {"num_class_embeds": 0})
    write_model(made / "nan", tensors=weights() | {"conv_in.bias": weights()["conv_in.bias"].log()})
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server of this folder."""
    made = Server(folder, DDPM_DTYPE="float32").wait_until_ready()
    yield made
    code, log = made.stop()
    assert code == 0
    lines = [json.loads(line) for line in log.splitlines() if "model refused" in line]
    assert [(line["model"], line["reason"]) for line in lines] == list(REASONS.items())


def test_the_good_model_serves_and_the_others_are_told_of(server: Server) -> None:
    listed = server.client.get("/models").json()
    ready = server.client.get("/readyz")

    assert {each["name"]: each["reason"] for each in listed["refused"]} == REASONS
    assert listed["default"] is None
    assert [each["weights"] for each in listed["models"]] == [WEIGHTS, WEIGHTS]
    assert (ready.status_code, ready.json()["refused"]) == (200, list(REASONS))
    assert read(server.client.get("/metrics").text)["ddpm_models_refused"] == 3
    assert server.client.post("/generate", json={"model": "good", "steps": 2}).status_code == 200


def test_a_directory_whose_name_is_no_text_is_told_of_too(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "good")
    for name in (b"\xffbad", b"two\nlines"):
        os.mkdir(os.fsencode(tmp_path / "models") + b"/" + name)
    settings = Settings(weights=tmp_path / "models", data_dir=tmp_path / "data")
    with TestClient(create_app(settings, FakeBackend())) as client:
        ready, listed = client.get("/readyz"), client.get("/models")
        asked = client.post("/generate", json={"model": "two\\nlines"})

    assert (ready.status_code, ready.json()["refused"]) == (200, ["two\\nlines", "\\udcffbad"])
    assert [each["name"] for each in listed.json()["refused"]] == ready.json()["refused"]
    assert (asked.status_code, asked.json()["code"]) == (503, "model-broken")


@pytest.mark.parametrize("name", REASONS)
def test_requests_for_a_refused_model_are_answered_with_its_reason(server: Server, name: str) -> None:
    answer = server.client.post("/generate", json={"model": name, "steps": 2}).json()

    assert (answer["status"], answer["code"], answer["detail"]) == (503, "model-broken", REASONS[name])


@pytest.mark.parametrize("name", ["header", "labels"])
def test_the_document_of_a_model_without_a_card_is_its_reason(server: Server, name: str) -> None:
    answer = server.client.get(f"/models/{name}")

    assert (answer.status_code, answer.json()["detail"]) == (503, REASONS[name])


def test_a_request_that_names_no_model_does_not_get_the_one_that_is_left(server: Server) -> None:
    answer = server.client.post("/generate", json={"steps": 2})

    assert answer.status_code == 422 and "name a model" in answer.json()["detail"]


def test_weights_that_are_overwritten_or_cut_while_they_are_served_change_no_picture(
    server: Server, folder: Path
) -> None:
    ask = {"model": "good", "seed": 3, "steps": 3}
    before, path = server.client.post("/generate", json=ask).content, folder / "good" / WEIGHTS
    other = write_model(folder.parent / "other", tensors={name: t + 1 for name, t in weights().items()}) / WEIGHTS
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    overwritten = server.client.post("/generate", json=ask).content
    os.truncate(path, 1000)
    cut = server.client.post("/generate", json=ask).content

    assert before.startswith(b"\x89PNG")
    assert (overwritten == before, cut == before) == (True, True)


def test_a_default_model_that_is_refused_ends_the_start(folder: Path) -> None:
    code, line = exit_of(DDPM_WEIGHTS=str(folder), DDPM_DEFAULT_MODEL="labels")

    assert (code, line) == (3, f"ddpm: labels: {REASONS['labels']}")


def test_a_job_of_a_model_that_is_refused_now_fails_with_that_reason(tmp_path: Path) -> None:
    file = write_model(tmp_path / "weights" / "tiny") / WEIGHTS
    write_model(tmp_path / "weights" / "other")
    knobs, gated = Settings(weights=str(tmp_path / "weights"), data_dir=tmp_path / "data"), FakeBackend()
    gated.gate.clear()
    with TestClient(create_app(knobs, gated)) as client:
        job = later(client, model="tiny", seed=1)
    file.write_bytes(b"")
    with TestClient(create_app(knobs, FakeBackend())) as client:
        error = ended(client, job["id"])["error"]

    assert (error["code"], "it is empty" in error["detail"]) == ("model-broken", True)
