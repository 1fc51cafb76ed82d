"""Domain errors, and how each of them is answered over HTTP (RFC 9457)."""

import http
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model.errors import ModelRefused, NoSuchDevice, PlanError

if TYPE_CHECKING:  # whose import takes a quarter of a second, and commands that make no document need none
    from server.documents import FieldError, ProblemDocument

EXIT_FAILED, EXIT_USAGE, EXIT_MODEL_REFUSED, EXIT_STORE_REFUSED, EXIT_STORE_IN_USE = 1, 2, 3, 4, 5
EXIT_NO_DEVICE, EXIT_STORAGE_FULL, EXIT_ENGINE = 6, 7, 70

ANSWERS: dict[type[Exception], tuple[int, str]] = {PlanError: (422, "invalid-request")}  # as each class declares
UNFORESEEN = (500, "internal")


class ServerError(Exception):
    """Everything the server raises on purpose. The HTTP answer carries `headers`."""

    headers: dict[str, str] = {}

    def __init_subclass__(cls, status: int = 0, code: str = "") -> None:
        if status:
            ANSWERS[cls] = status, code


class BadInput(ServerError):
    """The request is malformed or asks for something impossible."""


class Malformed(BadInput, status=400, code="malformed"):
    """The request is not valid HTTP or JSON."""


class BadHost(BadInput, status=400, code="bad-host"):
    """The server does not answer for the host that the request names."""


class Unauthenticated(BadInput, status=401, code="unauthenticated"):
    """The key is missing or wrong."""

    headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(BadInput, status=403, code="origin-not-allowed"):
    """A page of an origin that is not allowed sent the request."""


class NotFound(BadInput, status=404, code="not-found"):
    """The route, job, image or model does not exist."""


class ModelNotFound(BadInput, status=404, code="model-not-found"):
    """A path, or the field `model` of a body, names no model that there is."""

    field = "model"


class Gone(BadInput, status=410, code="gone"):
    """The job or image existed and was deleted or damaged."""


class NotAcceptable(BadInput, status=406, code="not-acceptable"):
    """No offered media type satisfies the Accept header."""


class TooSlow(BadInput, status=408, code="request-timeout"):
    """The request did not arrive in time."""


class BodyTooLarge(BadInput, status=413, code="too-large"):
    """The body is too large."""


class TargetTooLong(BadInput, status=414, code="target-too-long"):
    """Path and query are too long."""


class HeadTooLarge(BadInput, status=431, code="head-too-large"):
    """The headers are too large or too many."""


class UnsupportedMedia(BadInput, status=415, code="unsupported-media-type"):
    """The body has an unsupported media type or encoding."""


class ExpectationFailed(BadInput, status=417, code="expectation-failed"):
    """The header Expect asks for something else than 100-continue."""


class KeyReused(BadInput, status=422, code="key-reused"):
    """The Idempotency-Key was used before with another request."""


class Invalid(BadInput, status=422, code="invalid-request"):
    """Fields are out of bounds. `fields`: pairs of a field's name (or "") and a message."""

    def __init__(self, *fields: tuple[str, str]) -> None:
        super().__init__(fields[0][1])
        self.fields = fields


class _Later(ServerError):
    """The same request may succeed after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = {"Retry-After": str(retry_after_s)}


class TooBusy(_Later, status=429, code="queue-full"):
    """The queue is full."""


class QuotaExceeded(TooBusy, status=429, code="quota-exceeded"):
    """The tenant's quota is used up. quota: image-steps per minute. left: image-steps available now."""

    def __init__(self, message: str, retry_after_s: int, quota: int, left: int) -> None:
        super().__init__(message, retry_after_s)
        self.left = left
        policy, state = f'"image-steps";q={quota};w=60', f'"image-steps";r={left};t={retry_after_s}'
        self.headers = {**self.headers, "RateLimit-Policy": policy, "RateLimit": state}


class NotReady(_Later, status=503, code="not-ready"):
    """The server accepts no jobs now: it is loading, draining, or has no engine."""


class StorageFull(_Later, status=503, code="storage-full"):
    """The disk is full or cannot be written."""


class StillRunning(_Later, status=409, code="still-running"):
    """The job with the same Idempotency-Key has not ended. path: where it is."""

    def __init__(self, path: str, retry_after_s: int) -> None:
        super().__init__("the job that came with this Idempotency-Key has not ended", retry_after_s)
        self.headers = {**self.headers, "Location": path}


class TooManyConnections(_Later, status=503, code="too-many-connections"):
    """The limit of connections or websockets is reached."""


class DeadlinePassed(ServerError, status=504, code="deadline-passed"):
    """The job missed, or cannot meet, the client's deadline."""


class JobCancelled(ServerError, status=409, code="cancelled"):
    """The job was cancelled."""


class SampleLost(ServerError, status=500, code="sample-failed"):
    """The engine could not make a picture."""


class ModelChanged(ServerError, status=409, code="model-changed"):
    """The model that the job was accepted for is no longer the served one."""


class ModelBroken(ServerError, status=503, code="model-broken"):
    """The model cannot be loaded; the message says why."""


class StoreRefused(ServerError):
    """The store is damaged, has an unknown version, or has failed."""


class StoreInUse(ServerError):
    """Another server uses the store."""


class SettingsError(ServerError):
    """A DDPM_* variable or a flag is unknown or ill-formed."""


class StartFailed(ServerError):
    """Something unforeseen kept the server from starting."""


class EngineFailed(ServerError, status=503, code="engine-down"):
    """The engine has failed for good. The server ends with `exit_code`."""

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
    StartFailed: EXIT_FAILED,
}


def exit_code(error: Exception) -> int:
    """The exit code of a command that an error ends."""
    return error.exit_code if isinstance(error, EngineFailed) else EXIT_CODES.get(type(error), EXIT_FAILED)


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as an RFC 9457 problem document. errors: `pointer` and `message` of each wrong field."""

    status: int
    code: str
    detail: str
    errors: "list[FieldError]" = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def body(self, request_id: str) -> "ProblemDocument":
        """The members of the `application/problem+json` answer."""
        body: ProblemDocument = {
            "type": f"urn:ddpm:problem:{self.code}",
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
        }
        return {**body, "errors": self.errors} if self.errors else body


class Recalled(ServerError):
    """The stored error of a job that failed before this server started."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def problem(error: Exception) -> Problem:
    """The answer to an error. An unforeseen error reveals nothing."""
    if isinstance(error, Recalled):
        return error.problem
    if type(error) not in ANSWERS:
        return Problem(*UNFORESEEN, "an error that should not have happened; it has been logged under this request id")
    fields = error.fields if isinstance(error, Invalid) else ()
    if isinstance(error, PlanError | ModelNotFound):
        fields = ((error.field, str(error)),)
    errors: list[FieldError] = [{"pointer": f"/{name}" if name else "", "message": message} for name, message in fields]
    headers = error.headers if isinstance(error, ServerError) else {}
    return Problem(*ANSWERS[type(error)], str(error), errors, headers)
