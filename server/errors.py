"""Every refusal is an answer: domain errors, and the one table that turns them into HTTP.

ServerError
├── BadInput            a request that is malformed, or asks for what cannot be
├── TooBusy             the queue is full
├── NotReady            loading, draining, or the engine is down
├── DeadlinePassed      the deadline that the client set was not met
├── SampleLost          the engine says that a picture could not be made
├── SettingsError       a DDPM_* variable or a flag is unknown or ill-formed
└── EngineFailed        the engine is down for good; `exit_code` says why
"""

import http
from dataclasses import dataclass, field
from typing import Any

from model.errors import ModelRefused, NoSuchDevice, PlanError

EXIT_FAILED, EXIT_USAGE, EXIT_MODEL_REFUSED, EXIT_NO_DEVICE, EXIT_ENGINE = 1, 2, 3, 6, 70


class ServerError(Exception):
    """Everything the server raises on purpose."""


@dataclass
class BadInput(ServerError):
    """A request that is refused. `errors` names fields by JSON pointer."""

    status: int
    code: str
    detail: str
    errors: list[dict[str, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class TooBusy(ServerError):
    """The queue is full; there should be room in `retry_after_s` seconds."""

    detail: str
    retry_after_s: int


@dataclass
class NotReady(ServerError):
    """No work is taken right now."""

    detail: str
    retry_after_s: int = 2


class DeadlinePassed(ServerError):
    """The deadline that the client set was not met."""


class SampleLost(ServerError):
    """The engine says that a picture could not be made."""


class SettingsError(ServerError):
    """A DDPM_* variable or a flag is unknown or ill-formed."""


class EngineFailed(ServerError):
    """The engine is down for good."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


EXIT_CODES: dict[type[Exception], int] = {
    SettingsError: EXIT_USAGE,
    ModelRefused: EXIT_MODEL_REFUSED,
    NoSuchDevice: EXIT_NO_DEVICE,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as RFC 9457 has it."""

    status: int
    code: str
    detail: str
    errors: list[dict[str, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def body(self, request_id: str) -> dict[str, Any]:
        """The members of an `application/problem+json` answer."""
        body: dict[str, Any] = {
            "type": f"urn:ddpm:problem:{self.code}",
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
        }
        return body | {"errors": self.errors} if self.errors else body


def problem(error: Exception) -> Problem:
    """What to answer. Nothing of an unforeseen error is shown."""
    match error:
        case BadInput(status, code, detail, errors, headers):
            return Problem(status, code, detail, errors, headers)
        case PlanError():
            invalid = {"pointer": f"/{error.field}", "message": str(error)}
            return Problem(422, "invalid-request", str(error), [invalid])
        case TooBusy(detail, retry_after_s):
            return Problem(429, "queue-full", detail, headers={"Retry-After": str(retry_after_s)})
        case NotReady(detail, retry_after_s):
            return Problem(503, "not-ready", detail, headers={"Retry-After": str(retry_after_s)})
        case EngineFailed():
            return Problem(503, "engine-down", "the engine is down", headers={"Retry-After": "30"})
        case DeadlinePassed():
            return Problem(504, "deadline-passed", str(error))
        case SampleLost():
            return Problem(500, "sample-failed", str(error))
    return Problem(500, "internal", "an error that should not have happened; it has been logged")
