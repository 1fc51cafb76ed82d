"""What the client raises. An error's message is the server's own text wherever the server sent one."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

DONE, POLICY, BAD_REQUEST, UNKNOWN_JOB = 1000, 1008, 4400, 4404  # close codes of a websocket


class ClientError(Exception):
    """The base of every error that the client raises."""


class _Problem(ClientError):
    """A problem document (RFC 9457) as an exception."""

    def __init__(self, document: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        self.status, self.code = int(document.get("status", 500)), str(document.get("code", "unknown"))
        self.detail, self.request_id = str(document.get("detail", "")), str(document.get("request_id", ""))
        self.errors: list[dict[str, str]] = list(document.get("errors", ()))
        super().__init__(self.detail)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuilds it from its text, then restores its members: process pools pickle exceptions."""
        return type(self), ({"detail": self.detail},), self.__dict__


class Refused(_Problem):
    """The server answered with a problem: `status`, `code`, `detail`, `errors`, `request_id`."""


class Invalid(Refused):
    """422: a field of the request is invalid; `errors` names it."""


class NotFound(Refused):
    """404, 410: there is no such job, model or path, or not any more."""


class Denied(Refused):
    """401, 403: the API key is missing, wrong or not permitted."""


class Busy(Refused):
    """429, 502, 503: no capacity now. `retry_after_s`: the server's advice. Its 503 without any is a plain Refused."""


class Failed(_Problem):
    """The job was accepted and then failed. It has the members of Refused."""


class Cancelled(ClientError):
    """The job was cancelled."""


class TimedOut(ClientError, TimeoutError):
    """The server was silent for longer than `timeout_s`."""


class Unreachable(ClientError, ConnectionError):
    """No connection to the server could be made, or it broke again and again."""


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> dict[str, Any]:
        """The JSON document in the body. Raises Refused if there is none: then it is not the server that answered."""
        with suppress(ValueError):
            if isinstance(document := json.loads(self.body), dict):
                return document
        raise Refused({"status": self.status, "detail": f"the answer was {self.status}, and no JSON document"})


BY_STATUS = {401: Denied, 403: Denied, 404: NotFound, 410: NotFound, 422: Invalid, 429: Busy, 502: Busy, 503: Busy}


def refusal_in(response: Response) -> Refused:
    """The exception for a response that is no success. A proxy may have sent it, without a problem document."""
    document: dict[str, Any] = {"status": response.status, "detail": f"the answer was {response.status}"}
    retry_after = response.headers.get("retry-after", "")
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        document |= response.json()
        if response.status == 503 and not retry_after:  # the server's way to say that waiting will not help
            return Refused(document)
    retry_after_s = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None
    return BY_STATUS.get(response.status, Refused)(document, retry_after_s)


def close_error(code: int | None, reason: str) -> ClientError:
    """The exception for a websocket that ended. code: the server's close code; None if the connection was lost"""
    detail = reason or "the connection to the server was lost"
    if code == UNKNOWN_JOB:
        return NotFound({"status": 404, "code": "not-found", "detail": detail})
    if code in (POLICY, BAD_REQUEST):
        return Refused({"status": 400, "code": "malformed", "detail": detail})
    return Unreachable(detail)
