"""What the Python client takes and gives: requests, events, pictures. They hold bytes; PIL looks at them on demand."""

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, overload

from PIL import Image

from ddpm_client.errors import Cancelled, Failed
from ddpm_client.wire import unpack

Document: TypeAlias = dict[str, Any]
ENDS = ("succeeded", "failed", "cancelled")


class Frames(TypedDict, total=False):
    """Which states are shown: after `every` so many updates, or `count` of them, evenly spread."""

    every: int
    count: int
    kind: Literal["x_t", "x0", "both"]


class Request(TypedDict, total=False):
    """What can be asked for. What is left out is for the server to choose."""

    model: str
    seed: int
    steps: int
    n: int
    sampler: str
    eta: float
    variance: str
    spacing: str
    clip: bool
    noise: str
    frames: Frames | None
    priority: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class _Shown:
    """Something to look at: the PNG as it was sent."""

    job: str
    seq: int
    index: int
    seed: int
    png: bytes = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """For PIL."""
        return _open(self.png)

    def save(self, path: str | Path) -> None:
        """The PNG as a file, byte for byte."""
        Path(path).write_bytes(self.png)

    def _repr_png_(self) -> bytes:
        return self.png


@dataclass(frozen=True, slots=True)
class Picture(_Shown):
    """A finished picture, with all that decided it in its text chunks."""

    @property
    def texts(self) -> dict[str, str]:
        """What made it: model, digest, seed, steps, sampler and so on."""
        return texts(self.png)


@dataclass(frozen=True, slots=True)
class Frame(_Shown):
    """A picture on its way, after `step` of `steps` updates. t: its level of noise. kind: x_t, or the x0 seen in it."""

    step: int
    steps: int
    t: int
    kind: str


@dataclass(frozen=True, slots=True)
class Queued:
    """It waits. position: jobs that will be begun earlier. eta_s: seconds until it is done"""

    job: str
    seq: int
    position: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Started:
    """It has been begun. steps: image-steps in all"""

    job: str
    seq: int
    steps: int


@dataclass(frozen=True, slots=True)
class Progress:
    """So many image-steps are done, of all. t: the noise level of the picture furthest behind"""

    job: str
    seq: int
    step: int
    steps: int
    t: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """The frames of these numbers were left out, because they were taken too slowly."""

    job: str
    seq: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Restarting:
    """The engine is being replaced. The pictures are made again, to the same bytes."""

    job: str
    seq: int
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Resync:
    """The server was restarted; messages up to this number are no longer held."""

    job: str
    seq: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event. status: succeeded, failed or cancelled"""

    job: str
    seq: int
    status: str
    document: Document = field(repr=False)


Event: TypeAlias = Queued | Started | Progress | Frame | Picture | Dropped | Restarting | Resync | Ended
NUMBERED = (Started, Frame, Picture, Ended)  # the others repeat the last number


def event(message: str | bytes) -> Event | None:
    """What a message says; None if it is of a kind that is not known here. Raises ValueError"""
    if isinstance(message, bytes):
        header, png = unpack(message)
        place = (header["job"], header["seq"], header["index"], header["seed"], png)
        if header["kind"] == "image":
            return Picture(*place)
        return Frame(*place, header["step"], header["steps"], header["t"], header["kind"])
    said = json.loads(message)
    where = (said.get("job", ""), said.get("seq", 0))
    match said["type"]:
        case "queued":
            return Queued(*where, said["position"], said["eta_s"])
        case "started":
            return Started(*where, said["steps"])
        case "progress":
            return Progress(*where, said["step"], said["steps"], said["t"], said["eta_s"])
        case "dropped":
            return Dropped(*where, said["from"], said["to"])
        case "restarting":
            return Restarting(*where, said["retry_after_s"])
        case "resync":
            return Resync(*where)
        case "succeeded" | "failed" | "cancelled":
            return Ended(*where, said["type"], said["document"])
    return None


@dataclass(frozen=True)
class Pictures(Sequence[Picture]):
    """All that has come of a job. `image`, `png` and `seed` are those of its first picture, mostly its only one."""

    job: Document = field(repr=False)
    pictures: tuple[Picture, ...]
    frames: tuple[Frame, ...] = field(default=(), repr=False)  # in the order in which they were made

    @property
    def images(self) -> list[Image.Image]:
        """All pictures, for PIL."""
        return [picture.image for picture in self.pictures]

    @property
    def image(self) -> Image.Image:
        """The first picture, for PIL."""
        return self.pictures[0].image

    @property
    def png(self) -> bytes:
        """The first picture, as it was sent."""
        return self.pictures[0].png

    @property
    def seed(self) -> int:
        """Of the first picture; picture i has this seed + i."""
        return self.pictures[0].seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.pictures)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        return self.pictures[index]

    def _repr_html_(self) -> str:
        return shown(self.job, self.pictures)


class Gathering:
    """Events of a job as they come, and in the end what has come of it."""

    def __init__(self) -> None:
        self._pictures: dict[int, Picture] = {}
        self._frames: dict[tuple[int, int, str], Frame] = {}  # those that are made twice are the same

    def take(self, event: Event) -> Pictures | None:
        """One more event. The result, if it was the last. Raises Failed, Cancelled."""
        match event:
            case Picture():
                self._pictures[event.index] = event
            case Frame():
                self._frames[event.index, event.step, event.kind] = event
            case Ended():
                check(event.document)
                pictures = tuple(self._pictures[i] for i in sorted(self._pictures))
                return Pictures(event.document, pictures, tuple(self._frames.values()))
        return None


def check(document: Document) -> None:
    """Raises Failed or Cancelled if that is what has come of a job."""
    if document["status"] == "failed":
        raise Failed(document["error"] or {})
    if document["status"] == "cancelled":
        raise Cancelled("the job was cancelled")


def _open(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png), formats=["PNG"])
    image.load()
    return image


def texts(png: bytes) -> dict[str, str]:
    """The text chunks of a PNG. Raises ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError) as error:
        raise ValueError("this is not a PNG") from error


def shown(document: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """A job as a notebook shows it: its pictures, or how far it is."""
    request, progress = document["request"], document["progress"]
    words = f"{document['model']}, seed {request['seed']}, {request['steps']} steps: {document['status']}"
    if pictures:
        data = [base64.b64encode(picture.png).decode() for picture in pictures]
        body = "".join(f'<img src="data:image/png;base64,{text}" style="min-width:64px;margin:1px">' for text in data)
    elif document["error"]:
        body = html.escape(str(document["error"]["detail"]))
    elif document["status"] in ENDS:
        body = ""  # its status says it all
    else:
        body = f'<progress value="{progress["step"]}" max="{progress["steps"]}"></progress>'
        body += f" {progress['step']} of {progress['steps']}, about {progress['eta_s']:.0f} s"
    return f"<figure><div>{body}</div><figcaption>{html.escape(words)}</figcaption></figure>"
