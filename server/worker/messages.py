"""What the API process and an engine process say to each other, over a pipe between parent and child."""

from dataclasses import dataclass, field
from pathlib import Path

from model.engine.events import Event, Stats
from model.sampling.plan import Sampling

CHANGED = "the weights were changed while they were served"  # said by whichever of the two finds it out


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a backend is asked to make: one picture per seed."""

    model: str
    seeds: tuple[int, ...]
    sampling: Sampling
    rank: float = 0.0  # smaller is seated first
    frames: frozenset[int] = frozenset()
    shows_x: bool = True
    shows_x0: bool = False
    wants_floats: bool = False
    owner: str = ""  # owners have equal shares
    job: str = ""  # the id by which quarantine knows it; without one it is known for this run only
    alone: bool = False  # it runs by itself on its engine, and every step of it is told


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """What a backend says of a model that it runs, or can load."""

    digest: str  # of the weights and configurations that were loaded
    device: str
    dtype: str
    parameters: int
    slots: int
    buckets: list[int]
    exact_buckets: list[int]
    admitted: list[int]  # the buckets that are used
    exact: bool
    numerics: str  # the class within which bytes are the same; empty as long as it has never been loaded
    load_s: float = field(default=0.0, compare=False)
    loaded: bool = field(default=True, compare=False)  # in memory now; else it is loaded when it is asked for
    memory_bytes: int = field(default=0, compare=False)  # of the device, that it takes when it is loaded
    trouble: str | None = field(default=None, compare=False)  # why it cannot be loaded
    note: str | None = field(default=None, compare=False)  # what `exact` costs it, why it is not, or why torch runs it


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What an engine process is for. Its first message is Ready or Refused."""

    models: tuple[tuple[str, Path], ...]
    device: str
    dtype: str
    slots: int
    threads: int
    exact: bool
    log_level: str
    memory_bytes: int = 0  # that its models may take together; 0: they are all loaded
    unusable: str = ""  # why OpenVINO is not tried on a CPU, if it is not, in words that go on behind its name
    again: bool = False  # in the place of one that served: what is refused now is left out, and the others go on


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
    """All models are loaded, or as many as there is room for."""

    served: dict[str, ModelStatus]
    steps: list[Step]  # of the smallest and the largest batch of each model that is loaded


@dataclass(frozen=True, slots=True)
class Loading:
    """A model is being loaded, until it is told of in `Changed`. Signs of life may come late meanwhile."""

    model: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A model has been loaded, or has gone, or could not be loaded. What was asked of the last kind is forgotten."""

    model: str
    served: ModelStatus


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine cannot start, whatever is tried: the error's type by name, and its message."""

    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Died:
    """What killed the engine process: the end of its last words."""

    cause: str  # memory, cuda or failed
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
