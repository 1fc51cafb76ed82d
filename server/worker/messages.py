"""The messages between the API process and an engine process, over a pipe between parent and child."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from model.engine.events import Event, Stats
from model.sampling.labels import Labels
from model.sampling.samplers import Sampling
from model.sampling.schedule import SavedPlan

CHANGED = "the weights were changed while they were served"  # either process may find it out


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The samples that a backend is asked to make: one picture per seed."""

    model: str
    seeds: tuple[int, ...]
    sampling: Sampling
    rank: float = 0.0  # smaller is seated first
    frames: frozenset[int] = frozenset()
    shows_x: bool = True
    shows_x0: bool = False
    wants_floats: bool = False
    owner: str = ""  # owners have equal shares
    labels: Mapping[int, int] = field(default_factory=dict)  # by seed, of pictures with a label
    indices: tuple[int, ...] = ()  # of the seeds in their job, by which events name them; empty: 0, 1, ...
    job: str = ""  # the id by which quarantine knows it; without one it is known for this run only
    alone: bool = False  # it has an engine to itself, once others are done, and each of its steps is reported

    def told(self, seed: int, known: Labels | None) -> tuple[int, ...]:
        """What the net is told in each slot that a picture takes. known: the labels of the model"""
        if known is None:
            return ()
        null = () if known.null is None else (known.null,)
        label = self.labels.get(seed)
        return null if label is None else (label, *(null if self.sampling.guided else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """A model that a backend runs or can load, as `GET /models` shows it."""

    digest: str  # of the weights and configurations that were loaded
    device: str
    dtype: str
    parameters: int
    slots: int
    buckets: list[int]
    exact_buckets: list[int]
    admitted: list[int]  # the buckets that are used
    exact: bool
    numerics: str  # the class within which bytes are the same; empty before it is first loaded
    load_s: float = field(default=0.0, compare=False)
    loaded: bool = field(default=True, compare=False)  # in memory now; else a request loads it
    memory_bytes: int = field(default=0, compare=False)  # of the device, which it takes when it is loaded
    trouble: str | None = field(default=None, compare=False)  # why it cannot be loaded
    note: str | None = field(default=None, compare=False)  # what `exact` costs, why it is not, or why torch runs it


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What an engine process is to run. Its first message is Ready or Refused."""

    models: tuple[tuple[str, Path], ...]
    device: str
    dtype: str
    slots: int
    threads: int
    exact: bool
    log_level: str
    memory_bytes: int = 0  # that loaded models may take together; 0: all are loaded
    unusable: str = ""  # why OpenVINO is not tried on a CPU, if it is not: words that follow its name
    configs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of each card that the API process has read
    plans: Mapping[str, Mapping[str, SavedPlan]] = field(default_factory=dict)  # of each such card
    default: str = ""  # the model without which no engine starts; each other may be left out, if one is left
    again: bool = False  # it replaces an engine that served: a model refused now is left out, and the others go on


@dataclass(frozen=True, slots=True)
class Submit:
    """Asks for samples: ids[i] is the sample of seed spec.seeds[i]."""

    ids: tuple[int, ...]
    spec: Spec


@dataclass(frozen=True, slots=True)
class Cancel:
    """Gives up those of these samples that have not ended."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was done: of a model, with so many slots, in so many seconds."""

    model: str
    bucket: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ready:
    """All models are loaded, or as many as there is room for."""

    models: dict[str, ModelStatus]
    steps: list[Step]  # of the smallest and the largest batch of each loaded model


@dataclass(frozen=True, slots=True)
class Loading:
    """A model is being loaded, until `Changed` names it. Meanwhile heartbeats may be late."""

    model: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A model has been loaded or unloaded, or could not be loaded: then samples that it was asked for are dropped."""

    model: str
    status: ModelStatus


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine can never start: the error's type by name, and its message."""

    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Died:
    """What ends the engine process."""

    cause: str  # memory, cuda or failed
    traceback: str


@dataclass(frozen=True, slots=True)
class Lacking:
    """What the system had too little of for an engine process to begin: another one may."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Where an engine stands, sent every now and then between two steps."""

    steps: list[Step]  # done since the last one
    progress: list[tuple[int, int]]  # (sample, updates done) of all seated samples
    memory_bytes: int  # of the device, held


@dataclass(frozen=True, slots=True)
class Report:
    """What has happened since the last report, at most one per step."""

    stats: Stats
    events: list[Event]  # of samples, in order
    seated: list[tuple[int, int]]  # (sample, updates done) of those just seated, before their first step
    heartbeat: Heartbeat | None = None
