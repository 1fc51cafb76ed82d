"""A job: what was asked for, how far it is, what has come of it. It knows no asyncio but its feed."""

import asyncio
import base64
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from typing import Any, Literal

from model.engine.events import Floats, Picture
from model.sampling.plan import Sampling, timesteps
from model.sampling.schedule import Spacing
from server.jobs import encode
from server.jobs.forecast import Work
from server.jobs.schemas import Frames
from server.jobs.stream import Stream, Subscribers
from server.worker.messages import ModelStatus

Kind = Literal["x_t", "x0"]
SMALL_BYTES = 4096  # up to this a frame is a PNG within 0.1 ms, less than a thread takes to begin
BYTES_OF_MESSAGE, BYTES_OF_JOB = 2_000, 6_000  # a little more than what was measured


def frame_points(frames: Frames, steps: int, most: int) -> tuple[int, ...]:
    """After how many updates frames are shown, 0 first and `steps` last; no more than `most` + 1 of them."""
    if frames.every is not None:
        return tuple(dict.fromkeys([*range(0, steps, frames.every)[: most + 1], steps]))
    assert frames.count is not None
    count = min(frames.count, steps + 1, most + 1)
    return tuple(dict.fromkeys(round(i * steps / (count - 1)) for i in range(count)))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a job has before it: jobs that will be begun earlier, and seconds until its end."""

    position: int = 0
    eta_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Watched:
    """The frames of a job: as asked for, and after which updates that is."""

    frames: Frames
    points: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """A request with every choice made."""

    model: str
    T: int  # of its schedule
    shape: tuple[int, int, int]  # (C, H, W) of a picture
    seed: int
    n: int
    sampling: Sampling
    watched: Watched | None = None
    priority: int = 0
    deadline_s: float | None = None
    wants_floats: bool = False
    owner: str | None = None  # by whose key it came, and who alone may see it

    @property
    def image_steps(self) -> int:
        """The work in it."""
        return self.n * self.sampling.steps

    @property
    def size_bytes(self) -> int:
        """About what it comes to hold in memory, at most: pictures and frames, as much again for their PNGs, and the
        objects around them."""
        channels, height, width = self.shape
        elements = self.n * channels * height * width
        kinds = 1 + (self.watched.frames.kind == "both") if self.watched else 0
        shown = kinds * len(self.watched.points) if self.watched else 0
        pictures = elements * (2 * (shown + 1) + 8 * self.wants_floats)
        return pictures + BYTES_OF_MESSAGE * self.n * (shown + 1) + BYTES_OF_JOB

    def fields(self) -> dict[str, Any]:
        """Every field of the request, defaults filled in."""
        fields = {"model": self.model, "seed": self.seed, "n": self.n, **asdict(self.sampling)}
        fields["frames"] = self.watched.frames.model_dump(exclude_none=True) if self.watched else None
        return fields | {"priority": self.priority, "deadline_s": self.deadline_s}


@dataclass(eq=False)
class Image:
    """A finished picture and the files made of it."""

    index: int
    seed: int
    picture: Picture
    floats: Floats | None
    texts: Mapping[str, str]
    message: int = 0  # its number in the stream

    @cached_property
    def png(self) -> bytes:
        """The PNG, with what made it. Slow at first: call it in a thread."""
        return encode.png(self.picture, self.texts)

    @cached_property
    def sha256(self) -> str:
        """Hash of the PNG."""
        return sha256(self.png).hexdigest()

    @property
    def size_bytes(self) -> int:
        """What it holds in memory, but for its PNG."""
        return self.picture.nbytes + (self.floats.nbytes if self.floats is not None else 0)


@dataclass(frozen=True, slots=True, eq=False)
class StoredImage:
    """A finished picture on disk."""

    index: int
    seed: int
    sha256: str
    message: int
    read: Callable[[], bytes]
    floats: None = None  # are not kept
    size_bytes: int = 0  # in memory

    @property
    def png(self) -> bytes:
        """The PNG. Slow: call it in a thread. Raises Gone."""
        return self.read()

    @property
    def picture(self) -> Picture:
        """What is on it. Slow: call it in a thread. Raises Gone."""
        return encode.pixels(self.read())


@lru_cache(64)
def _levels(T: int, steps: int, spacing: Spacing) -> tuple[int, ...]:
    """The noise level after each number of updates, 0 .. steps."""
    return (*timesteps(T, steps, spacing).tolist(), 0)


@dataclass(eq=False)
class Job:
    """What a client asked for: n pictures of one kind."""

    id: str
    request: ResolvedRequest
    served: ModelStatus
    audience: Subscribers = field(default_factory=Subscribers)
    created_at: float = field(default_factory=time.time)  # to be shown
    arrived: float = field(default_factory=time.time)  # to wait in order, by a clock that does not jump
    started_at: float | None = None
    finished_at: float | None = None
    status: str = "queued"
    steps: list[int] = field(init=False)  # updates that each picture has had, as far as is known
    images: dict[int, Image | StoredImage] = field(default_factory=dict)  # by index; complete if and only if succeeded
    frames: dict[tuple[int, int, Kind], Picture] = field(default_factory=dict)  # by index, step and kind
    failure: Exception | None = None
    error: dict[str, Any] | None = None
    giving_up: bool = False  # somebody has cancelled it
    ending: bool = False  # what has come of it is being written down; nothing changes it any more
    attached: bool = False  # nobody knows its id but a caller who waits
    key: str | None = None  # Idempotency-Key, and the hash of what was sent with it
    fingerprint: str | None = None
    attempt: int = 1  # servers that have had it
    deaths: int = 0  # of servers while it ran
    cached: bool = False  # its pictures were here before
    due: float = math.inf  # when it must have ended, on the event loop's clock
    life: "asyncio.Task[None] | None" = None
    feed: Stream = field(init=False)

    def __post_init__(self) -> None:
        self.steps, self.stream = [0] * self.request.n, Stream(self.id, self.audience)
        sampling = self.request.sampling
        self.levels = _levels(self.request.T, sampling.steps, sampling.spacing)
        self.stream.skip((self.attempt - 1) * self._messages)  # no number is used twice

    def texts(self, seed: int) -> dict[str, str]:
        """All that decides a picture, as text chunks of its PNG."""
        decides = {"model": self.request.model, "digest": self.served.digest, "seed": seed}
        decides |= asdict(self.request.sampling) | {"numerics": self.served.numerics}
        words = {True: "true", False: "false"}
        return {
            key: words.get(v, str(v)) if isinstance(v, bool) else str(v) for key, v in decides.items() if v is not None
        }

    def show_frame(self, index: int, step: int, kind: Kind, picture: Picture | None) -> None:
        """A frame for the viewers, once: a sample that is run again shows nothing twice."""
        if picture is None or (index, step, kind) in self.frames:
            return
        self.frames[index, step, kind] = picture
        level = self.levels[step if kind == "x_t" else step - 1]
        small = picture.nbytes <= SMALL_BYTES
        self.stream.show(self._header(index, step, level, kind), True, partial(encode.png, picture, {}), small)

    def finish(self, image: Image | StoredImage) -> None:
        """A picture is made."""
        self.images[image.index] = image
        self.stream.show(self.header_of(image), False, lambda: image.png)
        if isinstance(image, Image):
            image.message = len(self.stream.kept)

    def header_of(self, image: Image | StoredImage) -> dict[str, Any]:
        """What is said of a finished picture where it is sent."""
        return self._header(image.index, self.request.sampling.steps, 0, "image")

    @property
    def _messages(self) -> int:
        """So many are numbered in a whole stream: `started`, frames, images and the end."""
        watched = self.request.watched
        shown = len(watched.points) * (1 + (watched.frames.kind == "both")) if watched else 0
        return 2 + self.request.n * (1 + shown)

    def _header(self, index: int, step: int, level: int, kind: str) -> dict[str, Any]:
        seed, steps = self.request.seed + index, self.request.sampling.steps
        place = {"index": index, "seed": seed, "step": step, "steps": steps, "t": level}
        return place | {"kind": kind, "image_type": "image/png"}

    @property
    def rank(self) -> float:
        """Its place in the queue, smaller first: the minute it came, less its priority."""
        return self.arrived / 60 - self.request.priority

    @property
    def work(self) -> "Work[Job]":
        """What is left of it."""
        steps = self.request.sampling.steps
        begun = [steps - done for i, done in enumerate(self.steps) if done and i not in self.images]
        waiting = self.request.n - len(self.images) - len(begun)
        return Work(self, begun, waiting, steps, self.rank, self.request.owner or "")

    @property
    def progress(self) -> dict[str, Any]:
        """Where it stands: image-steps done, of all, and the noise level of the picture furthest behind."""
        return {"step": sum(self.steps), "steps": self.request.image_steps, "t": self.levels[min(self.steps)]}

    def encode(self) -> None:
        """Makes the PNGs and their hashes. Slow: call it in a thread."""
        for image in self.images.values():
            image.sha256  # noqa: B018

    @property
    def size_bytes(self) -> int:
        """About what it keeps in memory: pictures, as much again for their PNGs, and the objects around them."""
        pictures = sum(frame.nbytes for frame in self.frames.values())
        pictures += sum(image.size_bytes for image in self.images.values())
        return 2 * pictures + BYTES_OF_MESSAGE * sum(m is not None for m in self.stream.kept) + BYTES_OF_JOB

    def document(self, outlook: Outlook | None = None, pictures: bool = False) -> dict[str, Any]:
        """The job as clients see it; with `pictures`, each image as base64 too. outlook: unless it has ended."""
        made = []
        for index, image in sorted(self.images.items()) if self.status == "succeeded" else []:
            entry: dict[str, Any] = {"index": index, "seed": image.seed, "url": f"/jobs/{self.id}/images/{index}"}
            entry["sha256"] = image.sha256
            if pictures:
                entry["b64_png"] = base64.b64encode(image.png).decode()
            made.append(entry)
        progress = {"step": sum(self.steps), "steps": self.request.image_steps} | asdict(outlook or Outlook())
        return {
            "id": self.id,
            "status": self.status,
            "model": self.request.model,
            "digest": self.served.digest,
            "request": self.request.fields(),
            "created_at": self.created_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "progress": progress,
            "images": made,
            "error": self.error,
        }
