"""Fan-out to subscribers. A job keeps its messages, numbered; a subscriber is a cursor in that list and no more.

So a subscriber that is slow, idle or gone costs nothing, any number of them see the same numbers, and replay is moving
the cursor back. Transient messages (queued, progress) are not kept: only the last one counts, and the more subscribers
a server has, the less often each of them is sent one. Every message is encoded once, however many watch.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ddpm_client.wire import pack

from server.errors import problem
from server.troubles import LACKING, shortage, too_little

Body: TypeAlias = dict[str, Any]
TRANSIENT_PER_S = 500.0  # transient messages, to all subscribers of all jobs together


@dataclass(slots=True, eq=False)
class TextMessage:
    """A JSON message. A transient one carries the number of the last kept message before it."""

    seq: int
    body: Body
    _json: str = ""

    @property
    def json(self) -> str:
        """The message as it is sent."""
        if not self._json:
            self._json = json.dumps(self.body)
        return self._json


@dataclass(slots=True, eq=False)
class PictureMessage:
    """A message with a picture: a frame, or a finished image. It is encoded when the first subscriber needs it."""

    seq: int
    header: Body
    passing: bool  # a frame, which a slow subscriber may miss
    small: bool  # so small that a thread would cost more than encoding it here
    _encode: Callable[[], bytes]
    done: int = 0  # image-steps of the job, when this was kept
    _packed: bytes | None = None
    _encoding: "asyncio.Task[None] | None" = None

    async def packed(self) -> bytes:
        """The message as it is sent over a websocket."""
        if self._packed is None and self.small:
            self._pack()
        elif self._packed is None:
            if self._encoding is None or self._encoding.done():  # one that failed may succeed the next time
                self._encoding = asyncio.create_task(asyncio.to_thread(self._pack))
            try:
                await asyncio.shield(self._encoding)
            except LACKING as error:
                if (resource := shortage(error)) is None:
                    raise
                raise too_little(resource) from None
        assert self._packed is not None
        return self._packed

    def _pack(self) -> None:
        self._packed = pack(self.header, self._encode())


Message: TypeAlias = TextMessage | PictureMessage


@dataclass(slots=True)
class StreamCounts:
    """What all streams of a server count together, and where clients find that server."""

    prefix: str = ""  # of the paths that they are told
    subscribers: int = 0
    frames: int = 0  # kept
    dropped: int = 0  # missed by slow subscribers

    def pause_s(self) -> float:
        """How long a subscriber waits between transient messages, so that not all of them wake at once."""
        return self.subscribers / TRANSIENT_PER_S * random.uniform(0.5, 1.5)


@dataclass(slots=True)
class Stream:
    """The messages of one job."""

    job: str
    counts: StreamCounts = field(default_factory=StreamCounts)
    kept: list[Message | None] = field(default_factory=list)  # [i] has the number i + 1; None: no longer held
    closed: bool = False  # this server adds no more messages
    subscribers: "set[Subscriber]" = field(default_factory=set)
    transients: int = 0  # how many transient messages there were
    _transient: TextMessage | None = None

    def text(self, seq: int, type: str, **body: Any) -> TextMessage:
        """A JSON message with this number."""
        return TextMessage(seq, {"type": type, "job": self.job, "seq": seq, **body})

    def keep_text(self, type: str, **body: Any) -> None:
        """Keeps a JSON message."""
        self._keep(self.text(len(self.kept) + 1, type, **body))

    def keep_picture(
        self, header: Body, passing: bool, encode: Callable[[], bytes], small: bool = False, done: int = 0
    ) -> None:
        """Keeps a message with a picture."""
        seq = len(self.kept) + 1
        if passing:
            self.counts.frames += 1
        self._keep(PictureMessage(seq, {"job": self.job, "seq": seq, **header}, passing, small, encode, done))

    def send_transient(self, type: str, urgent: bool = False, **body: Any) -> None:
        """A transient message, for subscribers that are not behind. urgent: for those that had one lately, too."""
        self._transient, now = self.text(len(self.kept), type, **body), time.monotonic()
        self.transients += 1
        for subscriber in self.subscribers:
            if urgent or subscriber.due <= now:
                subscriber.due = now
                subscriber.news.set()

    def remind(self) -> None:
        """Wakes subscribers that were not due when the last transient message came, and are now."""
        for subscriber in self.subscribers:
            if subscriber.is_due():
                subscriber.news.set()

    def transient(self, cursor: int) -> TextMessage | None:
        """The last transient message, for a subscriber at this cursor."""
        if self._transient is not None and self._transient.seq != cursor:
            self._transient = TextMessage(cursor, self._transient.body | {"seq": cursor})
        return self._transient

    def drop_transient(self) -> None:
        """Forgets the last transient message, which is not true any more."""
        self._transient = None

    def end(self, type: str, **body: Any) -> None:
        """Keeps the last message."""
        self.closed = True
        self.keep_text(type, **body)

    def skip_to(self, seq: int) -> None:
        """The next message has this number: those before it are no longer held."""
        self.kept += [None] * (seq - 1 - len(self.kept))

    def close(self) -> None:
        """Ends the stream of a job that has not ended: this server adds no more to it."""
        self.closed = True
        self._wake()

    def _keep(self, message: Message) -> None:
        self.kept.append(message)
        before, self._transient = self._transient, None  # it told of the moment before
        if before is not None and before.body["type"] == "progress" and isinstance(message, PictureMessage):
            step = max(before.body["step"], message.done)
            self._transient = TextMessage(message.seq, before.body | {"seq": message.seq, "step": step})
        self._wake()

    def _wake(self) -> None:
        for subscriber in self.subscribers:
            subscriber.news.set()


def error_message(error: Exception, request_id: str, stream: Stream | None = None) -> TextMessage:
    """The transient message that says why there is no stream; or, with a stream, why it goes no further."""
    job, seq = (stream.job, len(stream.kept)) if stream is not None else (None, 0)
    return TextMessage(seq, {"type": "error", "job": job, "seq": seq, "problem": problem(error).body(request_id)})


class Subscriber:
    """Watches a job: `async for message in subscriber.messages()`."""

    def __init__(self, stream: Stream, after: int = 0) -> None:
        self.stream, self.news = stream, asyncio.Event()
        self.due = 0.0  # when it may be sent the next transient message
        self.heard = 0  # how many transient messages there were when it was sent one
        self._cursor = after if after <= len(stream.kept) else -1  # how many of the kept messages it has passed
        self._skip_to = -1  # frames before this number are not worth sending any more
        self._done = 0  # image-steps of which it has been told, since the engine was last said to restart

    def fell_behind(self) -> None:
        """The last message took long to send: of the frames of a stream that goes on, only the newest is worth it."""
        if not self.stream.closed:
            self._skip_to = len(self.stream.kept) - 1

    async def messages(self) -> AsyncGenerator[Message]:
        """All messages from the cursor on, until the stream is closed."""
        stream = self.stream
        stream.subscribers.add(self)
        stream.counts.subscribers += 1
        try:
            while True:
                self.news.clear()
                if (gap := self._gap()) is not None:
                    yield gap
                elif self._cursor < len(stream.kept):
                    message = stream.kept[self._cursor] if self._cursor >= 0 else None  # -1: those of another history
                    self._cursor += 1
                    if isinstance(message, PictureMessage):
                        self._done = max(self._done, message.done)
                    yield message or self._resync()
                elif stream.closed:
                    return
                elif self.is_due() and (now := stream.transient(self._cursor)) is not None and self._follows(now):
                    self.heard, self.due = stream.transients, time.monotonic() + stream.counts.pause_s()
                    yield now
                else:
                    await self.news.wait()
        finally:
            stream.subscribers.discard(self)
            stream.counts.subscribers -= 1

    def _follows(self, now: TextMessage) -> bool:
        """Notes how far the job is by a transient message. Returns whether that is true behind what was told before."""
        done: int = now.body.get("step", 0)
        if now.body["type"] == "progress" and done < self._done:
            return False
        self._done = done
        return True

    def is_due(self) -> bool:
        """Whether there is a transient message that it may be sent now."""
        return self.heard < self.stream.transients and self.due <= time.monotonic()

    def _resync(self) -> TextMessage:
        """Passes the messages that are no longer held; the message that stands in for them."""
        while self._cursor < len(self.stream.kept) and self.stream.kept[self._cursor] is None:
            self._cursor += 1
        return self.stream.text(self._cursor, "resync")

    def _gap(self) -> TextMessage | None:
        """Passes the frames that are not worth sending; the message that says which."""
        first = self._cursor
        while self._cursor < self._skip_to:
            message = self.stream.kept[self._cursor]
            if not (isinstance(message, PictureMessage) and message.passing):
                break
            self._cursor += 1
        if self._cursor == first:
            return None
        self.stream.counts.dropped += self._cursor - first
        return self.stream.text(self._cursor, "dropped", **{"from": first + 1, "to": self._cursor})
