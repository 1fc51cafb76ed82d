"""From a request's body to an order: every choice made, every bound checked, nothing promised yet."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from model.card import ModelCard
from model.plan import resolve
from server.errors import Invalid
from server.job import Order, Watched, frame_points
from server.owners import Owner
from server.schemas import MAX_SEED, Frames, parse_generate, parse_json
from server.settings import Settings

USUAL_FRAMES = Frames(count=30)


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request came, beside its body."""

    floats: bool = False  # the pictures are wanted unrounded, too
    shows: bool = False  # frames are shown if nothing is said of them
    draws: bool = False  # the answer is drawn from frames, so that there must be some
    attached: bool = False  # its caller waits for the end, and hears of nothing before
    again: bool = False  # pictures that were made before will not do
    key: str | None = None  # Idempotency-Key
    owner: Owner | None = None  # by whose key it came

    @property
    def owner_name(self) -> str | None:
        """The name of whoever's key it came with."""
        return self.owner.name if self.owner is not None else None


def fingerprint(body: bytes, terms: Terms) -> str:
    """A hash of what is asked for: the body, however it is spelled, and what the way it came adds to it."""
    asked = [parse_json(body), terms.floats, terms.shows or terms.draws]
    return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def take_order(body: bytes, cards: Mapping[str, ModelCard], settings: Settings, terms: Terms) -> Order:
    """A request with every choice made. Raises BadInput, or PlanError, naming the field that cannot be."""
    request = parse_generate(body)
    card = cards[_model(request.model, cards, settings)]
    if request.n > settings.max_n:
        raise Invalid(("n", f"n must lie in 1..{settings.max_n}, got {request.n}"))
    if request.seed is not None and request.seed > MAX_SEED - request.n:
        raise Invalid(("seed", f"seed must lie in 0..2^53 - n = {MAX_SEED - request.n}, got {request.seed}"))
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
    shows = terms.shows or terms.draws
    frames = request.frames if "frames" in request.model_fields_set or not shows else USUAL_FRAMES
    if terms.draws and frames is None:
        raise Invalid(("frames", "frames must not be null: an animation is made of them"))
    watched = _watched(frames, request.n, sampling.steps, settings.max_frames)
    kind = (card.name, card.process.schedule.T, card.architecture.shape)
    urgency = (request.priority, request.deadline_s)
    return Order(*kind, seed, request.n, sampling, watched, *urgency, terms.floats, terms.owner_name)


def _watched(frames: Frames | None, n: int, steps: int, most: int) -> Watched | None:
    if frames is None:
        return None
    points = frame_points(frames, steps, most)
    count = n * len(points) * (1 + (frames.kind == "both"))
    if count > most:
        raise Invalid(("frames", f"frames: pictures x points x kinds must be at most {most}, got {count}"))
    return Watched(frames, points)


def _model(wanted: str | None, cards: Mapping[str, ModelCard], settings: Settings) -> str:
    name = wanted or settings.default_model or (next(iter(cards)) if len(cards) == 1 else "")
    if name not in cards:
        known = ", ".join(cards)
        raise Invalid(("model", f"model must be one of {known}" if wanted else f"name a model, one of {known}"))
    return name
