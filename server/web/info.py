"""What the server says about itself: `/models`, `/healthz`, `/readyz`, `/status`, `/metrics`, and the two pages."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse, JSONResponse

from model.checkpoint.card import ModelCard
from model.sampling.plan import SAMPLERS, SPACINGS
from server.engines.backend import Backend
from server.errors import ModelNotFound
from server.jobs.request import default_model
from server.jobs.service import JobService
from server.metrics import MEDIA
from server.settings import Settings
from server.web.hosts import frame_policy
from server.web.http import has_current

router = APIRouter()
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob:; base-uri 'none'; form-action 'self'"
)
STATIC = Path(__file__).parent.parent / "static"


def _document(card: ModelCard, backend: Backend) -> dict[str, Any]:
    status = backend.models.get(card.name)
    process, (channels, height, width) = card.process, card.shape
    variances = ["small", "large", "learned"] if process.learned_variance else ["small", "large"]
    return {
        "name": card.name,
        "digest": status.digest if status is not None else None,
        "source": asdict(card.source) if card.source is not None else None,
        "shape": {"channels": channels, "height": height, "width": width},
        "T": process.schedule.T,
        "prediction": process.prediction,
        "default_steps": process.default_steps,
        "clip": process.clip,
        "spacing": process.spacing,
        "samplers": list(SAMPLERS),
        "variances": variances,
        "spacings": list(SPACINGS),
        "loaded": status is not None and status.loaded,
        "runs": asdict(status) if status is not None else None,
        "engines": [asdict(place[card.name]) if card.name in place else None for place in backend.replicas],
    }


def page_headers(settings: Settings) -> dict[str, str]:
    """The headers of pages, which may load nothing from other servers. Raises SettingsError."""
    ancestors, older = frame_policy(settings.frame_ancestors)
    return {"Content-Security-Policy": f"{CONTENT_POLICY}; {ancestors}"} | older


def _page(request: Request, name: str) -> Response:
    path, headers = STATIC / name, request.app.state.page_headers
    page = FileResponse(path, headers=headers, stat_result=path.stat())
    tag = page.headers["etag"]
    return Response(status_code=304, headers=headers | {"ETag": tag}) if has_current(request, tag) else page


@router.get("/models", summary="List models")
async def models(request: Request) -> JSONResponse:
    """All models without their cards, the default model of requests that name none, and the limit of `n`."""
    jobs: JobService = request.app.state.jobs
    settings: Settings = request.app.state.settings
    documents = [_document(card, jobs.backend) for card in jobs.cards.values()]
    default = default_model(jobs.cards, settings)
    return JSONResponse({"models": documents, "default": default, "max_n": settings.max_n})


@router.get("/models/{name}", summary="Get a model and its card")
async def model(request: Request, name: str) -> JSONResponse:
    """A model with its card, the README of its directory."""
    jobs: JobService = request.app.state.jobs
    if name not in jobs.cards:
        raise ModelNotFound(jobs.cards)
    card = jobs.cards[name]
    return JSONResponse(_document(card, jobs.backend) | {"card": card.readme})


@router.get("/healthz", summary="Check that the server is alive")
async def healthz() -> JSONResponse:
    """200 if the API process answers, whatever its engines do."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", summary="Check that the server accepts jobs")
async def readyz(request: Request) -> JSONResponse:
    """200 if jobs are accepted, else 503 with the reason."""
    jobs: JobService = request.app.state.jobs
    if jobs.admission.trouble is not None:
        raise jobs.admission.trouble
    return JSONResponse({"status": "ready"})


@router.get("/status", summary="See what the server is doing")
async def status(request: Request) -> JSONResponse:
    """Jobs, slots and pace at the moment, for a page or a script that has no key for `/metrics`."""
    jobs: JobService = request.app.state.jobs
    running, waiting, _ = jobs.tally()
    image_steps_per_s, step_s = jobs.pace.measure()
    trouble, replicas = jobs.admission.trouble, jobs.backend.replicas
    document = {
        "ready": trouble is None,
        "reason": str(trouble) if trouble is not None else None,
        "jobs_running": running,
        "jobs_waiting": waiting,
        "steps_waiting": jobs.admission.capacity.steps,
        "slots": jobs.slots,
        "slots_used": jobs.backend.health.stats.seated,
        "viewers": jobs.counts.subscribers,
        "image_steps_per_s": image_steps_per_s,
        "step_s": step_s,
        "engines": [{"up": bool(each), "loaded": [name for name in each if each[name].loaded]} for each in replicas],
        "models": list(jobs.cards),
    }
    return JSONResponse(document, headers={"Cache-Control": "no-store"})


@router.get("/metrics", summary="Get metrics in Prometheus' text format", response_class=Response)
async def scrape(request: Request) -> Response:
    """Counters, gauges and histograms named `ddpm_*`, all read at one moment."""
    jobs: JobService = request.app.state.jobs
    return Response(jobs.metrics.render(), headers={"Content-Type": MEDIA, "Cache-Control": "no-store"})


@router.get("/", include_in_schema=False)
async def index_page(request: Request) -> Response:
    """The page on which jobs are made and watched."""
    return _page(request, "index.html")


@router.get("/docs", include_in_schema=False)
async def docs_page(request: Request) -> Response:
    """A readable `/openapi.json`."""
    return _page(request, "docs.html")
