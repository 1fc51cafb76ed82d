"""From a request's body to an order: every choice made, every bound checked, nothing promised yet."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from model.checkpoint.card import ModelCard
from model.sampling.plan import resolve
from server.errors import Invalid
from server.jobs.job import ResolvedRequest, Watched, frame_points
from server.jobs.schemas import MAX_SEED, Frames, GenerateRequest, parse_json, parse_object, validate
from server.jobs.tenants import Tenant
from server.settings import Settings

USUAL_FRAMES = Frames(count=30)


@dataclass(frozen=True, slots=True)
class RequestContext:
    """How a request came, beside its body."""

    floats: bool = False  # the pictures are wanted unrounded, too
    shows: bool = False  # frames are shown if nothing is said of them
    draws: bool = False  # the answer is drawn from frames, so that there must be some
    later: bool = False  # it is answered before anything is made, with the job as it is
    attached: bool = False  # its caller waits for the end, and hears of nothing before
    again: bool = False  # pictures that were made before will not do
    key: str | None = None  # Idempotency-Key
    owner: Tenant | None = None  # by whose key it came

    @property
    def owner_name(self) -> str | None:
        """The name of whoever's key it came with."""
        return self.owner.name if self.owner is not None else None


def fingerprints(body: bytes, context: RequestContext) -> list[str]:
    """Hashes of what is asked for: the body, however it is spelled, and what the way it came adds to it. The first is
    kept with a job that is made for it; a job that was made for one of the others can answer it as well."""
    asked = parse_json(body)
    adds_frames = (context.shows or context.draws) and not (isinstance(asked, dict) and "frames" in asked)
    floats = [True] if context.floats else [False, True]  # what a job has more than is needed does no harm
    frames = [True] if adds_frames and not context.later else [adds_frames, not adds_frames]
    made = [[asked, unrounded, shown] for unrounded in floats for shown in frames]
    return [sha256(json.dumps(one, sort_keys=True).encode()).hexdigest() for one in made]


def resolve_request(
    body: bytes, cards: Mapping[str, ModelCard], settings: Settings, context: RequestContext
) -> ResolvedRequest:
    """A request with every choice made. Raises BadInput, or PlanError, naming the field that cannot be."""
    value = parse_object(body)
    request = validate(value, GenerateRequest, _largest(value, cards, settings))
    card = cards[_model(request.model, cards, settings)]
    sampling = resolve(
        card.process,
        request.sampler,
        request.steps,
        variance=request.variance,
        eta=request.eta,
        spacing=request.spacing,
        clip=request.clip,
        noise=request.noise,
    )
    seed = secrets.randbelow(MAX_SEED - request.n) if request.seed is None else request.seed
    shows = context.shows or context.draws
    frames = request.frames if "frames" in request.model_fields_set or not shows else USUAL_FRAMES
    if context.draws and frames is None:
        raise Invalid(("frames", "frames must not be null: an animation is made of them"))
    watched = _watched(frames, request.n, sampling.steps, settings.max_frames)
    kind = (card.name, card.process.schedule.T, card.architecture.shape)
    urgency = (request.priority, request.deadline_s)
    return ResolvedRequest(*kind, seed, request.n, sampling, watched, *urgency, context.floats, context.owner_name)


def _largest(value: Mapping[str, object], cards: Mapping[str, ModelCard], settings: Settings) -> dict[str, int]:
    """What numbers of a request may be at most, as far as what is said beside them tells."""
    n, model = value.get("n"), value.get("model") or usual_model(cards, settings)
    largest = {"n": settings.max_n}
    largest["seed"] = MAX_SEED - (n if type(n) is int and 1 <= n <= settings.max_n else 1)
    if isinstance(model, str) and model in cards:
        largest["steps"] = cards[model].process.schedule.T
    return largest


def _watched(frames: Frames | None, n: int, steps: int, most: int) -> Watched | None:
    if frames is None:
        return None
    points = frame_points(frames, steps, most)
    count = n * len(points) * (1 + (frames.kind == "both"))
    if count > most:
        raise Invalid(("frames", f"frames: pictures x points x kinds must be at most {most}, got {count}"))
    return Watched(frames, points)


def usual_model(cards: Mapping[str, ModelCard], settings: Settings) -> str | None:
    """The model of requests that name none; None if there is no such model."""
    return settings.default_model or (next(iter(cards)) if len(cards) == 1 else None)


def _model(wanted: str | None, cards: Mapping[str, ModelCard], settings: Settings) -> str:
    name = wanted or usual_model(cards, settings)
    if name is None or name not in cards:
        known = ", ".join(cards)
        raise Invalid(("model", f"model must be one of {known}" if wanted else f"name a model, one of {known}"))
    return name
