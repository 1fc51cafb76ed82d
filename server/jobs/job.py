"""A job: what was asked for, how far it is, and its one state.

queued ──> running ──> ending ──> succeeded | failed | cancelled
   └──────────┴───────────┴────> parked: it is on disk, and the next server runs it
"""

import asyncio
import base64
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache, cached_property, lru_cache, partial
from hashlib import sha256
from typing import Any

from model.engine.events import Floats, Picture
from model.sampling.plan import levels
from model.sampling.samplers import Sampling
from server.documents import ImageDocument, ImageWithPng, JobDocument, Kind, ProblemDocument, Status
from server.jobs import encode
from server.jobs.request import JOB_BYTES, MESSAGE_BYTES, ResolvedRequest
from server.jobs.stream import Stream, StreamCounts
from server.store.records import Delivery
from server.worker.messages import ModelStatus

SMALL_BYTES = 4096  # up to this a frame is a PNG within 0.1 ms, less than a thread takes to begin


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDING = "ending"  # its result is being written down; nothing changes it any more
    PARKED = "parked"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.ENDING, State.PARKED}),
    State.RUNNING: frozenset({State.ENDING, State.PARKED}),
    State.ENDING: ENDED | {State.PARKED},
}


@dataclass(frozen=True, slots=True)
class Eta:
    """Jobs that will be begun before a job, and seconds until its end."""

    position: int = 0
    eta_s: float = 0.0


@dataclass(eq=False, kw_only=True)
class Image:
    """A finished picture: in memory since it was made, or on disk."""

    index: int
    seed: int
    read: Callable[[], bytes]  # makes its PNG at the first call, or reads it from disk at each
    known_sha256: str = ""  # of a PNG on disk
    pixels: Picture | None = None  # in memory
    floats: Floats | None = None
    texts: Mapping[str, str] = field(default_factory=dict)  # in the PNG that is to be made
    message: int = 0  # its number in the stream

    @classmethod
    def made(cls, index: int, seed: int, picture: Picture, floats: Floats | None, texts: Mapping[str, str]) -> "Image":
        """A picture that has just been made. texts: what made it."""
        read = cache(partial(encode.png, picture, texts))
        return cls(index=index, seed=seed, read=read, pixels=picture, floats=floats, texts=texts)

    @property
    def png(self) -> bytes:
        """The PNG. Slow: call it in a thread. Raises Gone."""
        return self.read()

    @cached_property
    def sha256(self) -> str:
        """Hash of the PNG. Slow at first."""
        return self.known_sha256 or sha256(self.read()).hexdigest()

    @property
    def picture(self) -> Picture:
        """Its pixels. Slow: call it in a thread. Raises Gone."""
        return self.pixels if self.pixels is not None else encode.pixels(self.read())

    @property
    def size_bytes(self) -> int:
        """Memory that it holds, without its PNG."""
        return sum(array.nbytes for array in (self.pixels, self.floats) if array is not None)


@lru_cache(64)
def _levels(T: int, sampling: Sampling) -> tuple[int, ...]:
    """The noise level after each number of updates, 0 .. steps."""
    return tuple(levels(T, sampling).tolist())


@dataclass(eq=False, kw_only=True)
class Job:
    """What a client asked for: n pictures of one kind."""

    id: str
    request: ResolvedRequest
    model: ModelStatus  # what makes its pictures
    counts: StreamCounts = field(default_factory=StreamCounts)
    created_at: float = field(default_factory=time.time)  # wall clock, to be shown
    arrived: float = field(default_factory=time.time)  # by a clock that does not jump, to wait in order
    attached: bool = False  # only a caller who waits for the answer knows of it
    key: str | None = None  # Idempotency-Key, and the fingerprint of what came with it
    fingerprint: str | None = None
    attempt: int = 1  # servers that have had it
    deaths: int = 0  # of servers, while it was running
    cached: bool = False  # answered with pictures that were made before
    state: State = State.QUEUED  # changed by `move` alone
    started_at: float | None = None
    finished_at: float | None = None
    steps: list[int] = field(init=False)  # updates that each picture has had, as far as is known
    images: dict[int, Image] = field(default_factory=dict)  # by index; complete if it has succeeded
    frames: dict[tuple[int, int, Kind], Picture] = field(default_factory=dict)  # by index, step and kind
    failure: Exception | None = None  # why it ends, unless it succeeds
    error: ProblemDocument | None = None  # the failure as clients see it
    delivery: Delivery | None = None  # of its webhook, if it has one
    due: float = math.inf  # its deadline on the event loop's clock
    task: "asyncio.Task[None] | None" = None  # which runs it
    stream: Stream = field(init=False)

    def __post_init__(self) -> None:
        self.steps, self.stream = [0] * self.request.n, Stream(self.id, self.counts)
        self.updates = self.request.updates
        if self.request.webhook is not None:
            self.delivery = Delivery.to(self.request.webhook)
        self.rank = self.arrived / 60 - self.request.priority  # smaller is seated first
        messages = 2 + self.request.n * (1 + self.request.frame_count)  # started, frames, images, the end
        self.stream.skip_to((self.attempt - 1) * messages + 1)  # no number is used twice

    @property
    def levels(self) -> tuple[int, ...]:
        """The noise level of a picture after each number of updates."""
        return _levels(self.request.T, self.request.sampling)

    def work_of(self, steps: int) -> int:
        """The work in so many updates of pictures, in image-steps."""
        return 2 * steps if self.request.sampling.guided else steps

    def move(self, to: State) -> None:
        """Changes its state. Only the runner does."""
        assert to in MOVES.get(self.state, ()), f"a job that is {self.state} cannot become {to}"
        self.state = to

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.state in ENDED

    @property
    def status(self) -> Status:
        """Its state as clients see it."""
        if self.ended:
            return self.state.value  # type: ignore[return-value]
        return "queued" if self.started_at is None else "running"

    @property
    def path(self) -> str:
        """Where clients find it."""
        return f"{self.counts.prefix}/jobs/{self.id}"

    def texts(self, seed: int) -> dict[str, str]:
        """All that decides a picture, as text chunks of its PNG."""
        decides = {"model": self.request.model, "digest": self.model.digest, "seed": seed}
        if self.request.labels is not None:
            decides["label"] = self.request.labels[seed - self.request.seed]
        decides |= asdict(self.request.sampling) | {"numerics": self.model.numerics}
        known = {key: value for key, value in decides.items() if value is not None}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}

    @property
    def sheet_texts(self) -> dict[str, str]:
        """The same of all its pictures, for a sheet of them."""
        texts, labels = self.texts(self.request.seed) | {"n": str(self.request.n)}, self.request.labels
        if labels is not None and len({*labels}) > 1:
            del texts["label"]  # which is that of the first picture
            texts["labels"] = json.dumps(labels)
        return texts

    def show_frame(self, index: int, step: int, kind: Kind, picture: Picture | None) -> None:
        """Sends a frame to subscribers, once: a sample that is run again shows nothing twice."""
        if picture is None or (index, step, kind) in self.frames:
            return
        self.frames[index, step, kind] = picture
        header = self._header(index, step, self.levels[step if kind == "x_t" else step - 1], kind)
        small, done = picture.nbytes <= SMALL_BYTES, sum(self.steps)
        self.stream.keep_picture(header, True, partial(encode.png, picture, {}), small, done)

    def finish(self, image: Image) -> None:
        """A picture is made."""
        self.images[image.index] = image
        header = self._header(image.index, self.request.sampling.steps, 0, "image")
        self.stream.keep_picture(header, False, image.read, done=sum(self.steps))
        image.message = len(self.stream.kept)

    def _header(self, index: int, step: int, level: int, kind: str) -> dict[str, Any]:
        place = {"index": index, "seed": self.request.seed + index, "step": step, "steps": self.request.sampling.steps}
        return place | {"t": level, "kind": kind, "image_type": "image/png"}

    @property
    def size_bytes(self) -> int:
        """About how much memory it holds: pictures, as much again for their PNGs, and the objects around them."""
        pictures = sum(frame.nbytes for frame in self.frames.values())
        pictures += sum(image.size_bytes for image in self.images.values())
        return 2 * pictures + MESSAGE_BYTES * sum(m is not None for m in self.stream.kept) + JOB_BYTES

    def document(self, eta: Eta | None = None, pictures: bool = False) -> JobDocument:
        """The job as clients see it; with `pictures`, each image as base64 too. eta: unless it has ended."""
        images = list[ImageDocument]()
        for index, image in sorted(self.images.items()) if self.state is State.SUCCEEDED else []:
            url = f"{self.path}/images/{index}"
            shown: ImageDocument = {"index": index, "seed": image.seed, "url": url, "sha256": image.sha256}
            images.append(ImageWithPng(**shown, b64_png=base64.b64encode(image.png).decode()) if pictures else shown)
        done, eta = sum(self.steps), eta or Eta()
        return {
            "id": self.id,
            "status": self.status,
            "model": self.request.model,
            "digest": self.model.digest,
            "request": self.request.document,
            "created_at": self.created_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "progress": {"step": done, "steps": self.updates, "position": eta.position, "eta_s": eta.eta_s},
            "images": images,
            "error": self.error,
            "webhook": self.delivery.document if self.delivery is not None else None,
        }
