"""What clients receive as JSON about the server itself. Its jobs are in `server.documents`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from model.sampling.schedule import SavedPlan


class Shape(TypedDict):
    """The shape of a model's pictures."""

    channels: int
    height: int
    width: int


class RefusedModel(TypedDict):
    """A model that is not served."""

    name: str
    reason: str


class PlanDocument(TypedDict):
    """A plan in a model's directory."""

    name: Annotated[str, Field(description="what a request's `plan` may be")]
    digest: Annotated[str, Field(description="of its file")]
    sampler: str
    steps: int
    source: Annotated[str, Field(description="where it comes from, as its file says")]
    measured: Annotated[Mapping[str, Any], Field(description="what was measured of it, as its file says")]


def plan_document(name: str, saved: SavedPlan) -> PlanDocument:
    """A plan of a model as clients see it."""
    return {
        "name": name,
        "digest": saved.digest,
        "sampler": saved.sampler,
        "steps": len(saved.timesteps),
        "source": saved.source,
        "measured": saved.measured,
    }


class RefusedPlan(TypedDict):
    """A plan in a model's directory that cannot be used."""

    name: str
    reason: str


class Health(TypedDict):
    """The API process is alive."""

    status: Literal["ok"]


class Readiness(TypedDict):
    """Jobs are accepted."""

    status: Literal["ready"]
    refused: Annotated[list[str], Field(description="names of models that are listed and not served")]


class EngineState(TypedDict):
    """An engine."""

    up: Annotated[bool, Field(description="whether it takes work")]
    loaded: Annotated[list[str], Field(description="the models in its memory")]


class ServerStatus(TypedDict):
    """What the server is doing at the moment."""

    ready: Annotated[bool, Field(description="whether jobs are accepted, as `/readyz` says")]
    reason: Annotated[str | None, Field(description="why not")]
    jobs_running: int
    jobs_waiting: int
    steps_waiting: Annotated[int, Field(description="image-steps left to do of all jobs")]
    slots: Annotated[int, Field(description="pictures that can be denoised at once, by all loaded models")]
    slots_used: int
    viewers: Annotated[int, Field(description="clients that watch a job")]
    image_steps_per_s: Annotated[float, Field(description="in the last seconds")]
    step_s: Annotated[float | None, Field(description="seconds of a step of a batch lately; null if there was none")]
    engines: list[EngineState]
    models: Annotated[list[str], Field(description="the names of the models that are served")]
