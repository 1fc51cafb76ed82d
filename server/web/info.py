"""What the server says about itself: `/models`, `/healthz`, `/readyz`, `/status`, `/metrics`, and the two pages."""

import asyncio
import mimetypes
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse
from typing_extensions import TypedDict

from model.checkpoint.card import ModelCard, Source
from model.sampling.schedule import Prediction, Spacing, Thresholding
from server.catalog import card_of, default_model
from server.engines.backend import Backend
from server.jobs.service import JobService
from server.metrics import MEDIA
from server.settings import Settings
from server.status import Choices, Health, Readiness, RefusedModel, ServerStatus, Shape, choices_of
from server.web.hosts import frame_policy
from server.web.http import DocumentResponse, has_current
from server.web.openapi import refusals, sends
from server.worker.messages import ModelStatus

router = APIRouter()
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob:; base-uri 'none'; form-action 'self'"
)
STATIC = Path(__file__).parent.parent / "static"


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file of the pages, in memory: to read it when it is asked for would take a descriptor."""

    data: bytes
    media: str
    tag: str

    @classmethod
    def read(cls, path: Path) -> "StaticFile":
        """The file at a path."""
        data = path.read_bytes()
        return cls(data, mimetypes.guess_type(path)[0] or "application/octet-stream", f'"{sha256(data).hexdigest()}"')


FILES = {path.name: StaticFile.read(path) for path in STATIC.iterdir()}


class ModelDocument(Choices):
    """A model."""

    name: str
    digest: Annotated[str | None, Field(description="of the model directory; null while no engine takes work")]
    source: Annotated[Source | None, Field(description="of a model from a hub")]
    weights: Annotated[str, Field(description="the file that is served, of those in the model's directory")]
    shape: Shape
    T: Annotated[int, Field(description="noise levels")]
    prediction: Prediction
    default_steps: int | None
    clip: bool
    thresholding: Annotated[Thresholding | None, Field(description="what clipping means; null: to clamp to [-1, 1]")]
    spacing: Spacing
    loaded: Annotated[bool, Field(description="whether it is in memory")]
    runs: Annotated[ModelStatus | None, Field(description="how it is run; null while no engine takes work")]
    engines: Annotated[list[ModelStatus | None], Field(description="the same for each engine")]


class ModelWithCard(ModelDocument):
    """A model with its card."""

    card: Annotated[str, Field(description="the README of its directory")]


class ModelPage(TypedDict):
    """All models."""

    models: list[ModelDocument]
    refused: Annotated[list[RefusedModel], Field(description="models that are listed and not served")]
    default: Annotated[str | None, Field(description="the model of requests that name none; null: they must name one")]
    max_n: Annotated[int, Field(description="the largest `n` of a request")]


def _document(card: ModelCard, backend: Backend) -> ModelDocument:
    status = backend.models.get(card.name)
    process, (channels, height, width) = card.process, card.shape
    return {
        "name": card.name,
        "digest": (status.digest or None) if status is not None else None,
        "source": card.source,
        "weights": card.taken,
        "shape": {"channels": channels, "height": height, "width": width},
        "T": process.schedule.T,
        "prediction": process.prediction,
        "default_steps": process.default_steps,
        "clip": process.clip,
        "thresholding": process.thresholding,
        "spacing": process.spacing,
        **choices_of(card),
        "loaded": status is not None and status.loaded,
        "runs": status,
        "engines": [place.get(card.name) for place in backend.replicas],
    }


def page_headers(settings: Settings) -> dict[str, str]:
    """The headers of pages, which may load nothing from other servers. Raises SettingsError."""
    ancestors, older = frame_policy(settings.frame_ancestors)
    return {"Content-Security-Policy": f"{CONTENT_POLICY}; {ancestors}"} | older


def _send(request: Request, name: str, headers: dict[str, str]) -> Response:
    """A file of the pages. Raises HTTPException."""
    if (file := FILES.get(name)) is None:
        raise HTTPException(404)
    headers = headers | {"ETag": file.tag}
    if has_current(request, file.tag):
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media, headers=headers)


async def static_file(request: Request) -> Response:
    """What the pages load."""
    return _send(request, request.path_params["name"], {})


@router.get("/models", summary="List models", tags=["models"], response_model=ModelPage, responses=refusals(406))
async def list_models(request: Request) -> JSONResponse:
    """All models without their cards, those that are refused and why, the default model of requests that name none,
    and the limit of `n`."""
    jobs: JobService = request.app.state.jobs
    settings: Settings = request.app.state.settings
    documents = [_document(card, jobs.backend) for card in jobs.cards.values()]
    default = default_model(jobs.cards, settings.default_model)
    refused = [{"name": name, "reason": reason} for name, reason in jobs.refused.items()]
    return DocumentResponse({"models": documents, "refused": refused, "default": default, "max_n": settings.max_n})


@router.get(
    "/models/{name}",
    summary="Get a model and its card",
    tags=["models"],
    response_model=ModelWithCard,
    responses=refusals(404, 406),
)
async def get_model(request: Request, name: str) -> JSONResponse:
    """A model with its card, the README of its directory."""
    jobs: JobService = request.app.state.jobs
    card = card_of(name, jobs.cards)
    return DocumentResponse({**_document(card, jobs.backend), "card": card.readme})


@router.get("/healthz", summary="Check that the server is alive", tags=["server"], response_model=Health)
async def get_health() -> JSONResponse:
    """200 if the API process answers, whatever its engines do."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", summary="Check that the server accepts jobs", tags=["server"], response_model=Readiness)
async def get_readiness(request: Request) -> JSONResponse:
    """200 if jobs are accepted, else 503 with the reason. `refused` names models that are not served."""
    jobs: JobService = request.app.state.jobs
    if jobs.admission.trouble is not None:
        raise jobs.admission.trouble
    return JSONResponse({"status": "ready", "refused": list(jobs.refused)})


@router.get(
    "/status",
    summary="See what the server is doing",
    tags=["server"],
    response_model=ServerStatus,
    responses={200: sends("Cache-Control")},
)
async def get_status(request: Request) -> JSONResponse:
    """Jobs, slots and pace at the moment, for those who have no key for `/metrics`."""
    jobs: JobService = request.app.state.jobs
    running, waiting, _ = jobs.tally()
    image_steps_per_s, step_s = jobs.pace.measure()
    trouble, replicas = jobs.admission.trouble, jobs.backend.replicas
    document: ServerStatus = {
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


@router.get(
    "/metrics",
    summary="Get metrics in Prometheus' text format",
    tags=["server"],
    response_class=PlainTextResponse,
    responses={200: sends("Cache-Control")},
)
async def get_metrics(request: Request) -> Response:
    """Counters, gauges and histograms named `ddpm_*`, all read at one moment."""
    jobs: JobService = request.app.state.jobs
    return Response(jobs.metrics.render(), headers={"Content-Type": MEDIA, "Cache-Control": "no-store"})


@router.get("/openapi.json", include_in_schema=False)
async def openapi_document(request: Request) -> JSONResponse:
    """This API as OpenAPI."""
    root = request.scope.get("root_path", "").rstrip("/")
    servers = {"servers": [{"url": root}]} if root else {}
    return JSONResponse(await asyncio.to_thread(request.app.openapi) | servers)


@router.get("/", include_in_schema=False)
async def index_page(request: Request) -> Response:
    """The page on which jobs are made and watched."""
    return _send(request, "index.html", request.app.state.page_headers)


@router.get("/docs", include_in_schema=False)
async def docs_page(request: Request) -> Response:
    """A readable `/openapi.json`."""
    return _send(request, "docs.html", request.app.state.page_headers)
