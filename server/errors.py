"""Every refusal is an answer: domain errors, and the one table that turns them into HTTP.

ServerError
├── BadInput            a request that is malformed, or asks for what cannot be
│   ├── Malformed           it is not what HTTP or JSON allow
│   ├── BadHost             it names a host that this server does not answer for
│   ├── Unauthenticated     it brings no key, or a wrong one
│   ├── Forbidden           a page of another origin sent it
│   ├── NotFound            there is no such thing
│   ├── Gone                there is no such thing any more
│   ├── NotAcceptable       it cannot be answered in the form that was asked for
│   ├── TooSlow             it has not arrived in time
│   ├── BodyTooLarge        its body is too large
│   ├── TargetTooLong       its path and query are too long
│   ├── HeadTooLarge        its headers are too large, or too many
│   ├── UnsupportedMedia    its body is of another kind
│   ├── KeyReused           its Idempotency-Key came with another body before
│   └── Invalid             its fields say what cannot be
├── TooBusy             the queue is full
│   └── QuotaExceeded       the caller's own share is used up
├── NotReady            loading, draining, or the engine is down
├── StorageFull         nothing more can be put on disk
├── StillRunning        the job that came with the same Idempotency-Key has not ended
├── TooManyConnections  more connections, or websockets, than there may be
├── DeadlinePassed      the deadline that the client set was not met
├── JobCancelled        somebody gave the job up while another waited for it
├── SampleLost          the engine says that a picture could not be made
├── ModelChanged        the model that a job was accepted for is not the one that is served
├── ModelBroken         the model cannot be loaded
├── Recalled            what a job that ended long ago failed with
├── StoreRefused        the store is damaged, of another version, or has failed
├── StoreInUse          another server has the store
├── SettingsError       a DDPM_* variable or a flag is unknown or ill-formed
└── EngineFailed        the engine is down for good; `exit_code` says why
"""

import http
from dataclasses import dataclass, field
from typing import Any

from model.errors import ModelRefused, NoSuchDevice, PlanError

EXIT_FAILED, EXIT_USAGE, EXIT_MODEL_REFUSED, EXIT_STORE_REFUSED, EXIT_STORE_IN_USE = 1, 2, 3, 4, 5
EXIT_NO_DEVICE, EXIT_STORAGE_FULL, EXIT_ENGINE = 6, 7, 70


class ServerError(Exception):
    """Everything the server raises on purpose. `headers`: what its answer says besides the problem."""

    @property
    def headers(self) -> dict[str, str]:
        return {}


class BadInput(ServerError):
    """A request that is malformed, or asks for what cannot be."""


class Malformed(BadInput):
    """It is not what HTTP or JSON allow."""


class BadHost(BadInput):
    """It names a host that this server does not answer for."""


class Unauthenticated(BadInput):
    """It brings no key, or a wrong one."""

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(BadInput):
    """A page of another origin sent it."""


class NotFound(BadInput):
    """There is no such thing."""


class Gone(BadInput):
    """There is no such thing any more."""


class NotAcceptable(BadInput):
    """It cannot be answered in the form that was asked for."""


class TooSlow(BadInput):
    """It has not arrived in time."""


class BodyTooLarge(BadInput):
    """Its body is too large."""


class TargetTooLong(BadInput):
    """Its path and query are too long."""


class HeadTooLarge(BadInput):
    """Its headers are too large, or too many."""


class UnsupportedMedia(BadInput):
    """Its body is of another kind."""


class KeyReused(BadInput):
    """Its Idempotency-Key came with another body before."""


class Invalid(BadInput):
    """Its fields say what cannot be. `fields` are pairs of a field's name (or nothing) and what is wrong with it."""

    def __init__(self, *fields: tuple[str, str]) -> None:
        super().__init__(fields[0][1])
        self.fields = fields


class _Later(ServerError):
    """It could be done at another time. `retry_after_s`: when to try again."""

    def __init__(self, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class TooBusy(_Later):
    """The queue is full."""


class QuotaExceeded(TooBusy):
    """The caller's own share is used up. quota: image-steps in a minute. left: of them, now."""

    def __init__(self, message: str, retry_after_s: int, quota: int, left: int) -> None:
        super().__init__(message, retry_after_s)
        self.quota, self.left = quota, left

    @property
    def headers(self) -> dict[str, str]:
        policy, rest = f'"image-steps";q={self.quota};w=60', f'"image-steps";r={self.left};t={self.retry_after_s}'
        return {**super().headers, "RateLimit-Policy": policy, "RateLimit": rest}


class NotReady(_Later):
    """No work is taken right now."""


class StorageFull(_Later):
    """Nothing more can be put on disk."""


class StillRunning(_Later):
    """The job that came with the same Idempotency-Key has not ended. `job`: its id."""

    def __init__(self, job: str, retry_after_s: int) -> None:
        super().__init__("the job that came with this Idempotency-Key has not ended", retry_after_s)
        self.job = job

    @property
    def headers(self) -> dict[str, str]:
        return {**super().headers, "Location": f"/jobs/{self.job}"}


class TooManyConnections(_Later):
    """There are more connections, or websockets, than there may be."""


class DeadlinePassed(ServerError):
    """The deadline that the client set was not met."""


class JobCancelled(ServerError):
    """Somebody gave the job up while another waited for it."""


class SampleLost(ServerError):
    """The engine says that a picture could not be made."""


class ModelChanged(ServerError):
    """The model that a job was accepted for is not the one that is served."""


class ModelBroken(ServerError):
    """The model cannot be loaded. The message says why."""


class StoreRefused(ServerError):
    """The store is damaged, of another version, or has failed."""


class StoreInUse(ServerError):
    """Another server has the store."""


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
    StoreRefused: EXIT_STORE_REFUSED,
    StoreInUse: EXIT_STORE_IN_USE,
    NoSuchDevice: EXIT_NO_DEVICE,
    StorageFull: EXIT_STORAGE_FULL,
}
ANSWERS: dict[type[Exception], tuple[int, str]] = {
    Malformed: (400, "malformed"),
    BadHost: (400, "bad-host"),
    Unauthenticated: (401, "unauthenticated"),
    Forbidden: (403, "origin-not-allowed"),
    NotFound: (404, "not-found"),
    Gone: (410, "gone"),
    NotAcceptable: (406, "not-acceptable"),
    TooSlow: (408, "request-timeout"),
    JobCancelled: (409, "cancelled"),
    StillRunning: (409, "still-running"),
    ModelChanged: (409, "model-changed"),
    BodyTooLarge: (413, "too-large"),
    TargetTooLong: (414, "target-too-long"),
    UnsupportedMedia: (415, "unsupported-media-type"),
    Invalid: (422, "invalid-request"),
    KeyReused: (422, "key-reused"),
    PlanError: (422, "invalid-request"),
    TooBusy: (429, "queue-full"),
    QuotaExceeded: (429, "quota-exceeded"),
    HeadTooLarge: (431, "head-too-large"),
    SampleLost: (500, "sample-failed"),
    NotReady: (503, "not-ready"),
    ModelBroken: (503, "model-broken"),
    StorageFull: (503, "storage-full"),
    TooManyConnections: (503, "too-many-connections"),
    EngineFailed: (503, "engine-down"),
    DeadlinePassed: (504, "deadline-passed"),
}
UNFORESEEN = (500, "internal")


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


class Recalled(ServerError):
    """What a job that ended long ago failed with."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def problem(error: Exception) -> Problem:
    """What to answer. Nothing of an unforeseen error is shown."""
    if isinstance(error, Recalled):
        return error.problem
    status, code = ANSWERS.get(type(error), UNFORESEEN)
    if (status, code) == UNFORESEEN:
        return Problem(status, code, "an error that should not have happened; it has been logged under this request id")
    wrong: tuple[tuple[str, str], ...] = ()
    if isinstance(error, PlanError):
        wrong = ((error.field, str(error)),)
    elif isinstance(error, Invalid):
        wrong = error.fields
    errors = [{"pointer": f"/{name}" if name else "", "message": message} for name, message in wrong]
    headers = error.headers if isinstance(error, ServerError) else {}
    return Problem(status, code, str(error), errors, headers)
