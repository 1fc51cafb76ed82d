"""What clients receive as JSON about the server itself. Its jobs are in `server.documents`."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Literal, TypeAlias, cast

from pydantic import Field
from typing_extensions import TypedDict

from model.checkpoint.card import ModelCard
from model.sampling.labels import Labels
from model.sampling.levels import SPACINGS
from model.sampling.plan import SAMPLERS, resolve
from model.sampling.schedule import SavedPlan, Spacing, Variance

Told: TypeAlias = bool | int | float | str | None


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


class PlanDocument(TypedDict):
    """A plan in a model's directory."""

    name: Annotated[str, Field(description="what a request's `plan` may be")]
    digest: Annotated[str, Field(description="of its file")]
    sampler: str
    steps: int
    source: Annotated[str, Field(description="where it comes from, as its file says")]
    measured: Annotated[Mapping[str, Told | dict[str, Told]], Field(description="of it, as its file says")]


class RefusedPlan(TypedDict):
    """A plan in a model's directory that cannot be used."""

    name: str
    reason: str


class LabelDocument(TypedDict):
    """A label with a name."""

    label: int
    name: str


class LabelsDocument(TypedDict):
    """The labels that a conditional model knows."""

    count: Annotated[int, Field(description="labels that may be asked for")]
    names: Annotated[list[LabelDocument], Field(description="those that have names; others go by number")]
    null: Annotated[int | None, Field(description="the label that stands for none; null: the model has none")]
    guidance: Annotated[float, Field(description="of pictures with a label, unless a request says otherwise")]


class Choices(TypedDict):
    """What requests for a model may choose."""

    samplers: Annotated[list[str], Field(description="allowed values of `sampler`")]
    orders: Annotated[dict[str, list[int]], Field(description="allowed values of `order`, by sampler that has several")]
    presets: Presets
    variances: list[Variance]
    spacings: list[Spacing]
    labels: Annotated[LabelsDocument | None, Field(description="null: the model knows no labels")]
    plans: list[PlanDocument]
    refused_plans: Annotated[list[RefusedPlan], Field(description="files in `plans` that cannot be used")]


def _labels(labels: Labels) -> LabelsDocument:
    return {
        "count": len(labels.choices),
        "names": [{"label": label, "name": name} for label, name in labels.names.items() if label != labels.null],
        "null": labels.null,
        "guidance": labels.guidance,
    }


def choices_of(card: ModelCard) -> Choices:
    """What requests for this model may choose."""
    process, shown = card.process, PresetDocument.__annotations__
    chosen = {name: asdict(resolve(process, **fields)) for name, fields in card.presets.items()}
    presets = {name: {field: made[field] for field in shown} for name, made in chosen.items()}
    return {
        "samplers": list(SAMPLERS),
        "orders": {name: list(sampler.orders) for name, sampler in SAMPLERS.items() if sampler.orders},
        "presets": cast(Presets, presets),
        "variances": ["small", "large", "learned"] if process.learned_variance else ["small", "large"],
        "spacings": list(SPACINGS),
        "labels": _labels(card.labels) if card.labels is not None else None,
        "plans": [_shown(name, saved) for name, saved in process.plans.items()],
        "refused_plans": [{"name": name, "reason": reason} for name, reason in process.refused_plans.items()],
    }


def _shown(name: str, saved: SavedPlan) -> PlanDocument:
    """A plan of a model as clients see it."""
    return {
        "name": name,
        "digest": saved.digest,
        "sampler": saved.sampler,
        "steps": len(saved.timesteps),
        "source": saved.source,
        "measured": saved.measured,
    }


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
