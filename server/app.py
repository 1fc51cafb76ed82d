"""Builds everything and wires it, once."""

import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from model.card import ModelCard, read_card
from model.errors import ModelRefused, PlanError
from server import __version__
from server.backend import Backend
from server.engine_room import build
from server.errors import Problem, ServerError, SettingsError, StorageFull, problem
from server.jobs import Jobs
from server.metrics import Metrics
from server.routes import description, door, generate, jobs, models, openai, scrape, stream
from server.routes.http import Heads, RequestIds, refusal
from server.settings import Settings
from server.store import Store

logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?", re.ASCII)
LOST_AND_FOUND = "lost+found"  # at the top of every ext2 to ext4 file system, so of a volume that is mounted here
ROOMS = (generate, jobs, stream, models, openai, scrape)
CODES = {404: "not-found", 405: "method-not-allowed"}


def find_models(weights: str | Path) -> dict[str, ModelCard]:
    """The models of all folders, model directories and hub ids in this list. Raises ModelRefused, naming the one."""
    text = str(weights)
    places = [text] if Path(text).is_dir() else [place.strip() for place in text.split(",") if place.strip()]
    cards: dict[str, ModelCard] = {}
    for card in (card for place in places for card in _find(place)):
        if card.name in cards:
            raise ModelRefused(f"two of the models of DDPM_WEIGHTS are called {card.name}; rename one's directory")
        cards[card.name] = card
    if not cards:
        raise ModelRefused("DDPM_WEIGHTS names no model")
    return cards


def _find(place: str) -> list[ModelCard]:
    """The model directories in a folder, or the one that it is, or the one that a hub has."""
    if Path(place).is_dir():
        return _find_here(Path(place))
    on_hub = HUB_ID.fullmatch(place)
    if on_hub is None:
        raise ModelRefused(f"{place} is not a directory")
    name = on_hub[1].split("/")[1]
    if not NAME.fullmatch(name):
        raise ModelRefused(f"{on_hub[1]} cannot be served under its name, which is not {NAME.pattern}")
    from server import hub  # brings a client that takes most of a second, and most servers need none of it

    return [hub.fetch(on_hub[1], on_hub[2] or "main", name)]


def _find_here(weights: Path) -> list[ModelCard]:
    alone = (weights / "config.json").is_file() or (weights / "unet").is_dir()
    inside = (d for d in weights.iterdir() if d.is_dir() and d.name[0] != "." and d.name != LOST_AND_FOUND)
    directories = [weights] if alone else sorted(inside)
    if not directories:
        raise ModelRefused(f"{weights} holds no model directory")
    cards = []
    for directory in directories:
        name = directory.resolve().name
        if not NAME.fullmatch(name):
            raise ModelRefused(f"a model is named after its directory, and {name!r} in {weights} is not {NAME.pattern}")
        try:
            cards.append(read_card(directory, name))
        except ModelRefused as error:
            raise ModelRefused(f"{directory}: {error}") from error
    return cards


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return refusal(request.scope, problem(error))


async def _on_unforeseen(request: Request, error: Exception) -> JSONResponse:
    """A bug. This answer is made outside of all middleware, so it brings its request id itself."""
    id = getattr(request.state, "request_id", "")
    logger.error("unforeseen error", extra={"request_id": id, "path": request.url.path}, exc_info=error)
    answer = refusal(request.scope, problem(error))
    answer.headers["X-Request-Id"] = id
    return answer


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, headers = CODES.get(error.status_code, "http-error"), dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
    return refusal(request.scope, Problem(error.status_code, code, error.detail, headers=headers))


def _methods(request: Request) -> list[str]:
    """What can be done with this path, by all routes together."""
    routes = [route for room in ROOMS for route in room.router.routes if route.matches(request.scope)[0] != Match.NONE]
    methods = {method for route in routes for method in getattr(route, "methods", ())} or {"GET"}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def create_app(
    settings: Settings,
    backend: Backend | None = None,
    on_failed: Callable[[ServerError], None] = lambda failure: None,
) -> FastAPI:
    """The application. `on_failed` hears of what ends it for good. Raises ModelRefused, SettingsError, StoreRefused,
    StoreInUse, StorageFull."""
    cards = find_models(settings.weights)
    if settings.default_model and settings.default_model not in cards:
        raise SettingsError(f"DDPM_DEFAULT_MODEL must be one of {', '.join(cards)}")
    metrics = Metrics()
    if backend is None:
        backend = build(settings, cards, on_failed, metrics.took)
    store = Store(settings.data_dir, metrics.journal_commit_seconds.observe, on_failed)
    made = Jobs(settings, cards, backend, store, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await made.start()
        except StorageFull as error:
            on_failed(error)
            raise
        yield
        await made.close()

    app = FastAPI(
        title="ddpm-server",
        version=__version__,
        description="Pictures from pixel-space diffusion models: a seed and a step count in, a picture out.",
        lifespan=lifespan,
        docs_url=None,  # ours is server/static/docs.html: FastAPI's load programs from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host it was sent
    )
    app.state.settings = settings
    app.state.jobs = made
    for error in (ServerError, PlanError):
        app.add_exception_handler(error, _on_error)
    app.add_exception_handler(Exception, _on_unforeseen)
    app.add_exception_handler(HTTPException, _on_http_error)
    door.install(app, settings, made.admission.count_refusal)
    app.add_middleware(Heads)
    app.add_middleware(RequestIds)
    app.mount("/static", StaticFiles(directory=models.STATIC), name="static")
    for room in ROOMS:
        app.include_router(room.router)
    description.describe(app, made, settings)
    return app
