"""What the client takes and returns: requests, events and pictures. Pictures hold PNG bytes; PIL decodes on demand."""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, overload

from PIL import Image

from ddpm_client.errors import Cancelled, Failed
from ddpm_client.wire import unpack

Document: TypeAlias = dict[str, Any]
ENDS = ("succeeded", "failed", "cancelled")


class Frames(TypedDict, total=False):
    """Which intermediate states to send: one after `every` steps, or `count` of them, evenly spaced."""

    every: int
    count: int
    kind: Literal["x_t", "x0", "both"]


class Request(TypedDict, total=False):
    """The fields of `POST /generate`. The server chooses what is left out."""

    model: str
    seed: int
    steps: int
    n: int
    preset: str
    sampler: str
    order: int
    eta: float
    variance: str
    spacing: str
    timesteps: Sequence[int]
    plan: str
    label: int | str
    labels: Sequence[int | str]
    guidance: float
    guidance_interval: Sequence[int]
    clip: bool
    noise: str
    frames: Frames | None
    priority: int
    deadline_s: float
    webhook: str


@dataclass(frozen=True, slots=True)
class _Message:
    """job: the job's id. seq: the message's number, or for messages without one, the last number before them"""

    job: str
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image(_Message):
    """An image of the job. index: which of its n pictures. png: the bytes as the server sent them"""

    index: int
    seed: int
    png: bytes = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """The image, decoded by PIL."""
        image = Image.open(io.BytesIO(self.png), formats=["PNG"])
        image.load()
        return image

    def save(self, path: str | Path) -> None:
        """Writes the PNG to a file, byte for byte."""
        Path(path).write_bytes(self.png)

    def _repr_png_(self) -> bytes:
        return self.png


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture(_Image):
    """A finished picture. The text chunks of its PNG hold every parameter that determined it."""

    @property
    def texts(self) -> dict[str, str]:
        """The text chunks: model, digest, seed, steps, sampler and so on."""
        return png_texts(self.png)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame(_Image):
    """An intermediate state after `step` of `steps` steps. t: noise level. kind: x_t, or the x0 predicted from it"""

    step: int
    steps: int
    t: int
    kind: str


@dataclass(frozen=True, slots=True)
class Queued(_Message):
    """The job waits. position: number of jobs before it. eta_s: seconds until it is done"""

    position: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Started(_Message):
    """The job has started. steps: updates of its pictures"""

    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(_Message):
    """`step` of `steps` updates of its pictures are done. t: noise level of the picture with the most steps left"""

    step: int
    steps: int
    t: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Dropped(_Message):
    """The server skipped the frames numbered `first` to `last`, because this client read too slowly."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Restarting(_Message):
    """The engine is being replaced. The pictures are computed again, with the same bytes."""

    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Resync(_Message):
    """The server has restarted. It no longer holds messages up to number `seq`."""


@dataclass(frozen=True, slots=True)
class Ended(_Message):
    """The last event. status: succeeded, failed or cancelled"""

    status: str
    document: Document = field(repr=False)


Event: TypeAlias = Queued | Started | Progress | Frame | Picture | Dropped | Restarting | Resync | Ended
OnEvent: TypeAlias = Callable[[Event], object]
NUMBERED = (Started, Frame, Picture, Ended)  # each has a number of its own; the others repeat the last one
NAMED: tuple[type[Event], ...] = (Queued, Started, Progress, Dropped, Restarting, Resync)
KINDS = {kind.__name__.lower(): kind for kind in NAMED} | dict.fromkeys(ENDS, Ended)


def event(message: str | bytes) -> Event | None:
    """The event that a websocket message describes; None if its kind is unknown. Raises ValueError."""
    kind: type[Event] | None
    if isinstance(message, bytes):
        said, png = unpack(message)
        kind, said["png"] = Picture if said["kind"] == "image" else Frame, png
    else:
        kind = KINDS.get((said := json.loads(message))["type"])
        said |= {"status": said["type"], "first": said.get("from"), "last": said.get("to")}
    return None if kind is None else kind(**{each.name: said[each.name] for each in fields(kind)})


@dataclass(frozen=True)
class Pictures(Sequence[Picture]):
    """The result of a job. `image`, `png` and `seed` belong to its first picture, usually its only one."""

    job: Document = field(repr=False)
    pictures: tuple[Picture, ...]
    frames: tuple[Frame, ...] = field(default=(), repr=False)  # in the order in which the engine made them

    @property
    def images(self) -> list[Image.Image]:
        """All pictures, decoded by PIL."""
        return [picture.image for picture in self.pictures]

    @property
    def image(self) -> Image.Image:
        """The first picture, decoded by PIL."""
        return self.pictures[0].image

    @property
    def png(self) -> bytes:
        """The first picture's bytes, as the server sent them."""
        return self.pictures[0].png

    @property
    def seed(self) -> int:
        """The first picture's seed; picture i has this seed + i."""
        return self.pictures[0].seed

    def __len__(self) -> int:
        return len(self.pictures)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        return self.pictures[index]

    def _repr_html_(self) -> str:
        return to_html(self.job, self.pictures)


def raise_for(document: Document) -> None:
    """Raises Failed or Cancelled if the job has ended so."""
    if (status := document["status"]) in ("failed", "cancelled"):
        raise Failed(document["error"] or {}) if status == "failed" else Cancelled("the job was cancelled")


def png_texts(png: bytes) -> dict[str, str]:
    """The text chunks of a PNG. Raises ValueError if it is no PNG."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError) as error:
        raise ValueError("this is not a PNG") from error


def to_html(document: Document, pictures: Sequence[Picture]) -> str:
    """A job for a notebook: its pictures, or its progress."""
    request, progress = document["request"], document["progress"]
    words = f"{document['model']}, seed {request['seed']}, {request['steps']} steps: {document['status']}"
    if pictures:
        data = [base64.b64encode(picture.png).decode() for picture in pictures]
        body = "".join(f'<img src="data:image/png;base64,{text}" style="min-width:64px;margin:1px">' for text in data)
    elif document["status"] in ENDS:
        body = html.escape(str((document["error"] or {"detail": ""})["detail"]))
    else:
        body = f'<progress value="{progress["step"]}" max="{progress["steps"]}"></progress>'
        body += f" {progress['step']} of {progress['steps']}, about {progress['eta_s']:.0f} s"
    return f"<figure><div>{body}</div><figcaption>{html.escape(words)}</figcaption></figure>"
