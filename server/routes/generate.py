"""`POST /generate`: a seed and a step count in, a picture out. And the pictures of jobs that have ended."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from server import images
from server.errors import NotFound
from server.jobs import Job, Jobs
from server.routes.http import negotiate, read_json_body, unless_gone
from server.schemas import GenerateRequest, parse_generate

router = APIRouter()
PNG, JSON, NPY, ZIP = "image/png", "application/json", "application/x-npy", "application/zip"
CLIENT_CLOSED_REQUEST = 499  # nobody is there to read it; for the log
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {}}}
    for status, text in {
        400: "the body is not JSON",
        406: "no such answer",
        413: "the body is too large",
        415: "the body is not declared as JSON",
        422: "a field is out of bounds; `errors` names it",
        429: "the queue is full; Retry-After says for how long",
        503: "not ready; Retry-After",
        504: "the deadline has passed",
    }.items()
}


def _picture(job: Job) -> bytes:
    if job.order.n == 1:
        return job.images[0].png
    sheet = images.contact_sheet([job.images[i].picture for i in range(job.order.n)])
    return images.png(sheet, job.texts(job.order.seed) | {"n": str(job.order.n)})


def _archive(job: Job) -> bytes:
    return images.archive({f"{i:04d}-seed-{job.images[i].seed}.png": job.images[i].png for i in range(job.order.n)})


def _array(job: Job) -> bytes:
    floats = [image.floats for _, image in sorted(job.images.items()) if image.floats is not None]
    return images.npy(floats)


ENCODERS: dict[str, Callable[[Job], bytes]] = {PNG: _picture, NPY: _array, ZIP: _archive}


@router.post(
    "/generate",
    summary="Make pictures",
    response_class=Response,
    responses={200: {"content": {media: {} for media in (PNG, JSON, NPY, ZIP)}}, **PROBLEMS},
    openapi_extra={"requestBody": {"content": {JSON: {"schema": GenerateRequest.model_json_schema()}}}},
)
async def generate(request: Request) -> Response:
    """Makes `n` pictures and answers as `Accept` asks: a PNG (or a contact sheet), the job as JSON, the unrounded
    float32 array as npy, or a zip of PNGs. The same request gives the same bytes. A caller that leaves cancels."""
    jobs: Jobs = request.app.state.jobs
    media = negotiate(request.headers.get("accept"), (PNG, JSON, NPY, ZIP))
    body = await read_json_body(request, request.app.state.settings.max_body_bytes)
    order = jobs.order(parse_generate(body or b"{}"), wants_floats=media == NPY)
    job = await unless_gone(request, jobs.run(order))
    if job is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    headers = {"X-Job-Id": job.id, "X-Seed": str(order.seed), "Vary": "Accept"}
    if media == JSON:
        return JSONResponse(await asyncio.to_thread(job.document, pictures=True), headers=headers)
    return Response(await asyncio.to_thread(ENCODERS[media], job), media_type=media, headers=headers)


@router.get("/jobs/{id}", summary="A job that has ended")
async def job_document(request: Request, id: str) -> JSONResponse:
    """The job document, for as long as its pictures are kept."""
    return JSONResponse(request.app.state.jobs.find(id).document())


@router.get("/jobs/{id}/images/{index}", summary="One picture of a job", response_class=Response)
async def job_image(request: Request, id: str, index: str) -> Response:
    """The PNG, immutable."""
    job: Job = request.app.state.jobs.find(id)
    if not (index.isascii() and index.isdigit() and len(index) < 6 and int(index) in job.images):
        raise NotFound(f"this job has images 0..{job.order.n - 1}")
    image = job.images[int(index)]
    headers = {"ETag": f'"{image.sha256}"', "Cache-Control": "public, max-age=31536000, immutable"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(image.png, media_type=PNG, headers=headers)
