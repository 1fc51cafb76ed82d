"""What the API process and an engine process say to each other, over a pipe between parent and child."""

from dataclasses import dataclass, field
from pathlib import Path

from model.events import Event, Stats
from server.backend import Served, Spec


@dataclass(frozen=True, slots=True)
class Start:
    """What an engine process is for. Its first message is Ready or Refused."""

    models: tuple[tuple[str, Path], ...]
    device: str
    dtype: str
    slots: int
    threads: int
    exact: bool
    log_level: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Make these pictures: ids[i] is the sample of seed spec.seeds[i]."""

    ids: tuple[int, ...]
    spec: Spec
    watched: bool = False  # whether every single step is told of while they are there


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give these samples up, those that have not ended."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was done: of which model, with how many slots, in how many seconds."""

    model: str
    bucket: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ready:
    """All models are loaded."""

    served: dict[str, Served]
    steps: list[Step]  # of the smallest and the largest batch of each model


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine cannot start, whatever is tried: the error's type by name, and its message."""

    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Died:
    """What killed the engine process: the end of its last words."""

    cause: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Happened:
    """Events of samples, in order, and where the engine stands after them."""

    events: list[Event]
    stats: Stats
    begun: list[tuple[int, int]] = field(default_factory=list)  # (sample, updates done) of those just seated


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life between two steps."""

    stats: Stats
    steps: list[Step]  # done since the last beat
    progress: list[tuple[int, int]]  # (sample, updates done) of those that are seated
    memory_bytes: int  # of the device, held
