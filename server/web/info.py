"""`GET /models`: what is served, where, and what it promises. `GET /healthz`, `GET /readyz`: whether it is."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse, JSONResponse

from model.checkpoint.card import ModelCard
from model.sampling.plan import SAMPLERS, SPACINGS
from server.engines.backend import Backend
from server.errors import NotFound
from server.jobs.request import default_model
from server.jobs.service import JobService
from server.settings import Settings
from server.web.http import already_has

router = APIRouter()
ONLY_OURS = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
STATIC = Path(__file__).parent.parent / "static"


def _document(card: ModelCard, backend: Backend) -> dict[str, Any]:
    served = backend.models.get(card.name)
    process, (channels, height, width) = card.process, card.architecture.shape
    variances = ["small", "large", "learned"] if process.learned_variance else ["small", "large"]
    return {
        "name": card.name,
        "digest": served.digest if served is not None else None,
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
        "loaded": served is not None and served.loaded,
        "runs": asdict(served) if served is not None else None,
        "engines": [asdict(place[card.name]) if card.name in place else None for place in backend.replicas],
    }


def _page(request: Request, name: str) -> Response:
    """A page of ours, which runs what this server sends it and nothing else."""
    path, policy = STATIC / name, {"Content-Security-Policy": ONLY_OURS}
    page = FileResponse(path, headers=policy, stat_result=path.stat())
    tag = page.headers["etag"]
    return Response(status_code=304, headers=policy | {"ETag": tag}) if already_has(request, tag) else page


@router.get("/models", summary="The models that are served")
async def models(request: Request) -> JSONResponse:
    """Every model, without its card; which of them is made with if a request names none; and how many pictures a
    request may ask for."""
    jobs: JobService = request.app.state.jobs
    settings: Settings = request.app.state.settings
    served = [_document(card, jobs.backend) for card in jobs.cards.values()]
    usual = {"default": default_model(jobs.cards, settings), "max_n": settings.max_n}
    return JSONResponse({"models": served} | usual)


@router.get("/models/{name}", summary="One model and its card")
async def model(request: Request, name: str) -> JSONResponse:
    """One model, with its card: the README of its directory."""
    jobs: JobService = request.app.state.jobs
    if name not in jobs.cards:
        raise NotFound(f"there is no such model; there are {', '.join(jobs.cards)}")
    card = jobs.cards[name]
    return JSONResponse(_document(card, jobs.backend) | {"card": card.readme})


@router.get("/healthz", summary="Alive?")
async def healthz() -> JSONResponse:
    """The API process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", summary="Ready to take work?")
async def readyz(request: Request) -> JSONResponse:
    """200 if work is taken, else 503 with the reason."""
    jobs: JobService = request.app.state.jobs
    if jobs.admission.trouble is not None:
        raise jobs.admission.trouble
    return JSONResponse({"status": "ready"})


@router.get("/", include_in_schema=False)
async def front_door(request: Request) -> Response:
    """The viewer page."""
    return _page(request, "index.html")


@router.get("/docs", include_in_schema=False)
async def reference(request: Request) -> Response:
    """What `/openapi.json` says, to be read."""
    return _page(request, "docs.html")
