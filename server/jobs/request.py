"""From the body of a request to a resolved request: every choice made, every bound checked, nothing promised yet."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from model.checkpoint.card import ModelCard
from model.checkpoint.presets import Fields
from model.sampling.labels import resolve_labels
from model.sampling.plan import SAMPLERS, resolve
from model.sampling.samplers import Sampling
from server.catalog import default_model, model_of
from server.documents import FramesDocument, RequestDocument
from server.errors import Invalid
from server.jobs.schemas import (
    MAX_SEED,
    Frames,
    GenerateRequest,
    fingerprint,
    parse_json,
    parse_object,
    validate,
)
from server.jobs.tenants import Tenant
from server.settings import Settings
from server.webhooks.target import accepted

DEFAULT_FRAMES, FEWEST_FRAMES = 30, 2  # of each picture
CHOICES = {"sampler", "steps", "order", "timesteps", "plan", "spacing", "eta", "variance", "clip"}
MESSAGE_BYTES, JOB_BYTES = 2_000, 6_000  # a little more than what was measured


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """What a request says beside its body: by its headers, its route and its key."""

    floats: bool = False  # the answer holds the unrounded pictures
    shows: bool = False  # frames are shown unless the body says otherwise
    draws: bool = False  # the answer is drawn from frames, so that there must be some
    later: bool = False  # the answer comes before any picture, with the job as it is
    attached: bool = False  # the caller waits for the end, and does not know the job's id before
    again: bool = False  # cached pictures are not accepted
    key: str | None = None  # Idempotency-Key
    tenant: Tenant | None = None  # by whose API key it came

    @property
    def owner(self) -> str | None:
        """The name of the tenant."""
        return self.tenant.name if self.tenant is not None else None


@dataclass(frozen=True, slots=True)
class FramePoints:
    """The frames of a job: as asked for, and the numbers of updates after which they are taken."""

    frames: Frames
    points: tuple[int, ...]

    @classmethod
    def of(cls, frames: Frames, steps: int, most: int) -> "FramePoints":
        """The points of a picture of so many steps, 0 first and `steps` last; no more than `most` + 1 of them."""
        if frames.every is not None:
            return cls(frames, tuple(dict.fromkeys([*range(0, steps, frames.every)[: most + 1], steps])))
        assert frames.count is not None
        count = min(frames.count, steps + 1, most + 1)
        return cls(frames, tuple(dict.fromkeys(round(i * steps / (count - 1)) for i in range(count))))

    @property
    def count(self) -> int:
        """Frames of each picture, x_t and x0 counted apart."""
        return len(self.points) * (2 if self.frames.kind == "both" else 1)


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request with every choice made."""

    model: str
    T: int  # of its schedule
    shape: tuple[int, int, int]  # (C, H, W) of a picture
    seed: int
    n: int
    sampling: Sampling
    labels: tuple[int, ...] | None = None  # of each picture; None: the net is told none
    frames: FramePoints | None = None
    priority: int = 0
    deadline_s: float | None = None
    webhook: str | None = None  # a URL that was accepted
    floats: bool = False  # the unrounded pictures are kept as long as the job is in memory
    owner: str | None = None  # the tenant by whose key it came, who alone may see it

    @cached_property
    def updates(self) -> int:
        """Updates of all pictures."""
        return self.n * self.sampling.steps

    @cached_property
    def work(self) -> int:
        """The work in it, in image-steps: each of a guided picture counts twice."""
        return self.n * self.sampling.image_steps

    @cached_property
    def frame_count(self) -> int:
        """Frames of each picture."""
        return self.frames.count if self.frames is not None else 0

    @cached_property
    def size_bytes(self) -> int:
        """About how much memory it comes to hold at most: pictures and frames, as much again for their PNGs, and the
        objects around them."""
        channels, height, width = self.shape
        of_a_picture = 2 * (self.frame_count + 1) + (8 if self.floats else 0)
        pictures = self.n * channels * height * width * of_a_picture
        return pictures + MESSAGE_BYTES * self.n * (self.frame_count + 1) + JOB_BYTES

    @cached_property
    def document(self) -> RequestDocument:
        """Every field of the request, defaults filled in. It is shared: nobody changes it."""
        sampling, frames = self.sampling, self.frames
        return {
            "model": self.model,
            "seed": self.seed,
            "n": self.n,
            "sampler": sampling.sampler,
            "steps": sampling.steps,
            "order": sampling.order,
            "timesteps": list(sampling.timesteps) if sampling.timesteps is not None else None,
            "plan": sampling.plan,
            "spacing": sampling.spacing,
            "labels": list(self.labels) if self.labels is not None else None,
            "guidance": sampling.guidance,
            "guidance_interval": list(sampling.guidance_interval) if sampling.guidance_interval is not None else None,
            "clip": sampling.clip,
            "noise": sampling.noise,
            "variance": sampling.variance,
            "eta": sampling.eta,
            "frames": cast(FramesDocument, frames.frames.model_dump(exclude_none=True)) if frames else None,
            "priority": self.priority,
            "deadline_s": self.deadline_s,
            "webhook": self.webhook,
        }


def fingerprints(body: bytes, context: RequestContext) -> list[str]:
    """Hashes of what is asked for: the body, however it is spelled, and what the context adds to it. A job keeps the
    first; a job that was made for one of the others can answer the request as well."""
    asked = parse_json(body)
    adds_frames = (context.shows or context.draws) and not (isinstance(asked, dict) and "frames" in asked)
    floats = [True] if context.floats else [False, True]  # a job that holds more than is needed does no harm
    frames = [True] if adds_frames and not context.later else [adds_frames, not adds_frames]
    return [fingerprint([asked, unrounded, shown]) for unrounded in floats for shown in frames]


def resolve_request(
    body: bytes, cards: Mapping[str, ModelCard], settings: Settings, context: RequestContext
) -> ResolvedRequest:
    """A request with every choice made. Raises BadInput or PlanError, naming the field that is out of bounds."""
    value = parse_object(body)
    request = validate(value, GenerateRequest, _largest(value, cards, settings))
    card = model_of(request.model, cards, settings.default_model)
    sampling = resolve(card.process, noise=request.noise, **chosen_fields(request, card))
    seed = secrets.randbelow(MAX_SEED - request.n) if request.seed is None else request.seed
    conditions = resolve_labels(
        card.labels,
        card.process.schedule.T,
        range(seed, seed + request.n),
        label=request.label,
        each=request.labels,
        guidance=request.guidance,
        interval=request.guidance_interval,
    )
    if conditions is not None:
        sampling = replace(sampling, guidance=conditions.guidance, guidance_interval=conditions.interval)
    resolved = ResolvedRequest(
        model=card.name,
        T=card.process.schedule.T,
        shape=card.shape,
        seed=seed,
        n=request.n,
        sampling=sampling,
        labels=conditions.labels if conditions is not None else None,
        priority=request.priority,
        deadline_s=request.deadline_s,
        webhook=accepted(request.webhook, settings),
        floats=context.floats,
        owner=context.owner,
    )
    if "frames" in request.model_fields_set:
        frames = _frames(request.frames, resolved, settings.max_frames, context)
    else:
        frames = _default_frames(resolved, settings, context) if context.shows or context.draws else None
    return replace(resolved, frames=frames)


def chosen_fields(request: GenerateRequest, card: ModelCard) -> Fields:
    """The fields that choose a sampler and its plan: of the request, or of the preset that it names. Raises Invalid if
    it has both."""
    chosen = request.model_dump(include=CHOICES, exclude_unset=True)
    if request.preset is None:
        return chosen
    if chosen:
        raise Invalid(*((name, f"{name} must be left out beside preset, which stands for it") for name in chosen))
    return card.presets[request.preset]


def _largest(value: Mapping[str, object], cards: Mapping[str, ModelCard], settings: Settings) -> dict[str, int]:
    """The largest number that each field may be, as far as the fields beside it tell."""
    n, model = value.get("n"), value.get("model") or default_model(cards, settings.default_model)
    pictures = n if type(n) is int and 1 <= n <= settings.max_n else 1
    largest = {"n": settings.max_n, "seed": MAX_SEED - pictures}
    if isinstance(model, str) and model in cards:
        largest["steps"] = largest["timesteps"] = cards[model].process.schedule.T
        largest["guidance_interval"] = largest["steps"]
    largest["labels"] = settings.max_n
    sampler = value.get("sampler")
    if isinstance(sampler, str) and sampler in SAMPLERS and len(orders := SAMPLERS[sampler].orders) > 1:
        largest["order"] = orders[-1]
    return largest


def _frames(frames: Frames | None, request: ResolvedRequest, most: int, context: RequestContext) -> FramePoints | None:
    """The frames in the body. Raises Invalid if they are too many, or null where the answer is drawn from them."""
    if frames is None:
        if context.draws:
            raise Invalid(("frames", "frames must not be null: an animation is made of them"))
        return None
    points = FramePoints.of(frames, request.sampling.steps, most)
    if (count := request.n * points.count) > most:
        raise Invalid(("frames", f"frames: pictures x points x kinds must be at most {most}, got {count}"))
    return points


def _default_frames(request: ResolvedRequest, settings: Settings, context: RequestContext) -> FramePoints | None:
    """The frames of a request that says nothing of them: as many as the limits leave room for, or none if these are too
    few. Raises Invalid then if the answer is drawn from them."""
    for count in range(DEFAULT_FRAMES, FEWEST_FRAMES - 1, -1):
        points = FramePoints.of(Frames(count=count), request.sampling.steps, settings.max_frames)
        fits = request.n * points.count <= settings.max_frames
        if fits and replace(request, frames=points).size_bytes <= settings.max_live_bytes:
            return points
    if context.draws:
        limits = f"{settings.max_frames} frames and {settings.max_live_bytes} bytes"
        raise Invalid(("n", f"n: an animation of so many pictures exceeds {limits}, got {request.n}"))
    return None
