"""Errors survive pickling, and each refusal is the error that its status calls for."""

import copy
import json
import pickle

import pytest
from ddpm_client import Busy, Cancelled, Denied, Failed, Invalid, NotFound, Refused, Unreachable, errors
from ddpm_client.errors import BAD_REQUEST, POLICY, UNKNOWN_JOB, Response, close_error, refusal_in

PROBLEM = {"status": 429, "code": "queue-full", "detail": "later", "errors": [{"pointer": "/n"}], "request_id": "7"}
RAISED: list[Exception] = [
    *(kind(PROBLEM) for kind in (Refused, Invalid, NotFound, Denied, Failed)),
    Busy(PROBLEM, 2.5),
    *(kind("words") for kind in (errors.ClientError, Cancelled, errors.TimedOut, Unreachable)),
]


def test_every_error_is_tried_here() -> None:
    kinds = {kind for name, kind in vars(errors).items() if isinstance(kind, type) and name[0] != "_"}
    assert {kind for kind in kinds if issubclass(kind, Exception)} == {type(error) for error in RAISED}


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_an_error_can_be_sent_to_another_process_and_copied(error: Exception) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("status", "retry_after", "kind", "retry_after_s"),
    [
        (401, "", Denied, None),
        (403, "", Denied, None),
        (404, "", NotFound, None),
        (410, "", NotFound, None),
        (422, "", Invalid, None),
        (429, "7", Busy, 7),
        (503, "2", Busy, 2),
        (503, "", Refused, None),
        (500, "", Refused, None),
    ],
)
def test_a_problem_of_the_server_is_an_error_by_its_status(
    status: int, retry_after: str, kind: type[Refused], retry_after_s: float | None
) -> None:
    headers = {"content-type": "application/problem+json", "retry-after": retry_after}
    error = refusal_in(Response(status, headers, json.dumps(PROBLEM | {"status": status}).encode()))

    assert (type(error), str(error), error.retry_after_s) == (kind, "later", retry_after_s)
    assert (error.status, error.code, error.errors) == (status, "queue-full", [{"pointer": "/n"}])


@pytest.mark.parametrize("status", [502, 503])
def test_a_proxy_that_answers_for_the_server_is_busy(status: int) -> None:
    error = refusal_in(Response(status, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"<html>"))

    assert (type(error), str(error), error.retry_after_s) == (Busy, f"the answer was {status}", None)


def test_a_websocket_that_ended_is_an_error_by_its_close_code() -> None:
    ended = [close_error(code, "why") for code in (UNKNOWN_JOB, POLICY, BAD_REQUEST, 1011)]

    assert [type(error) for error in ended] == [NotFound, Refused, Refused, Unreachable]
    assert {str(error) for error in ended} == {"why"}
    assert str(close_error(None, "")) == "the connection to the server was lost"


@pytest.mark.parametrize("body", [b"", b"[]", b'""', b"null", b'[["a", 1]]', b"<html>"])
def test_an_answer_without_a_document_is_not_of_the_server(body: bytes) -> None:
    with pytest.raises(Refused, match="the answer was 200, and no JSON document"):
        Response(200, {}, body).json()
