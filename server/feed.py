"""Fan-out to viewers. A job keeps its messages, numbered; a viewer is a place in that list and owns nothing else.

So a viewer that is slow, idle or gone costs nothing, any number of them see the same numbers, and replay is looking at
an earlier place. Messages of the moment (where a job stands) are not kept: only the last one counts.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Body: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """A message in words. Those of the moment carry the number of the last kept message before them."""

    seq: int
    body: Body


@dataclass(slots=True, eq=False)
class Shown:
    """A message with a picture: a frame, or a finished image. It is encoded once, when somebody first asks."""

    seq: int
    header: Body
    passing: bool  # a frame, which a slow viewer may miss
    _encode: Callable[[], bytes]
    _encoding: "asyncio.Future[bytes] | None" = None

    async def png(self) -> bytes:
        """The picture as a PNG."""
        if self._encoding is None:
            self._encoding = asyncio.ensure_future(asyncio.to_thread(self._encode))
        return await asyncio.shield(self._encoding)


Message: TypeAlias = Text | Shown


@dataclass(slots=True)
class Audience:
    """What all feeds of a server count together."""

    viewers: int = 0
    frames: int = 0  # that were kept
    dropped: int = 0  # that slow viewers missed


@dataclass(slots=True)
class Feed:
    """The messages of one job."""

    job: str
    audience: Audience = field(default_factory=Audience)
    kept: list[Message] = field(default_factory=list)  # kept[i].seq == i + 1, always
    ended: bool = False
    viewers: "set[Viewer]" = field(default_factory=set)
    _moment: Body = field(default_factory=dict)
    _moments: int = 0

    def say(self, type: str, **body: Any) -> None:
        """Keeps a message in words."""
        seq = len(self.kept) + 1
        self._keep(Text(seq, {"type": type, "job": self.job, "seq": seq, **body}))

    def show(self, header: Body, passing: bool, encode: Callable[[], bytes]) -> None:
        """Keeps a message with a picture."""
        seq = len(self.kept) + 1
        self.audience.frames += passing
        self._keep(Shown(seq, {"job": self.job, "seq": seq, **header}, passing, encode))

    def tell(self, type: str, **body: Any) -> None:
        """A message of the moment, for those who are there and not behind."""
        self._moment, self._moments = {"type": type, "job": self.job, **body}, self._moments + 1
        self._wake()

    def end(self, type: str, **body: Any) -> None:
        """The last message."""
        self.ended = True
        self.say(type, **body)

    def _keep(self, message: Message) -> None:
        self.kept.append(message)
        self._wake()

    def _wake(self) -> None:
        for viewer in self.viewers:
            viewer.news.set()


class Viewer:
    """Somebody watching a job: `async for message in viewer.messages()`."""

    def __init__(self, feed: Feed, after: int = 0) -> None:
        self.feed, self.news = feed, asyncio.Event()
        self._place = min(after, len(feed.kept))  # how many of the kept messages have been passed
        self._moments = 0
        self._skip_to = 0  # frames before this place are not worth sending any more

    def fell_behind(self) -> None:
        """The last message took long to send: of what has come meanwhile, only the newest frame is worth sending."""
        self._skip_to = len(self.feed.kept) - 1

    async def messages(self) -> AsyncGenerator[Message]:
        """What happens, from the place of this viewer on, to the end."""
        feed = self.feed
        feed.viewers.add(self)
        feed.audience.viewers += 1
        try:
            while True:
                self.news.clear()
                if (gap := self._gap()) is not None:
                    yield gap
                elif self._place < len(feed.kept):
                    self._place += 1
                    yield feed.kept[self._place - 1]
                elif feed.ended:
                    return
                elif self._moments != feed._moments:
                    self._moments = feed._moments
                    yield Text(self._place, feed._moment | {"seq": self._place})
                else:
                    await self.news.wait()
        finally:
            feed.viewers.discard(self)
            feed.audience.viewers -= 1

    def _gap(self) -> Text | None:
        """Passes the frames that are not worth sending; the message that says which."""
        first = self._place
        while self._place < self._skip_to:
            message = self.feed.kept[self._place]
            if not (isinstance(message, Shown) and message.passing):
                break
            self._place += 1
        if self._place == first:
            return None
        self.feed.audience.dropped += self._place - first
        body = {"type": "dropped", "job": self.feed.job, "seq": self._place, "from": first + 1, "to": self._place}
        return Text(self._place, body)
