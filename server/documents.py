"""What clients receive as JSON. The makers of documents return these types, and `/openapi.json` is made of them."""

from typing import Annotated, Literal, NotRequired, TypeAlias

from pydantic import Field
from typing_extensions import TypedDict

from model.sampling.schedule import Spacing, Variance
from model.sampling.table import Noise

Kind: TypeAlias = Literal["x_t", "x0"]
DeliveryState: TypeAlias = Literal["pending", "delivered", "gone", "failed"]
Status: TypeAlias = Literal["queued", "running", "succeeded", "failed", "cancelled"]
JobId: TypeAlias = Annotated[str, Field(description="the job's id")]
Base64: TypeAlias = Annotated[str, Field(description="the PNG in base64")]
EtaS: TypeAlias = Annotated[float, Field(description="seconds until the job is done")]
Level: TypeAlias = Annotated[int, Field(description="noise level, T .. 0")]


class FieldError(TypedDict):
    """What is wrong with one field."""

    pointer: Annotated[str, Field(description="where it is in the body (RFC 6901), or its name in the URL; or empty")]
    message: Annotated[str, Field(description="what was given and what is allowed")]


class ProblemDocument(TypedDict):
    """Why a request was refused or a job failed (RFC 9457)."""

    type: Annotated[str, Field(description="`urn:ddpm:problem:` and the code")]
    title: Annotated[str, Field(description="the status in words")]
    status: Annotated[int, Field(description="the HTTP status")]
    detail: Annotated[str, Field(description="what was given and what is allowed")]
    code: Annotated[str, Field(description="the kind of problem")]
    request_id: Annotated[str, Field(description="X-Request-Id of the answer")]
    errors: NotRequired[Annotated[list[FieldError], Field(description="of 422: every wrong field")]]


class FramesDocument(TypedDict):
    """Which states of a picture are shown: after every so many steps, or so many in all."""

    every: NotRequired[int]
    count: NotRequired[int]
    kind: Literal["x_t", "x0", "both"]


class RequestDocument(TypedDict):
    """Every field of the request, defaults filled in."""

    model: str
    seed: int
    n: int
    sampler: str
    steps: int
    order: Annotated[int | None, Field(description="of a sampler that has several")]
    timesteps: Annotated[list[int] | None, Field(description="the levels, if they were given or a plan has them")]
    plan: str | None
    spacing: Annotated[Spacing | None, Field(description="null beside timesteps")]
    labels: Annotated[list[int] | None, Field(description="of each picture; null: none was asked for")]
    guidance: Annotated[float | None, Field(description="of pictures with a label; 1: none")]
    guidance_interval: Annotated[list[int] | None, Field(description="the highest and the lowest level with guidance")]
    clip: bool
    noise: Noise
    variance: Variance | None
    eta: float | None
    frames: FramesDocument | None
    priority: int
    deadline_s: float | None
    webhook: str | None


class ProgressDocument(TypedDict):
    """How far a job is."""

    step: Annotated[int, Field(description="updates of pictures done")]
    steps: Annotated[int, Field(description="updates in all: n × steps")]
    position: Annotated[int, Field(description="jobs that will start earlier")]
    eta_s: EtaS


class ImageDocument(TypedDict):
    """A finished picture of a job."""

    index: int
    seed: int
    url: Annotated[str, Field(description="where the PNG is")]
    sha256: Annotated[str, Field(description="hash of the PNG")]


class ImageWithPng(ImageDocument):
    """A finished picture of a job, with its PNG."""

    b64_png: Base64


class WebhookDocument(TypedDict):
    """How far the delivery of a job's webhook is."""

    state: DeliveryState
    attempts: int
    last_status: Annotated[int | None, Field(description="of the receiver's last answer")]
    last_error: Annotated[str | None, Field(description="why there was no answer")]
    delivered_at: Annotated[float | None, Field(description="seconds since 1970")]


class WebhookSecret(TypedDict):
    """What signs the caller's webhooks."""

    secret: Annotated[str, Field(description="`whsec_` and base64, as Standard Webhooks has it")]


class _Job(TypedDict):
    id: JobId
    status: Status
    model: str
    digest: Annotated[str, Field(description="of the model directory")]
    request: RequestDocument
    created_at: Annotated[float, Field(description="seconds since 1970")]
    started_at: float | None
    finished_at: float | None
    progress: ProgressDocument
    error: Annotated[ProblemDocument | None, Field(description="of a failed job")]
    webhook: Annotated[WebhookDocument | None, Field(description="of a job that has one")]


class JobDocument(_Job):
    """A job."""

    images: Annotated[list[ImageDocument], Field(description="of a succeeded job")]


class JobWithPngs(_Job):
    """A job that has succeeded, with its pictures."""

    images: list[ImageWithPng]


class JobPage(TypedDict):
    """Jobs, newest first."""

    jobs: list[JobDocument]


class _Message(TypedDict):
    job: JobId
    seq: Annotated[int, Field(description="the number of the message, or of the last numbered one before it")]


class QueuedMessage(_Message):
    """The job waits."""

    type: Literal["queued"]
    position: Annotated[int, Field(description="jobs that will start earlier")]
    eta_s: EtaS


class StartedMessage(_Message):
    """The job has started. Numbered."""

    type: Literal["started"]
    steps: Annotated[int, Field(description="updates of pictures in all")]


class ProgressMessage(_Message):
    """How far the job is, in updates of its pictures."""

    type: Literal["progress"]
    step: int
    steps: int
    t: Level
    eta_s: EtaS


DroppedMessage = TypedDict(
    "DroppedMessage", {"job": JobId, "seq": int, "type": Literal["dropped"], "from": int, "to": int}
)
DroppedMessage.__doc__ = "Frames `from` .. `to` were left out, because this client reads too slowly."


class RestartingMessage(_Message):
    """The engine is being replaced; the pictures run again, to the same bytes."""

    type: Literal["restarting"]
    retry_after_s: float


class ResyncMessage(_Message):
    """The server no longer holds the messages up to `seq`."""

    type: Literal["resync"]


class EndedMessage(_Message):
    """The last message. Numbered."""

    type: Literal["succeeded", "failed", "cancelled"]
    document: JobDocument


class PongMessage(_Message):
    """The answer to a ping, on websockets."""

    type: Literal["pong"]


class ErrorMessage(TypedDict):
    """Why a request was refused (then `job` is null), or why this server sends no more of the job."""

    type: Literal["error"]
    job: str | None
    seq: int
    problem: ProblemDocument


TextDocument: TypeAlias = Annotated[
    QueuedMessage
    | StartedMessage
    | ProgressMessage
    | DroppedMessage
    | RestartingMessage
    | ResyncMessage
    | EndedMessage
    | PongMessage
    | ErrorMessage,
    Field(discriminator="type"),
]


class PictureHeader(_Message):
    """A frame, or a finished picture. Numbered. On a websocket it stands before the PNG, in the same binary message."""

    index: Annotated[int, Field(description="which of the n pictures")]
    seed: Annotated[int, Field(description="of this picture")]
    step: Annotated[int, Field(description="updates done; 0: pure noise")]
    steps: int
    t: Level
    kind: Annotated[Literal["x_t", "x0", "image"], Field(description="image: the finished picture")]
    image_type: Literal["image/png"]


class PictureEvent(PictureHeader):
    """A frame, or a finished picture, as a server-sent event."""

    b64_png: Base64


class ClientMessage(TypedDict):
    """What a client may send on a websocket."""

    type: Literal["cancel", "ping"]
