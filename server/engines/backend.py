"""The seam between jobs and whatever runs samples. A cluster engine will stand behind it one day."""

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
    """What ran these samples is gone; they run again, to the same bytes, in about so many seconds."""

    retry_after_s: float


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """How the engines are, and what they have done since the start."""

    stats: Stats
    silence_s: float  # since the last sign of life
    memory_bytes: int  # of a device, held
    restarts: Mapping[str, int]  # engines that were replaced, by cause
    replayed: int  # jobs that were run again for it


# `id` is the index of a seed.
SampleEvent: TypeAlias = Preview | Finished | Cancelled | Failed | Progress | Assigned | Restarting


class Backend(Protocol):
    """Runs samples. Everything here is called from one event loop."""

    async def start(self) -> None:
        """Begin to load. Returns at once; `models` fills when they are ready."""

    async def close(self) -> None:
        """Stop. Streams that are still open end with an error."""

    @property
    def models(self) -> dict[str, ModelStatus]:
        """The models that can be asked for, by name, loaded or not; empty while nothing runs."""

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
        nothing is known. buckets: the batch sizes that an engine runs it at."""

    def load_s(self, model: str) -> float:
        """Seconds until steps of a model can be made: it, or the engine, has to be loaded. 0 if nothing has."""

    def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """Make the pictures of `spec`: their events in order, until each has ended. Closing the iterator cancels.

        Who comes while nothing runs yet, or just now, waits. Raises NotReady if nothing ever will again.
        """
