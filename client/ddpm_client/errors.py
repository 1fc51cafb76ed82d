"""What a caller of the Python client can be told. Messages are the server's own words, where it said any.

ClientError
├── Refused         the server answered with a problem: `status`, `code`, `detail`, `errors`
│   ├── Invalid         422: a field is out of bounds, `errors` names it
│   ├── NotFound        404, 410: there is no such thing, or not any more
│   ├── Denied          401, 403: no key, or a wrong one
│   └── Busy            429, 502, 503: later, perhaps; `retry_after_s`. A 503 of the server without one is just Refused
├── Failed          the job was taken on, and then failed; the same members as Refused
├── Cancelled       the job was given up
├── TimedOut        nothing was heard for too long
└── Unreachable     there is no server, or the line to it breaks again and again
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ClientError(Exception):
    """Everything the client raises on purpose."""


class _Problem(ClientError):
    """A problem as RFC 9457 has it."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.status, self.code = int(document.get("status", 500)), str(document.get("code", "unknown"))
        self.detail = str(document.get("detail", ""))
        self.errors: list[dict[str, str]] = list(document.get("errors", ()))
        self.request_id = str(document.get("request_id", ""))
        super().__init__(self.detail)

    def __reduce__(self) -> tuple[Any, ...]:
        """As pickle and copy have it: made of words, and then of all its members. A pool of processes needs that."""
        return type(self), ({"detail": self.detail},), self.__dict__


class Refused(_Problem):
    """The server answered with a problem."""


class Invalid(Refused):
    """A field is out of bounds; `errors` names it."""


class NotFound(Refused):
    """There is no such thing, or not any more."""


class Denied(Refused):
    """A key is needed, or another one."""


class Busy(Refused):
    """It could be done later. `retry_after_s`: when, if the server said so."""

    def __init__(self, document: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        super().__init__(document)
        self.retry_after_s = retry_after_s


class Failed(_Problem):
    """The job was taken on, and then failed."""


class Cancelled(ClientError):
    """The job was given up."""


class TimedOut(ClientError, TimeoutError):
    """Nothing was heard for too long."""


class Unreachable(ClientError, ConnectionError):
    """There is no server, or the line to it breaks again and again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back over HTTP. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """The body, which is JSON. Raises Refused: what answers in another way is not the server."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refused({"status": self.status, "detail": f"the answer was {self.status}, and no JSON"}) from None


class LineBroken(Exception):
    """A connection could not be made, or ended. `answer`: what refused a websocket; `code`: what closed one."""

    def __init__(
        self, message: str, answer: Answer | None = None, code: int | None = None, silent: bool = False
    ) -> None:
        super().__init__(message)
        self.answer, self.code, self.silent = answer, code, silent


KINDS: dict[int, type[Refused]] = {401: Denied, 403: Denied, 404: NotFound, 410: NotFound, 422: Invalid}
LATER = (429, 502, 503)


def refused(document: Mapping[str, Any], retry_after_s: float | None = None) -> Refused:
    """A problem document as what to raise."""
    status = int(document["status"])
    return Busy(document, retry_after_s) if status in LATER else KINDS.get(status, Refused)(document)


def refusal_in(answer: Answer) -> Refused:
    """What an answer refuses. It may come from somebody between us and the server, in other words than ours."""
    document: dict[str, Any] = {"status": answer.status, "detail": f"the answer was {answer.status}"}
    said = answer.headers.get("retry-after", "")
    if answer.headers.get("content-type", "").startswith("application/problem+json"):
        document |= answer.json()
        if answer.status == 503 and not said:  # so it says that waiting will not help
            return Refused(document)
    return refused(document, float(said) if said.isascii() and said.isdigit() else None)
