"""What the client sends and when it retries, without any I/O.

A flow is a generator. It yields effects (send this request, receive the next message, sleep) and gets the reply of
each, or has a ClientError thrown into it. asyncio.py and threads.py perform the effects and decide nothing.
"""

import random
import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote, urlencode
from uuid import uuid4

from ddpm_client import types
from ddpm_client.errors import Busy, ClientError, Refused, Response, Unreachable, refusal_in
from ddpm_client.types import ENDS, NUMBERED, Document, Ended, Event, Frame, OnEvent, Picture, Pictures, Request

T = TypeVar("T")
Animation: TypeAlias = Literal["gif", "apng", "webp"]
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0  # between tries, if the server gives no Retry-After
CANCEL_S = 5.0  # for cancelling an abandoned job
LOOK_S = 2.0  # for each request of a notebook that displays a job


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """An HTTP request. Its reply is a Response."""

    path: str
    method: str = "GET"
    json: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Receive:
    """The next message of the websocket at this path, which is opened first if it is not open.

    Its reply is the message, or None if the server closed the websocket because there are no more.
    """

    path: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Close:
    """Closes the websocket if it is open."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """A pause between two tries."""

    seconds: float


Effect: TypeAlias = Send | Receive | Close | Sleep
Reply: TypeAlias = Response | str | bytes | None
Flow: TypeAlias = Generator[Effect, Reply, T]


class Retry:
    """The time that a call may take without progress, and the pauses between its tries."""

    def __init__(self, timeout_s: float) -> None:
        self._deadline, self._tries = time.monotonic() + timeout_s, 0

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, always positive."""
        return max(0.001, self._deadline - time.monotonic())

    def after(self, error: ClientError) -> Flow[None]:
        """Sleeps before the next try. Raises `error` if it is final, or if the pause would pass the deadline."""
        if isinstance(error, Refused) and not isinstance(error, Busy):
            raise error
        pause_s = error.retry_after_s if isinstance(error, Refused) else None
        if pause_s is None:
            pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2**self._tries)
        pause_s *= random.uniform(1, 1.2)  # so that clients refused together do not return together
        self._tries += 1
        if pause_s >= self._deadline - time.monotonic():
            raise error
        yield Sleep(pause_s)


def job_path(id: str) -> str:
    """The path of a job. An id may be any text, since it may come from a user."""
    return f"/jobs/{quote(id, safe='')}"


def send(retry: Retry, request: Send) -> Flow[Response]:
    """A successful response. May send the request several times, so it must be idempotent. Raises ClientError."""
    while True:
        try:
            response = yield replace(request, timeout_s=retry.left_s)
            assert isinstance(response, Response)
            if 200 <= response.status < 300:
                return response
            raise refusal_in(response)
        except ClientError as error:
            yield from retry.after(error)


def fetch(timeout_s: float, path: str, method: str = "GET", **parameters: str | int | None) -> Flow[Document]:
    """The JSON document at this path."""
    query = urlencode({name: value for name, value in parameters.items() if value is not None})
    request = Send(path=f"{path}?{query}" if query else path, method=method)
    return (yield from send(Retry(timeout_s), request)).json()


def ready() -> Flow[bool]:
    """Whether the server accepts jobs. Never retries."""
    with suppress(ClientError):
        response = yield Send(path="/readyz")
        return isinstance(response, Response) and response.status == 200
    return False


def submit(retry: Retry, request: Request, key: str | None = None) -> Flow[Document]:
    """The document of a new job; of the same job if the same idempotency key is used again."""
    headers = {"Prefer": "respond-async", "Idempotency-Key": key or uuid4().hex}
    return (yield from send(retry, Send(path="/generate", method="POST", json=request, headers=headers))).json()


def images(timeout_s: float, document: Document) -> Flow[tuple[Picture, ...]]:
    """The pictures of a job that has succeeded."""
    pictures = []
    for place, image in enumerate(document["images"]):
        path = f"{job_path(document['id'])}/images/{place}"  # `url` may have the prefix that the server's address has
        png = (yield from send(Retry(timeout_s), Send(path=path))).body
        pictures.append(Picture(document["id"], 0, index=image["index"], seed=image["seed"], png=png))
    return tuple(pictures)


def trajectory(timeout_s: float, id: str, media: Animation) -> Flow[bytes]:
    """The denoising as an animation."""
    request = Send(path=f"{job_path(id)}/trajectory", headers={"Accept": f"image/{media}"})
    return (yield from send(Retry(timeout_s), request)).body


def look(document: Document, pictures: tuple[Picture, ...]) -> Flow[tuple[Document, tuple[Picture, ...]]]:
    """A job as it is now, for display; as it was before if the server does not answer soon."""
    with suppress(ClientError):  # a notebook shows the last known state instead of an error
        if document["status"] not in ENDS:
            document = yield from fetch(LOOK_S, job_path(document["id"]))
        if document["status"] == "succeeded" and not pictures:
            pictures = yield from images(LOOK_S, document)
    return document, pictures


class Subscription:
    """The events of a job from message `after` + 1 on, over as many connections as needed.

    With a request, the first `next` submits the job, and `leave` cancels it unless it has ended.
    """

    def __init__(self, timeout_s: float, job: str | None, request: Request | None = None, after: int = 0) -> None:
        self.job, self.after, self.ended = job, after, False
        self._timeout_s, self._request, self._key, self._submitted = timeout_s, request, uuid4().hex, False

    def next(self) -> Flow[Event | None]:
        """The next event; None after the end. Raises ClientError if the server is silent for too long."""
        retry = Retry(self._timeout_s)
        while not self.ended:
            path = yield from self._path(retry)
            try:
                message = yield Receive(f"{path}/stream?after={self.after}", retry.left_s)
            except ClientError as error:
                yield Close()
                yield from retry.after(error)
                continue
            assert not isinstance(message, Response)
            seen = types.event(message) if message is not None else None
            self.ended = message is None or isinstance(seen, Ended)
            if seen is not None and not (isinstance(seen, NUMBERED) and seen.seq <= self.after):  # not a repetition
                self.after = max(self.after, seen.seq)
                return seen
        return None

    def result(self, on_event: OnEvent) -> Flow[Pictures]:
        """The result of the job, once it has ended. Raises Failed, Cancelled, ClientError."""
        pictures: dict[int, Picture] = {}
        frames: dict[tuple[int, int, str], Frame] = {}  # a frame that is made twice is the same
        while (event := (yield from self.next())) is not None:
            on_event(event)
            match event:
                case Picture():
                    pictures[event.index] = event
                case Frame():
                    frames[event.index, event.step, event.kind] = event
                case Ended():
                    types.raise_for(event.document)
                    in_order = tuple(pictures[index] for index in sorted(pictures))
                    return Pictures(event.document, in_order, tuple(frames.values()))
        raise Unreachable("the stream ended before the job did")

    def leave(self) -> Flow[None]:
        """Closes the websocket and cancels the job if this subscription submitted it. Raises no ClientError."""
        with suppress(ClientError):
            yield Close()
            if self._submitted and not self.ended:
                self.ended, retry = True, Retry(min(CANCEL_S, self._timeout_s))
                path = yield from self._path(retry)  # if the id is unknown, the same key finds the job
                yield from send(retry, Send(path=path, method="DELETE"))

    def _path(self, retry: Retry) -> Flow[str]:
        """The job's path. Submits the job first if it has no id yet."""
        if self.job is None:
            assert self._request is not None
            self._submitted = True
            try:
                self.job = (yield from submit(retry, self._request, self._key))["id"]
            except Refused:
                self._submitted = False  # there is no job to cancel
                raise
        return job_path(str(self.job))
