"""Fan-out to viewers. A job keeps its messages, numbered; a viewer is a place in that list and owns nothing else.

So a viewer that is slow, idle or gone costs nothing, any number of them see the same numbers, and replay is looking at
an earlier place. Messages of the moment (where a job stands) are not kept: only the last one counts, and the more
viewers a server has, the less often each of them hears one. Whatever is sent is encoded once, however many watch.
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

Body: TypeAlias = dict[str, Any]
MOMENTS_PER_S = 500.0  # messages of the moment, to all viewers of all jobs together


@dataclass(slots=True, eq=False)
class Text:
    """A message in words. Those of the moment carry the number of the last kept message before them."""

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
class Shown:
    """A message with a picture: a frame, or a finished image. It is encoded once, when somebody first asks."""

    seq: int
    header: Body
    passing: bool  # a frame, which a slow viewer may miss
    small: bool  # so small that a thread would cost more than encoding it here
    _encode: Callable[[], bytes]
    _packed: bytes | None = None
    _encoding: "asyncio.Task[None] | None" = None

    async def packed(self) -> bytes:
        """The message as it is sent over a websocket."""
        if self._packed is None and self.small:
            self._pack()
        elif self._packed is None:
            self._encoding = self._encoding or asyncio.create_task(asyncio.to_thread(self._pack))
            await asyncio.shield(self._encoding)
        assert self._packed is not None
        return self._packed

    def _pack(self) -> None:
        self._packed = pack(self.header, self._encode())


Message: TypeAlias = Text | Shown


@dataclass(slots=True)
class Subscribers:
    """What all feeds of a server count together."""

    viewers: int = 0
    frames: int = 0  # that were kept
    dropped: int = 0  # that slow viewers missed

    def pause_s(self) -> float:
        """How long a viewer waits between messages of the moment, so that not all of them wake at once."""
        return self.viewers / MOMENTS_PER_S * random.uniform(0.5, 1.5)


@dataclass(slots=True)
class Stream:
    """The messages of one job."""

    job: str
    audience: Subscribers = field(default_factory=Subscribers)
    kept: list[Message | None] = field(default_factory=list)  # [i] has the number i + 1; None: no longer held
    ended: bool = False
    parked: bool = False  # it goes on when the server has been started anew
    viewers: "set[Subscriber]" = field(default_factory=set)
    moments: int = 0  # how many messages of the moment there were
    _moment: Text | None = None

    def say(self, type: str, **body: Any) -> None:
        """Keeps a message in words."""
        seq = len(self.kept) + 1
        self._keep(Text(seq, {"type": type, "job": self.job, "seq": seq, **body}))

    def show(self, header: Body, passing: bool, encode: Callable[[], bytes], small: bool = False) -> None:
        """Keeps a message with a picture."""
        seq = len(self.kept) + 1
        self.audience.frames += passing
        self._keep(Shown(seq, {"job": self.job, "seq": seq, **header}, passing, small, encode))

    def tell(self, type: str, urgent: bool = False, **body: Any) -> None:
        """A message of the moment, for those who are not behind. urgent: even for those who heard one lately."""
        seq, now = len(self.kept), time.monotonic()
        self._moment, self.moments = Text(seq, {"type": type, "job": self.job, "seq": seq, **body}), self.moments + 1
        for viewer in self.viewers:
            if urgent or viewer.due <= now:
                viewer.due = now
                viewer.news.set()

    def remind(self) -> None:
        """Those who were not due when something was told of the moment may hear it now."""
        now = time.monotonic()
        for viewer in self.viewers:
            if viewer.due <= now and viewer.heard < self.moments:
                viewer.news.set()

    def moment(self, place: int) -> Text | None:
        """The last message of the moment, for a viewer at this place."""
        if self._moment is not None and self._moment.seq != place:
            self._moment = Text(place, self._moment.body | {"seq": place})
        return self._moment

    def end(self, type: str, **body: Any) -> None:
        """The last message."""
        self.ended = True
        self.say(type, **body)

    def skip(self, count: int) -> None:
        """So many numbers were given to messages that are no longer held."""
        self.kept += [None] * count

    def park(self) -> None:
        """Nothing more will be said by this server."""
        self.parked = True
        for viewer in self.viewers:
            viewer.news.set()

    def _keep(self, message: Message) -> None:
        self.kept.append(message)
        if self._moment is not None and self._moment.body["type"] != "progress":
            self._moment = None  # it does not wait any more, and is not being restarted
        for viewer in self.viewers:
            viewer.news.set()


def told_of(error: Exception, request_id: str, feed: Stream | None = None) -> Text:
    """The message of the moment that says why there is no stream; or, with a feed, why no more of it is told here."""
    job, seq = (feed.job, len(feed.kept)) if feed is not None else (None, 0)
    return Text(seq, {"type": "error", "job": job, "seq": seq, "problem": problem(error).body(request_id)})


class Subscriber:
    """Somebody watching a job: `async for message in viewer.messages()`."""

    def __init__(self, feed: Stream, after: int = 0) -> None:
        self.stream, self.news = feed, asyncio.Event()
        self.due = 0.0  # when it may hear the next message of the moment
        self._place = min(after, len(feed.kept))  # how many of the kept messages have been passed
        self.heard = 0  # how many messages of the moment there were when it heard one
        self._skip_to = 0  # frames before this place are not worth sending any more

    def fell_behind(self) -> None:
        """The last message took long to send: of the frames of a job that goes on, only the newest is worth sending."""
        if not self.stream.ended:
            self._skip_to = len(self.stream.kept) - 1

    async def messages(self) -> AsyncGenerator[Message]:
        """What happens, from the place of this viewer on, to the end."""
        feed = self.stream
        feed.viewers.add(self)
        feed.audience.viewers += 1
        try:
            while True:
                self.news.clear()
                if (gap := self._gap()) is not None:
                    yield gap
                elif self._place < len(feed.kept):
                    self._place += 1
                    yield feed.kept[self._place - 1] or self._resync()
                elif feed.ended or feed.parked:
                    return
                elif self.heard < feed.moments and self.due <= time.monotonic() and (now := feed.moment(self._place)):
                    self.heard, self.due = feed.moments, time.monotonic() + feed.audience.pause_s()
                    yield now
                else:
                    await self.news.wait()
        finally:
            feed.viewers.discard(self)
            feed.audience.viewers -= 1

    def _resync(self) -> Text:
        """Passes the messages that are no longer held; the message that stands in for them."""
        while self._place < len(self.stream.kept) and self.stream.kept[self._place] is None:
            self._place += 1
        return Text(self._place, {"type": "resync", "job": self.stream.job, "seq": self._place})

    def _gap(self) -> Text | None:
        """Passes the frames that are not worth sending; the message that says which."""
        first = self._place
        while self._place < self._skip_to:
            message = self.stream.kept[self._place]
            if not (isinstance(message, Shown) and message.passing):
                break
            self._place += 1
        if self._place == first:
            return None
        self.stream.audience.dropped += self._place - first
        body = {"type": "dropped", "job": self.stream.job, "seq": self._place, "from": first + 1, "to": self._place}
        return Text(self._place, body)
