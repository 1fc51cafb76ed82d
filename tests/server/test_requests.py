"""What is refused at the door: every bound of the contract, in an answer that names the field and the limit."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from server.errors import SampleLost
from tests.server.fakes import FakeBackend

INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"seed": -1}, "/seed", "greater than or equal to 0"),
    ({"seed": 2**53}, "/seed", "less than"),
    ({"seed": 2**53 - 1, "n": 2}, "/seed", "2^53 - n"),
    ({"seed": True}, "/seed", "valid integer"),
    ({"seed": "7"}, "/seed", "valid integer"),
    ({"seed": 3.0}, "/seed", "valid integer"),
    ({"seed": 10**400}, "/seed", "less than"),
    ({"steps": 0}, "/steps", "greater than or equal to 1"),
    ({"steps": 31}, "/steps", "1..30"),
    ({"steps": 10**9}, "/steps", "1..30"),
    ({"n": 0}, "/n", "greater than or equal to 1"),
    ({"n": 9}, "/n", "1..8"),
    ({"n": 10**9}, "/n", "1..8"),
    ({"n": 10**400}, "/n", "less than"),
    ({"frames": {"every": 1, "count": 3}}, "/frames", "either every or count"),
    ({"n": None}, "/n", "valid integer"),
    ({"sampler": "euler"}, "/sampler", "ddpm, greedy, ddim, dpmpp_2m"),
    ({"eta": 0.5}, "/eta", "ddim only"),
    ({"sampler": "ddim", "eta": 1.5}, "/eta", "less than or equal to 1"),
    ({"sampler": "ddim", "variance": "small"}, "/variance", "ddpm only"),
    ({"variance": "learned"}, "/variance", "small or large"),
    ({"variance": "huge"}, "/variance", "small"),
    ({"spacing": "quad"}, "/spacing", "leading"),
    ({"clip": 1}, "/clip", "valid boolean"),
    ({"noise": "numpy"}, "/noise", "philox"),
    ({"priority": 11}, "/priority", "less than or equal to 10"),
    ({"priority": -11}, "/priority", "greater than or equal to -10"),
    ({"deadline_s": 0}, "/deadline_s", "greater than 0"),
    ({"model": "other"}, "/model", "one of tiny"),
    ({"model": "../tiny"}, "/model", "one of tiny"),
    ({"prompt": "a digit"}, "", "unknown field"),
    ({"n": 8, "steps": 30}, "/n", "at most 200"),
]


@pytest.mark.parametrize(("body", "pointer", "limit"), INVALID)
def test_a_field_out_of_bounds_is_named_with_its_limit(
    client: TestClient, body: dict[str, Any], pointer: str, limit: str
) -> None:
    answer = client.post("/generate", json=body)

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert limit in answer.json()["errors"][0]["message"]


MALFORMED = [
    b"{",
    b"[1",
    b"nul",
    b'{"seed": NaN}',
    b'{"seed": Infinity}',
    b'{"seed": 1, "seed": 2}',
    b"\xff\xfe",
    b"[" * 100 + b"]" * 100,
    b'{"seed": ' + b"9" * 400 + b"e999999}",
]


@pytest.mark.parametrize("body", MALFORMED)
def test_what_is_not_strict_json_is_malformed(client: TestClient, body: bytes) -> None:
    answer = client.post("/generate", content=body, headers={"content-type": "application/json"})

    assert answer.status_code in (400, 422)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_what_was_sent_is_never_echoed(client: TestClient) -> None:
    secret = "gx7-unlikely"
    for body in ({secret: 1}, {"sampler": secret}, {"model": secret}, {"variance": secret}, {"seed": secret}):
        assert secret not in client.post("/generate", json=body).text
    assert secret not in client.get(f"/models/{secret}").text
    assert secret not in client.get(f"/jobs/{secret}").text


def test_an_unpaired_surrogate_is_no_word_in_a_value_nor_in_a_name(client: TestClient) -> None:
    for body in (rb'{"sampler": "\ud800"}', rb'{"\ud800": 1}', rb'{"frames": {"\udfff": 1}}'):
        answer = client.post("/generate", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed")
    paired = client.post("/generate", content=rb'{"sampler": "\ud83d\ude00"}')
    assert paired.status_code == 422


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "text/plain"}, b"{}", 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b'{"seed": 1}', 415),
        ({"content-type": "application/json"}, b" " * 513, 413),
        ({"accept": "text/html"}, b"", 406),
        ({"accept": "image/png;q=0"}, b"", 406),
    ],
)
def test_bodies_and_answers_have_to_be_of_a_kind_we_know(
    client: TestClient, headers: dict[str, str], body: bytes, status: int
) -> None:
    assert client.post("/generate", content=body, headers=headers).status_code == status


def test_unknown_routes_and_methods_are_problems_too(client: TestClient) -> None:
    missing, wrong = client.get("/nothing"), client.get("/generate")

    assert (missing.status_code, missing.json()["code"]) == (404, "not-found")
    assert (wrong.status_code, wrong.json()["code"], wrong.headers["allow"]) == (405, "method-not-allowed", "POST")


def test_what_is_not_allowed_is_told_with_all_that_is(client: TestClient) -> None:
    assert client.put("/jobs/x").headers["allow"] == "DELETE, GET"
    assert client.post("/static/app.js").headers["allow"] == "GET, HEAD"


def test_a_request_id_is_kept_if_it_is_well_formed(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "my-id_1"}).headers["x-request-id"] == "my-id_1"
    assert client.get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def backend_of(client: TestClient) -> FakeBackend:
    backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
    assert isinstance(backend, FakeBackend)
    return backend


def test_no_work_is_taken_while_the_engine_is_down(client: TestClient) -> None:
    backend_of(client).trouble = "the engine is loading"

    for answer in (client.post("/generate"), client.get("/readyz")):
        assert (answer.status_code, answer.json()["detail"]) == (503, "the engine is loading")
        assert int(answer.headers["retry-after"]) > 0
    assert client.get("/healthz").status_code == 200


def test_a_full_queue_says_when_to_come_back(client: TestClient) -> None:
    client.app.state.jobs.admission.queue.taken = 190  # type: ignore[attr-defined]

    answer = client.post("/generate", json={"steps": 30, "n": 6})

    # 170 image-steps too many, at ten a second
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (429, "queue-full", "17")
    assert client.post("/generate", json={"steps": 10}).status_code == 200


def test_a_deadline_that_passes_gives_the_job_up(client: TestClient) -> None:
    backend = backend_of(client)
    backend.gate.clear()

    answer = client.post("/generate", json={"deadline_s": 0.05})

    assert (answer.status_code, answer.json()["code"]) == (504, "deadline-passed")
    assert backend.given_up == backend.specs
    assert client.app.state.jobs.admission.queue.taken == 0  # type: ignore[attr-defined]


def test_a_picture_that_cannot_be_made_is_a_failure_with_its_reason(client: TestClient) -> None:
    backend_of(client).failure = SampleLost("the picture was not finite after 7 steps")

    answer = client.post("/generate")

    assert (answer.status_code, answer.json()["code"]) == (500, "sample-failed")
    assert "not finite" in answer.json()["detail"]


def test_an_error_nobody_thought_of_shows_nothing_of_itself(client: TestClient) -> None:
    backend_of(client).failure = RuntimeError("the secret path")

    answer = client.post("/generate")

    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
