"""Labels and guidance over HTTP: what may be asked, what it costs, and that company changes no picture."""

import base64
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.cli import main
from server.settings import Settings
from server.web.app import create_app
from tests.model.convert.directories import write_model
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend, read_texts

INDEX = {"id2label": {"0": "cat", "1": "dog"}, "null_label": 3, "guidance": 2.0}
ALLOWED = "random, a label 0..2, or one of its names: cat, dog"
INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"label": 3}, "/label", f"label must be {ALLOWED}, got 3"),
    ({"label": -1}, "/label", f"label must be {ALLOWED}, got -1"),
    ({"label": 100_000}, "/label", f"label must be {ALLOWED}, got 100000"),
    ({"label": 10**20}, "/label", "must be a label's number, random or a name of 1 to 100 characters"),
    ({"label": True}, "/label", "must be a label's number, random or a name of 1 to 100 characters"),
    ({"label": 1.0}, "/label", "must be a label's number, random or a name of 1 to 100 characters"),
    ({"label": ""}, "/label", "must be a label's number, random or a name of 1 to 100 characters"),
    ({"label": "bird"}, "/label", f"label must be {ALLOWED}, got 'bird'"),
    ({"labels": ["cat", "bird"], "n": 2}, "/labels/1", f"labels.1 must be {ALLOWED}, got 'bird'"),
    ({"labels": [1, 2]}, "/labels", "labels must be as many as pictures, 1, got 2"),
    ({"labels": []}, "/labels", "labels must be a list of 1 to 8 labels, got 0"),
    ({"labels": [0] * 9, "n": 8}, "/labels", "labels must be as many as pictures, 8, got 9"),
    ({"labels": [0, None], "n": 2}, "/labels/1", "labels.1 must be a label's number, random or a name"),
    ({"labels": [0], "label": 0}, "/labels", "labels must be left out beside label"),
    ({"guidance": 2.0}, "/guidance", "guidance applies to pictures with a label only"),
    ({"label": 0, "guidance": 21}, "/guidance", "guidance must lie in 0..20, got 21"),
    ({"label": 0, "guidance": -1}, "/guidance", "guidance must lie in 0..20, got -1"),
    ({"label": 0, "guidance": "2"}, "/guidance", "guidance must be a number in 0..20, got a string"),
    (
        {"label": 0, "guidance_interval": [30]},
        "/guidance_interval",
        "must be a list of 2 integers, got 1",
    ),
    ({"label": 0, "guidance_interval": [1, 30]}, "/guidance_interval", "[high, low] with 30 >= high >= low >= 1, got"),
    (
        {"label": 0, "guidance_interval": [30, 0]},
        "/guidance_interval/1",
        "guidance_interval.1 must lie in 1..30, got 0",
    ),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An application whose one model is conditional, and whose engine is none."""
    folder = tmp_path_factory.mktemp("labels")
    write_model(folder / "weights" / "tiny", labels=4, index=INDEX)
    settings = Settings(weights=str(folder / "weights"), data_dir=folder / "data", max_n=8, max_queued_steps=100)
    with TestClient(create_app(settings, FakeBackend())) as made:
        yield made


def asked(client: TestClient, **body: Any) -> dict[str, Any]:
    """The request of a job, as its document tells it."""
    answer = client.post("/generate", json=body, headers={"accept": "application/json"})
    assert answer.status_code == 200, answer.text
    request: dict[str, Any] = answer.json()["request"]
    return request


@pytest.mark.parametrize(("body", "pointer", "message"), INVALID)
def test_a_refusal_names_the_field_and_what_it_allows(
    client: TestClient, body: dict[str, Any], pointer: str, message: str
) -> None:
    answer = client.post("/generate", json=body)

    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["pointer"] == pointer and message in error["message"]


def test_guidance_that_is_no_number_is_no_json(client: TestClient) -> None:
    assert client.post("/generate", content=b'{"label": 0, "guidance": NaN}').status_code == 400


def test_the_job_tells_labels_by_number_with_every_default_filled_in(client: TestClient) -> None:
    told = asked(client, label="dog", n=2, steps=4)
    assert (told["labels"], told["guidance"], told["guidance_interval"]) == ([1, 1], 2.0, None)

    told = asked(client, steps=4)
    assert (told["labels"], told["guidance"]) == (None, None)

    drawn = asked(client, label="random", n=4, seed=1, steps=4)["labels"]
    assert asked(client, label="random", n=2, seed=2, steps=4)["labels"] == drawn[1:3]


def test_each_picture_says_its_label(client: TestClient) -> None:
    answer = client.post(
        "/generate", json={"labels": ["cat", 2], "n": 2, "steps": 4}, headers={"accept": "application/json"}
    )
    texts = [read_texts(base64.b64decode(image["b64_png"])) for image in answer.json()["images"]]

    assert [(each["label"], each["guidance"]) for each in texts] == [("0", "2.0"), ("2", "2.0")]
    assert "label" not in read_texts(client.post("/generate", json={"steps": 4}).content)


def test_a_sheet_says_the_labels_of_all_its_pictures(client: TestClient) -> None:
    different = read_texts(client.post("/generate", json={"labels": [0, 2, 0], "n": 3, "steps": 4}).content)
    alike = read_texts(client.post("/generate", json={"label": 2, "n": 3, "steps": 4}).content)

    assert (different.get("label"), different["labels"]) == (None, "[0, 2, 0]")
    assert (alike["label"], alike.get("labels")) == ("2", None)


def test_a_guided_picture_costs_two(client: TestClient) -> None:
    assert client.post("/generate", json={"steps": 30, "n": 3}).status_code == 200
    answer = client.post("/generate", json={"label": 0, "steps": 30, "n": 2})
    assert "must be at most 100, got 120" in answer.json()["errors"][0]["message"]
    assert client.post("/generate", json={"label": 0, "guidance": 1, "steps": 30, "n": 2}).status_code == 200


def test_models_tell_their_labels(client: TestClient) -> None:
    (model,) = client.get("/models").json()["models"]
    names = [{"label": 0, "name": "cat"}, {"label": 1, "name": "dog"}]
    assert model["labels"] == {"count": 3, "names": names, "null": 3, "guidance": 2.0}


@pytest.mark.parametrize(
    ("prompt", "label"), [("dog", 1), ("Label: Cat", 0), ("label:2", 2), ("a dog", None), ("", None)]
)
def test_openais_prompt_may_be_a_label(client: TestClient, prompt: str, label: int | None) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": prompt, "steps": 4})
    texts = read_texts(base64.b64decode(answer.json()["data"][0]["b64_json"]))

    assert texts.get("label") == (None if label is None else str(label))


def test_a_label_field_comes_before_the_prompt(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "dog", "label": 2, "steps": 4})
    assert read_texts(base64.b64decode(answer.json()["data"][0]["b64_json"]))["label"] == "2"


# A real engine


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a conditional model."""
    weights = tmp_path_factory.mktemp("weights")
    write_model(weights / "tiny", labels=4, index=INDEX)
    return weights


@pytest.fixture(scope="module")
def server(pets: Path) -> Iterator[Server]:
    """Its server, with one slot as far as settings go: there are two, for guidance."""
    with Server(pets, DDPM_SLOTS="1") as running:
        yield running


@pytest.fixture(scope="module")
def roomy(pets: Path) -> Iterator[Server]:
    """Another, with room for guided pictures beside others."""
    with Server(pets, DDPM_SLOTS="6") as running:
        yield running


def made(server: Server, body: dict[str, Any]) -> bytes:
    """The pictures of a request, made anew."""
    asking = {"accept": "application/zip", "cache-control": "no-cache"}
    answer = server.client.post("/generate", json=body, headers=asking)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_pictures_alone_and_in_company_are_the_same_bytes(roomy: Server) -> None:
    wanted: list[dict[str, Any]] = [
        {"seed": 1, "label": "dog", "steps": 9},
        {"seed": 1, "label": "cat", "steps": 9, "guidance": 1},
        {"seed": 1, "steps": 9},
        {"seed": 1, "labels": [2, 0, 1], "n": 3, "guidance": 4.5, "guidance_interval": [20, 3], "sampler": "unipc"},
        {"seed": 9, "label": "random", "n": 2, "sampler": "dpmpp_sde", "steps": 7, "noise": "torch"},
    ]
    alone = [made(roomy, body) for body in wanted]
    with ThreadPoolExecutor(len(wanted)) as threads:
        together = list(threads.map(lambda body: made(roomy, body), wanted))

    assert alone == together
    assert len({*alone}) == len(alone)


@pytest.mark.parametrize("asked", ["--label dog", "--label 2 --guidance 1", "--label cat --guidance-interval 20,3"])
def test_the_command_asks_for_a_label_and_repeats_its_picture(server: Server, tmp_path: Path, asked: str) -> None:
    first, second, url = tmp_path / "first.png", tmp_path / "second.png", f"http://127.0.0.1:{server.port}"
    assert main.main(["generate", "--seed", "3", *asked.split(), "-o", str(first), "--url", url]) == 0
    assert main.main(["generate", "--like", str(first), "-o", str(second), "--url", url]) == 0

    assert first.read_bytes() == second.read_bytes()


def test_a_guided_picture_survives_its_engine(server: Server) -> None:
    body = {"seed": 5, "label": "dog", "n": 64, "steps": 30}
    undisturbed = made(server, body)
    with ThreadPoolExecutor(1) as threads:
        disturbed = threads.submit(made, server, body)
        server.until(lambda: server.client.get("/status").json()["slots_used"] == 2)
        os.kill(server.engine_pid, signal.SIGKILL)
        assert disturbed.result() == undisturbed
