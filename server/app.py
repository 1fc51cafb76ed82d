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
from server.backend import Backend
from server.engine_room import build
from server.errors import EngineFailed, Problem, ServerError, SettingsError, problem
from server.jobs import Jobs
from server.metrics import Metrics
from server.routes import description, door, generate, jobs, models, scrape, stream
from server.routes.http import RequestIds
from server.settings import Settings
from server.store import Store

logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ROOMS = (generate, jobs, stream, models, scrape)
CODES = {404: "not-found", 405: "method-not-allowed"}


def find_models(weights: Path) -> dict[str, ModelCard]:
    """The model directories in a folder, or the one that it is. Raises ModelRefused, naming the directory."""
    if not weights.is_dir():
        raise ModelRefused(f"{weights} is not a directory")
    alone = (weights / "config.json").is_file() or (weights / "unet").is_dir()
    directories = [weights] if alone else sorted(d for d in weights.iterdir() if d.is_dir() and d.name[0] != ".")
    if not directories:
        raise ModelRefused(f"{weights} holds no model directory")
    cards = {}
    for directory in directories:
        name = directory.resolve().name
        if not NAME.fullmatch(name):
            raise ModelRefused(f"{weights} holds a directory whose name is not {NAME.pattern}")
        try:
            cards[name] = read_card(directory, name)
        except ModelRefused as error:
            raise ModelRefused(f"{directory}: {error}") from error
    return cards


def _respond(request: Request, answer: Problem) -> JSONResponse:
    request_id = getattr(request.state, "request_id", "")
    headers = {"Cache-Control": "no-store", **answer.headers}
    body = answer.body(request_id)
    return JSONResponse(body, answer.status, headers, media_type="application/problem+json")


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return _respond(request, problem(error))


async def _on_unforeseen(request: Request, error: Exception) -> JSONResponse:
    """A bug. This answer is made outside of all middleware, so it brings its request id itself."""
    id = getattr(request.state, "request_id", "")
    logger.error("unforeseen error", extra={"request_id": id, "path": request.url.path}, exc_info=error)
    answer = _respond(request, problem(error))
    answer.headers["X-Request-Id"] = id
    return answer


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, headers = CODES.get(error.status_code, "http-error"), dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
    return _respond(request, Problem(error.status_code, code, error.detail, headers=headers))


def _methods(request: Request) -> list[str]:
    """What can be done with this path, by all routes together."""
    routes = [route for room in ROOMS for route in room.router.routes if route.matches(request.scope)[0] != Match.NONE]
    return sorted({method for route in routes for method in getattr(route, "methods", ())}) or ["GET", "HEAD"]


def create_app(
    settings: Settings,
    backend: Backend | None = None,
    on_failed: Callable[[EngineFailed], None] = lambda failure: None,
) -> FastAPI:
    """The application. `on_failed` hears of an engine that is down for good. Raises ModelRefused, SettingsError,
    StoreRefused, StoreInUse."""
    cards = find_models(settings.weights)
    if settings.default_model and settings.default_model not in cards:
        raise SettingsError(f"DDPM_DEFAULT_MODEL must be one of {', '.join(cards)}")
    metrics = Metrics()
    if backend is None:
        backend = build(settings, cards, on_failed, metrics.took)
    store = Store(settings.data_dir, metrics.journal_commit_seconds.observe)
    made = Jobs(settings, cards, backend, store, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await made.start()
        yield
        await made.close()

    app = FastAPI(
        title="ddpm-server",
        description="Pictures from pixel-space diffusion models: a seed and a step count in, a picture out.",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would repeat the Host it was sent
    )
    app.state.settings = settings
    app.state.jobs = made
    for error in (ServerError, PlanError):
        app.add_exception_handler(error, _on_error)
    app.add_exception_handler(Exception, _on_unforeseen)
    app.add_exception_handler(HTTPException, _on_http_error)
    door.install(app, settings, made.admission.count_refusal)
    app.add_middleware(RequestIds)
    app.mount("/static", StaticFiles(directory=models.STATIC), name="static")
    for room in ROOMS:
        app.include_router(room.router)
    description.describe(app, made, settings)
    return app
