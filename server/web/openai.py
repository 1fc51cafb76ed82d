"""OpenAI's images API on top of `POST /generate`, for tools that speak no other: see `docs/api.md`."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ddpm_client.wire import unpack
from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from server.errors import NotFound, problem
from server.jobs import encode
from server.jobs.job import Image, Job
from server.jobs.request import RequestContext, resolve_request
from server.jobs.service import JobService
from server.jobs.stream import PictureMessage, Subscriber, TextMessage
from server.web.generate import CLIENT_CLOSED_REQUEST, EVENTS, JSON, PROBLEMS, ServerSent, succeeds
from server.web.http import from_headers, read_json_body
from server.web.openai_schema import ImagesRequest, error_object, parse_images

router = APIRouter(prefix="/v1")
# OpenAI's types require it; these models know no tokens
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
UNUSED = ""  # the part of the prompt that was used: none
REFUSALS = {status: answer for status, answer in PROBLEMS.items() if status not in (406, 422)}


@router.post(
    "/images/generations",
    summary="Make pictures (OpenAI)",
    responses={200: {"content": {JSON: {}, EVENTS: {}}}, **REFUSALS},
    openapi_extra={"requestBody": {"content": {JSON: {"schema": {"$ref": "#/components/schemas/ImagesRequest"}}}}},
)
async def generations(request: Request) -> Response:
    """Makes the pictures of `POST /generate` for clients of OpenAI's images API. The body may have the fields of both.
    The prompt has no effect. With `stream`, partial images are predictions of x0."""
    jobs: JobService = request.app.state.jobs
    settings = request.app.state.settings
    with jobs.admission.counting_refusals():
        asked = parse_images(await read_json_body(request, settings.max_body_bytes) or b"{}")
        body = asked.generate()
        context = RequestContext(attached=not asked.stream, **from_headers(request))
        _, height, width = resolve_request(body, jobs.cards, settings, context).shape
        asked.check_size(width, height)
        job = await jobs.submit(body, context)
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.request.seed)} | ({"X-Cache": "hit"} if job.cached else {})
    if asked.stream:
        return ServerSent(jobs, job, _events(asked, job, jobs.watch(job)), headers)
    if not await succeeds(request, jobs, job):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    urls = None
    if asked.response_format == "url":
        urls = [str(request.url_for("job_image", id=job.id, index=i)) for i in range(job.request.n)]
    return await jobs.in_thread(lambda: JSONResponse(_answer(asked, job, urls), headers=headers))


def _file(asked: ImagesRequest, png: bytes) -> str:
    """A picture in the requested format, as base64. Slow: call it in a thread."""
    if asked.format != "png":
        quality = 100 if asked.output_compression is None else asked.output_compression
        png = encode.still(png, f"image/{asked.format}", quality)
    return base64.b64encode(png).decode()


def _size(job: Job) -> str:
    _, height, width = job.request.shape
    return f"{width}x{height}"


def _answer(asked: ImagesRequest, job: Job, urls: list[str] | None) -> dict[str, Any]:
    def entry(image: Image) -> dict[str, Any]:
        where = {"url": urls[image.index]} if urls else {"b64_json": _file(asked, image.png)}
        return {**where, "revised_prompt": UNUSED, "seed": image.seed}

    return {
        "created": int(job.finished_at or job.created_at),
        "data": [entry(image) for _, image in sorted(job.images.items())],
        "background": "opaque",
        "output_format": asked.format,
        "size": _size(job),
        "usage": USAGE,
    }


def _event(type: str, **body: Any) -> bytes:
    return f"event: {type}\ndata: {json.dumps({'type': type, **body})}\n\n".encode()


async def _events(asked: ImagesRequest, job: Job, subscriber: Subscriber) -> AsyncGenerator[bytes]:
    """Partial images and images; or the error that ended the job."""
    async with aclosing(subscriber.messages()) as messages:
        async for message in messages:
            if isinstance(message, TextMessage):
                yield b":\n\n"  # a comment keeps proxies from closing an idle connection
            elif not message.passing or message.header["step"] < message.header["steps"]:
                yield await _image_event(asked, job, message)  # after the last step x0 is the picture itself
            await asyncio.sleep(0)
    if job.status != "succeeded":
        yield _event("error", error=error_object(problem(job.failure or RuntimeError())))


async def _image_event(asked: ImagesRequest, job: Job, message: PictureMessage) -> bytes:
    header, png = unpack(await message.packed())
    about = {
        "b64_json": await asyncio.to_thread(_file, asked, png),
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": asked.format,
        "quality": "auto",
        "size": _size(job),
        "index": header["index"],
        "seed": header["seed"],
    }
    if not message.passing:
        return _event("image_generation.completed", **about, usage=USAGE, revised_prompt=UNUSED)
    assert job.request.frames is not None
    index = job.request.frames.points.index(header["step"]) - 1  # the first point is pure noise and has no x0
    return _event("image_generation.partial_image", **about, partial_image_index=index)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ddpm-server"}  # 0: unknown


@router.get("/models", summary="List models (OpenAI)")
async def model_list(request: Request) -> JSONResponse:
    """The names of all models. `GET /models` has more."""
    return JSONResponse({"object": "list", "data": [_model(name) for name in request.app.state.jobs.cards]})


@router.get("/models/{name}", summary="Get a model (OpenAI)")
async def model_entry(request: Request, name: str) -> JSONResponse:
    """The name of a model. `GET /models/{name}` has more."""
    cards = request.app.state.jobs.cards
    if name not in cards:
        raise NotFound(f"there is no such model; there are {', '.join(cards)}")
    return JSONResponse(_model(name))
