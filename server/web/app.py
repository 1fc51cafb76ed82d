"""Builds everything and wires it, once."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from model.errors import PlanError
from server import __version__
from server.engines.backend import Backend
from server.engines.build import build
from server.errors import Problem, ServerError, SettingsError, StorageFull, problem
from server.jobs.service import JobService
from server.metrics import Metrics
from server.models import find_models
from server.settings import Settings
from server.store.store import Store
from server.web import generate, info, jobs, middleware, openai, openapi, scrape, watch
from server.web.http import Heads, RequestIds, refusal

logger = logging.getLogger(__name__)
ROOMS = (generate, jobs, watch, info, openai, scrape)
CODES = {404: "not-found", 405: "method-not-allowed"}


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
    made = JobService(settings, cards, backend, store, metrics)

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
    middleware.install(app, settings, made.admission.count_refusal)
    app.add_middleware(Heads)
    app.add_middleware(RequestIds)
    app.mount("/static", StaticFiles(directory=info.STATIC), name="static")
    for room in ROOMS:
        app.include_router(room.router)
    openapi.describe(app, made, settings)
    return app
