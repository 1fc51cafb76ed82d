"""The application: builds every part and connects them, once."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match

from model.errors import ModelRefused, PlanError
from server import __version__
from server.catalog import Catalog, find_models, one_of, refused
from server.engines.backend import Backend
from server.engines.build import build
from server.errors import Problem, ServerError, SettingsError, StartFailed, problem
from server.jobs.service import JobService
from server.logs import report
from server.metrics import Metrics
from server.settings import Settings
from server.store.store import Store
from server.troubles import Troubles, started
from server.web import generate, info, jobs, openai, openapi, watch
from server.web.http import check_request, refusal
from server.web.middleware import Access, Middleware

logger = logging.getLogger(__name__)
ROUTERS = [module.router for module in (generate, jobs, watch, info, openai)]
THREADS = min(32, (os.cpu_count() or 1) + 4)  # that encode, draw and read: as many as asyncio would start
CODES = {404: "not-found", 405: "method-not-allowed"}


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return refusal(request.scope, problem(error))


async def _on_unforeseen(request: Request, error: Exception) -> JSONResponse:
    """The answer to a bug. It is sent outside of all middleware, so it adds the headers of all answers itself."""
    extra = {"request_id": request.state.request_id, "path": request.url.path}
    logger.error("unforeseen error", extra=extra, exc_info=error)
    answer = refusal(request.scope, problem(error))
    answer.raw_headers += request.state.headers
    return answer


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, headers, detail = CODES.get(error.status_code, "http-error"), dict(error.headers or {}), error.detail
    if error.status_code == 404:
        detail = "there is no such path"
    elif error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
        detail = f"this path has {headers['Allow']}"
    return refusal(request.scope, Problem(error.status_code, code, detail, headers=headers))


HANDLERS: dict[Any, Any] = {
    ServerError: _on_error,
    PlanError: _on_error,
    HTTPException: _on_http_error,
    Exception: _on_unforeseen,
}


def _methods(request: Request) -> list[str]:
    """The methods of a path, of all its routes together."""
    routes = [route for each in ROUTERS for route in each.routes if route.matches(request.scope)[0] != Match.NONE]
    methods = {method for route in routes for method in getattr(route, "methods", ())} or {"GET"}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Starts the jobs before the first request and closes them after the last one."""
    try:
        asyncio.get_running_loop().set_default_executor(started(THREADS, "worker"))
        await run_in_threadpool(bool)  # imports what starlette would import when it sends the first stream
        await app.state.jobs.start()
    except Exception as error:  # or the web server would choose the exit code
        app.state.on_failed(error if isinstance(error, ServerError) else StartFailed(f"the start failed: {error!r}"))
        raise
    following = asyncio.create_task(app.state.keys.follow(), name="API keys") if app.state.keys is not None else None
    if following is not None:
        following.add_done_callback(report)
    yield
    if following is not None:
        following.cancel()
    await app.state.jobs.close()


def _check_prefix(prefix: str) -> None:
    """Raises SettingsError for a prefix that could not be told from paths of the server, if a proxy takes it off."""
    paths = [getattr(route, "path", "") for each in ROUTERS for route in each.routes]
    ours = {path.split("/")[1] for path in [*paths, "/static", "/openapi.json"]} - {""}
    if prefix and prefix.split("/")[1] in ours:
        raise SettingsError(f"DDPM_PATH_PREFIX must not begin as paths of the server do: {', '.join(sorted(ours))}")


def _find_models(settings: Settings) -> Catalog:
    cards = find_models(settings.weights)
    for name, reason in refused(cards).items():
        if name == settings.default_model:
            raise ModelRefused(f"{name}: {reason}")
        logger.error("model refused", extra={"model": name, "reason": reason})
    for card in cards.values():
        for name, reason in card.process.refused_plans.items():
            logger.error("plan refused", extra={"model": card.name, "plan": name, "reason": reason})
        if card.left:
            logger.info("weights taken", extra={"model": card.name, "taken": card.taken, "left": list(card.left)})
    if settings.default_model and settings.default_model not in cards:
        raise SettingsError(f"DDPM_DEFAULT_MODEL must be {one_of(cards)}")
    return cards


def _without_routes() -> FastAPI:
    return FastAPI(
        title="ddpm-server",
        version=__version__,
        description="Pictures from pixel-space diffusion models: a seed and a step count in, a picture out.",
        lifespan=_lifespan,
        exception_handlers=HANDLERS,
        openapi_url=None,  # server/web/info.py has the route
        docs_url=None,  # FastAPI's page loads scripts from other servers; ours is server/static/docs.html
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,  # operation ids are names of functions
        redirect_slashes=False,  # a redirect would repeat the Host header
    )


def create_app(
    settings: Settings,
    backend: Backend | None = None,
    on_failed: Callable[[ServerError], None] = lambda failure: None,
) -> FastAPI:
    """The application. on_failed: is called with the error that ends the server for good. Raises ModelRefused,
    SettingsError, StoreRefused, StoreInUse, StorageFull."""
    cards = _find_models(settings)
    metrics, access, troubles = Metrics(), Access.read(settings), Troubles()
    if backend is None:
        backend = build(settings, cards, on_failed, metrics.observe_step, troubles)
    store = Store(settings.data_dir, metrics.journal_commit_seconds.observe, on_failed, troubles)
    service = JobService(settings, cards, backend, store, metrics)
    app = _without_routes()
    app.state.settings, app.state.jobs, app.state.on_failed = settings, service, on_failed
    app.state.cors, app.state.page_headers = access.rules.cors, info.page_headers(settings)
    app.state.keys = access.keys
    _check_prefix(settings.path_prefix)
    app.add_middleware(
        Middleware,
        access=access,
        max_websockets=settings.max_websockets,
        refused=service.admission.count_refusal,
        prefix=settings.path_prefix,
    )
    app.add_route("/static/{name:path}", info.static_file)
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(check_request)])
    openapi.describe(app, service, settings)
    return app
