"""A name that is no model's has one answer, wherever it is given: 404 `model-not-found`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any, TypeAlias

import openai
import pytest
from ddpm_client import Client, NotFound
from openai import OpenAI
from starlette.testclient import TestClient

from server.catalog import MOST_NAMES, one_of
from server.settings import Settings
from server.web.app import create_app
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend

Ask: TypeAlias = Callable[[TestClient, str], dict[str, Any]]


def posted(path: str, **body: Any) -> Ask:
    """Asks with a body."""
    return lambda client, model: answered(client.post(path, json={"model": model, **body}))


def got(path: str) -> Ask:
    """Asks with a path."""
    return lambda client, model: answered(client.get(f"{path}/{model}"))


def answered(answer: Any) -> dict[str, Any]:
    """The problem of an answer."""
    problem: dict[str, Any] = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == problem["status"]
    return problem


def streamed(client: TestClient, model: str) -> dict[str, Any]:
    """Asks over a websocket."""
    with client.websocket_connect("/generate/stream") as socket:
        socket.send_json({"model": model})
        problem: dict[str, Any] = socket.receive_json()["problem"]
        assert socket.receive()["code"] == 4400
    return problem


WAYS: dict[str, Ask] = {
    "generate": posted("/generate"),
    "later": lambda client, model: answered(
        client.post("/generate", json={"model": model}, headers={"prefer": "respond-async"})
    ),
    "websocket": streamed,
    "openai": posted("/v1/images/generations", prompt=""),
    "openai stream": posted("/v1/images/generations", prompt="", stream=True),
    "models": got("/models"),
    "openai models": got("/v1/models"),
}


@pytest.mark.parametrize("model", ["other", "Tiny", "tiny2", "a" * 64])
@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_model_is_not_found_and_the_answer_names_those_that_are(
    client: TestClient, way: str, model: str
) -> None:
    problem = WAYS[way](client, model)

    assert (problem["status"], problem["code"]) == (404, "model-not-found")
    assert problem["detail"] == "model must be one of tiny"
    assert problem["errors"] == [{"pointer": "/model", "message": "model must be one of tiny"}]
    assert model not in json.dumps(problem)


def test_openais_clients_know_the_error(client: TestClient) -> None:
    talk = OpenAI(base_url="http://localhost/v1", api_key="none", http_client=client, max_retries=0)
    questions: list[Callable[[], object]] = [
        lambda: talk.images.generate(model="gpt-image-2", prompt=""),
        lambda: talk.models.retrieve("gpt-image-2"),
    ]
    for ask in questions:
        with pytest.raises(openai.NotFoundError) as refusal:
            ask()
        assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
        assert refusal.value.type == "invalid_request_error"


def test_our_client_says_that_it_is_not_found(server: Server) -> None:
    with Client(f"http://127.0.0.1:{server.port}", timeout_s=20) as ours:
        for ask in (lambda: ours.generate(model="other"), lambda: ours.model("other")):
            with pytest.raises(NotFound, match="model must be one of tiny") as refusal:
                ask()
            assert refusal.value.errors == [{"pointer": "/model", "message": "model must be one of tiny"}]


def test_of_many_models_the_first_are_named() -> None:
    names = [f"m{i:02d}" for i in range(100)]

    assert one_of(names[:MOST_NAMES]) == f"one of {', '.join(names[:MOST_NAMES])}"
    assert one_of(names) == f"one of {', '.join(names[:MOST_NAMES])} and {100 - MOST_NAMES} more"


@pytest.fixture
def two(weights: Path, tmp_path: Path) -> Iterator[TestClient]:
    """Two models, none of which is the default."""
    for name in ("a", "b"):
        copytree(weights / "tiny", tmp_path / "both" / name)
    settings = Settings(weights=str(tmp_path / "both"), data_dir=tmp_path / "data")
    with TestClient(create_app(settings, FakeBackend())) as made:
        yield made


def test_a_request_that_must_name_a_model_and_does_not_lacks_a_field(two: TestClient) -> None:
    for path, status in (("/generate", 422), ("/v1/images/generations", 400)):
        answer = two.post(path, json={})
        assert (answer.status_code, answer.json()["code"]) == (status, "invalid-request")
        assert answer.json()["detail"] == "name a model, one of a, b"
