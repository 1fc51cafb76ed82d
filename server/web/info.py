"""What the server says about itself: `/models`, `/healthz`, `/readyz`, `/metrics`, and the two pages."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse, JSONResponse

from model.checkpoint.card import ModelCard
from model.sampling.plan import SAMPLERS, SPACINGS
from server.engines.backend import Backend
from server.errors import ModelBroken, NotFound
from server.jobs.request import default_model
from server.jobs.service import JobService
from server.metrics import MEDIA
from server.settings import Settings
from server.web.http import has_current

router = APIRouter()
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
STATIC = Path(__file__).parent.parent / "static"


def _document(card: ModelCard, backend: Backend) -> dict[str, Any]:
    status = backend.models.get(card.name)
    process, (channels, height, width) = card.process, card.shape
    variances = ["small", "large", "learned"] if process.learned_variance else ["small", "large"]
    return {
        "name": card.name,
        "digest": (status.digest or None) if status is not None else None,
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


def _page(request: Request, name: str) -> Response:
    """A page, which may load nothing from other servers."""
    path, policy = STATIC / name, {"Content-Security-Policy": CONTENT_POLICY}
    page = FileResponse(path, headers=policy, stat_result=path.stat())
    tag = page.headers["etag"]
    return Response(status_code=304, headers=policy | {"ETag": tag}) if has_current(request, tag) else page


@router.get("/models", summary="List models")
async def models(request: Request) -> JSONResponse:
    """All models without their cards, those that are refused and why, the default model of requests that name none,
    and the limit of `n`."""
    jobs: JobService = request.app.state.jobs
    settings: Settings = request.app.state.settings
    documents = [_document(card, jobs.backend) for card in jobs.cards.values()]
    default = default_model(jobs.cards, settings)
    refused = [{"name": name, "reason": reason} for name, reason in jobs.refused.items()]
    return JSONResponse({"models": documents, "refused": refused, "default": default, "max_n": settings.max_n})


@router.get("/models/{name}", summary="Get a model and its card")
async def model(request: Request, name: str) -> JSONResponse:
    """A model with its card, the README of its directory."""
    jobs: JobService = request.app.state.jobs
    if name not in jobs.cards and name in jobs.refused:
        raise ModelBroken(jobs.refused[name])
    if name not in jobs.cards:
        raise NotFound(f"there is no such model; there are {', '.join(jobs.cards)}")
    card = jobs.cards[name]
    return JSONResponse(_document(card, jobs.backend) | {"card": card.readme})


@router.get("/healthz", summary="Check that the server is alive")
async def healthz() -> JSONResponse:
    """200 if the API process answers, whatever its engines do."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", summary="Check that the server accepts jobs")
async def readyz(request: Request) -> JSONResponse:
    """200 if jobs are accepted, else 503 with the reason. `refused` names models that are not served."""
    jobs: JobService = request.app.state.jobs
    if jobs.admission.trouble is not None:
        raise jobs.admission.trouble
    return JSONResponse({"status": "ready", "refused": list(jobs.refused)})


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
