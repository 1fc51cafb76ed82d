"""What clients receive as JSON about the server itself. Its jobs are in `server.documents`."""

from dataclasses import asdict
from typing import Annotated, Literal, cast

from pydantic import Field
from typing_extensions import TypedDict

from model.checkpoint.card import ModelCard
from model.sampling.plan import resolve
from model.sampling.schedule import Spacing, Variance


class Shape(TypedDict):
    """The shape of a model's pictures."""

    channels: int
    height: int
    width: int


class RefusedModel(TypedDict):
    """A model that is not served."""

    name: str
    reason: str


class PresetDocument(TypedDict):
    """What a preset stands for."""

    sampler: str
    steps: int
    order: int | None
    plan: str | None
    spacing: Annotated[Spacing | None, Field(description="null of a plan, which has levels of its own")]
    eta: float | None
    variance: Variance | None
    clip: bool


class Presets(TypedDict):
    """What each value of `preset` stands for."""

    fast: PresetDocument
    balanced: PresetDocument
    full: PresetDocument


def presets_of(card: ModelCard) -> Presets:
    """The presets of a model."""
    chosen = {name: asdict(resolve(card.process, **fields)) for name, fields in card.presets.items()}
    shown = PresetDocument.__annotations__
    return cast(Presets, {name: {field: made[field] for field in shown} for name, made in chosen.items()})


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
