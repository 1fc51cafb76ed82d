"""What a client does, step by step, with nothing that does it: no socket, no loop, no clock that waits.

A flow is a generator that yields what it needs (ask this, open that, listen, rest) and is sent what came of it, or has
LineBroken thrown into it. `ddpm_client` performs flows, once with threads and once with asyncio; whatever is decided
(when to try again, from which message to go on) is decided here, for both.
"""

import random
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote, urlencode
from uuid import uuid4

from ddpm_client.errors import (
    Answer,
    Busy,
    ClientError,
    LineBroken,
    Refused,
    TimedOut,
    Unreachable,
    refusal_in,
    refused,
)
from ddpm_client.types import NUMBERED, Document, Ended, Event, Picture, Request, event

T = TypeVar("T")
FIRST_REST_S, MOST_REST_S = 0.1, 2.0  # between tries, if the server does not say when
LEAVING_S = 5.0  # that giving a job up may take
POLICY, BAD_REQUEST, UNKNOWN_JOB, DONE = 1008, 4400, 4404, 1000  # close codes
MEDIA = {"gif": "image/gif", "apng": "image/apng", "webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Ask:
    """A request over HTTP. Gives an Answer."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Open:
    """A websocket."""

    path: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Hear:
    """The next message of the websocket. Gives str or bytes."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class HangUp:
    """The end of the websocket."""


@dataclass(frozen=True, slots=True)
class Rest:
    """A pause."""

    seconds: float


Wish: TypeAlias = Ask | Open | Hear | HangUp | Rest
Heard: TypeAlias = Answer | str | bytes | None
Flow: TypeAlias = Generator[Wish, Heard, T]


def job_path(id: str) -> str:
    """Where a job is, whatever somebody takes for its id."""
    return f"/jobs/{quote(id, safe='')}"


class Patience:
    """How long a call goes on without getting anywhere."""

    def __init__(self, timeout_s: float) -> None:
        self._until, self._tries = time.monotonic() + timeout_s, 0

    @property
    def left_s(self) -> float:
        """What is left of it."""
        return max(0.001, self._until - time.monotonic())

    def rest(self, why: ClientError, retry_after_s: float | None = None) -> Flow[None]:
        """A pause before the next try. Raises `why` if it would come too late."""
        pause_s = retry_after_s
        if pause_s is None:
            pause_s = min(MOST_REST_S, FIRST_REST_S * 2**self._tries)
        pause_s *= random.uniform(1, 1.2)  # or all who were sent away together would come back together
        self._tries += 1
        if pause_s >= self._until - time.monotonic():
            raise why
        yield Rest(pause_s)


def ask(
    patience: Patience,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Flow[Answer]:
    """An answer, tried for until there is one: whatever is asked here may be asked twice. Raises ClientError."""
    while True:
        try:
            answer = yield Ask(method, path, body, headers or {}, patience.left_s)
        except LineBroken as broken:
            yield from patience.rest(_why(broken))
            continue
        assert isinstance(answer, Answer)
        if 200 <= answer.status < 300:
            return answer
        yield from _later(patience, refusal_in(answer))


def _later(patience: Patience, refusal: Refused) -> Flow[None]:
    """A pause, if it makes sense to try again. Raises what was refused."""
    if not isinstance(refusal, Busy):
        raise refusal
    yield from patience.rest(refusal, refusal.retry_after_s)


def _why(broken: LineBroken) -> ClientError:
    return TimedOut(str(broken)) if broken.silent else Unreachable(str(broken))


def fetch(timeout_s: float, method: str, path: str, **parameters: str | int | None) -> Flow[Any]:
    """A document."""
    given = urlencode({name: value for name, value in parameters.items() if value is not None})
    answer = yield from ask(Patience(timeout_s), method, f"{path}?{given}" if given else path)
    return answer.json()


def is_ready() -> Flow[bool]:
    """Whether work is taken, asked once."""
    try:
        answer = yield Ask("GET", "/readyz")
    except LineBroken:
        return False
    return isinstance(answer, Answer) and answer.status == 200


def submit(patience: Patience, request: Request, key: str) -> Flow[Document]:
    """A job that is on disk, and is one job however often it is asked for with this key."""
    headers = {"Prefer": "respond-async", "Idempotency-Key": key}
    answer = yield from ask(patience, "POST", "/generate", request, headers)
    document: Document = answer.json()
    return document


def new_key() -> str:
    """An Idempotency-Key."""
    return uuid4().hex


def images(timeout_s: float, document: Document) -> Flow[tuple[Picture, ...]]:
    """The pictures of a job that has succeeded."""
    made = []
    for image in document["images"]:
        answer = yield from ask(Patience(timeout_s), "GET", image["url"])
        made.append(Picture(document["id"], 0, image["index"], image["seed"], answer.body))
    return tuple(made)


def trajectory(timeout_s: float, id: str, media: str) -> Flow[bytes]:
    """The denoising as an animation. media: gif, apng or webp"""
    if media not in MEDIA:
        raise ValueError(f"an animation can be {', '.join(MEDIA)}")
    answer = yield from ask(Patience(timeout_s), "GET", f"{job_path(id)}/trajectory", None, {"Accept": MEDIA[media]})
    return answer.body


class Watching:
    """A job that is watched from message `after` + 1 on, over as many connections as it takes.

    With a request it is a job of its own, asked for when its first event is, and given up by `leave` if it goes on.
    """

    def __init__(self, timeout_s: float, job: str | None, request: Request | None = None, after: int = 0) -> None:
        self.job, self.after, self.ended = job, after, False
        self._timeout_s, self._request, self._key = timeout_s, request, new_key()
        self._asked, self._connected = False, False

    @property
    def _path(self) -> str:
        assert self.job is not None
        return job_path(self.job)

    def next(self) -> Flow[Event | None]:
        """What happens next; None after the end. Raises ClientError if nothing is heard for too long."""
        patience = Patience(self._timeout_s)
        while not self.ended:
            if self.job is None:
                yield from self._submit(patience)
            try:
                if not self._connected:
                    yield Open(f"{self._path}/stream?after={self.after}", patience.left_s)
                    self._connected = True
                message = yield Hear(patience.left_s)
            except LineBroken as broken:
                yield from self._hang_up()
                yield from self._broken(patience, broken)
                continue
            assert isinstance(message, str | bytes)
            if (seen := self._new(event(message))) is not None:
                return seen
        return None

    def _submit(self, patience: Patience) -> Flow[None]:
        assert self._request is not None
        self._asked = True
        try:
            self.job = (yield from submit(patience, self._request, self._key))["id"]
        except Refused:
            self._asked = False  # there is nothing to give up
            raise

    def _new(self, seen: Event | None) -> Event | None:
        """An event, unless it was seen before."""
        if seen is None or (isinstance(seen, NUMBERED) and seen.seq <= self.after):
            return None
        self.after, self.ended = max(self.after, seen.seq), isinstance(seen, Ended)
        return seen

    def _broken(self, patience: Patience, broken: LineBroken) -> Flow[None]:
        """The connection has ended, or there was none. Raises ClientError unless it makes sense to try again."""
        if broken.answer is not None:
            return (yield from _later(patience, refusal_in(broken.answer)))
        if broken.code == DONE:
            self.ended = True  # there is nothing behind `after`
        elif broken.code in (POLICY, BAD_REQUEST, UNKNOWN_JOB):
            status, code = (404, "not-found") if broken.code == UNKNOWN_JOB else (400, "malformed")
            raise refused({"status": status, "code": code, "detail": str(broken)})
        else:
            yield from patience.rest(_why(broken))

    def _hang_up(self) -> Flow[None]:
        if self._connected:
            self._connected = False
            yield HangUp()

    def leave(self) -> Flow[None]:
        """Hangs up; a job of its own that goes on is given up. Says nothing if that cannot be said to anybody."""
        yield from self._hang_up()
        if not self._asked or self.ended:
            return
        self.ended, patience = True, Patience(min(LEAVING_S, self._timeout_s))
        try:
            if self.job is None:  # whether it was taken on is not known; the same key finds it
                yield from self._submit(patience)
            yield from ask(patience, "DELETE", self._path)
        except ClientError:
            return
