"""The interface between jobs and whatever makes their samples: one engine process, or a router over several."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from model.engine.events import Cancelled, Failed, Finished, Preview, Stats
from server.worker.messages import ModelStatus, Spec


@dataclass(frozen=True, slots=True)
class Progress:
    """How many updates each of these samples has had, by index. Told now and then, not at every step."""

    steps: dict[int, int]


@dataclass(frozen=True, slots=True)
class Assigned:
    """Names the loaded model (device, numerics) that makes these samples."""

    status: ModelStatus


@dataclass(frozen=True, slots=True)
class Restarting:
    """The engine of these samples has died; they are made again, to the same bytes, in about so many seconds."""

    retry_after_s: float


# `id` is the index of a seed in its job.
SampleEvent: TypeAlias = Preview | Finished | Cancelled | Failed | Progress | Assigned | Restarting


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """How the engines are, and what they have done since the start."""

    stats: Stats
    silence_s: float  # since the last message
    memory_bytes: int  # of a device, held
    restarts: Mapping[str, int]  # by cause
    replayed: int  # jobs that were run again after a restart


class Backend(Protocol):
    """Makes samples. All methods are called from one event loop."""

    async def start(self) -> None:
        """Begins to load and returns at once; `models` fills when they are ready."""

    async def close(self) -> None:
        """Stops. Runs that are still open end with an error."""

    @property
    def models(self) -> dict[str, ModelStatus]:
        """The models that can be asked for, by name, loaded or not; empty while there is no engine."""

    @property
    def replicas(self) -> Sequence[Mapping[str, ModelStatus]]:
        """The same, engine by engine; empty for one that is down."""

    @property
    def trouble(self) -> str | None:
        """Why no work can be taken right now, or None."""

    @property
    def health(self) -> EngineHealth:
        """How the engines are."""

    def step_s(self, model: str, buckets: Sequence[int]) -> Sequence[float]:
        """Seconds of a step of a model by the number of pictures in it, 0 .. as many as all engines hold; zeros if
        nothing is known. buckets: the batch sizes at which an engine runs it."""

    def load_s(self, model: str) -> float:
        """Seconds until steps of a model can be made, if it or an engine has to be loaded; else 0."""

    def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """The events of these samples, in order, until each has ended; before any picture, the model that makes them.
        Closing the iterator cancels the rest.

        It waits while there is no engine. Raises NotReady if there will never be one, and ServerErrors that end a job.
        """
