"""OpenAI's images API on top of `POST /generate`, for tools that speak no other: see `docs/api.md`."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from urllib.parse import urljoin

from ddpm_client.wire import unpack
from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from model.sampling.labels import Labels
from server.catalog import card_of, default_model
from server.errors import Invalid, problem
from server.jobs import encode
from server.jobs.job import Image, Job
from server.jobs.request import RequestContext, resolve_request
from server.jobs.service import JobService
from server.jobs.stream import PictureMessage, Subscriber, TextMessage
from server.web.generate import CLIENT_CLOSED_REQUEST, ServerSent, succeeds
from server.web.http import EVENTS, from_headers, read_json_body, tenant_of
from server.web.openai_schema import (
    ErrorEvent,
    ImageEntry,
    ImageEvent,
    ImageFile,
    ImagesAnswer,
    ImagesRequest,
    ModelEntry,
    ModelList,
    PartialImage,
    Usage,
    WholeImage,
    error_object,
    parse_images,
)
from server.web.openapi import asks, event_stream, refusals, sends

router = APIRouter(prefix="/v1", tags=["openai"])
# OpenAI's types require it; these models know no tokens
USAGE: Usage = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
UNUSED = ""  # the part of the prompt that was used: none
MADE = ("X-Job-Id", "X-Seed", "X-Cache?", "Cache-Control?")
EVENT_TYPES = {
    "image_generation.partial_image": "PartialImage",
    "image_generation.completed": "WholeImage",
    "error": "ErrorEvent",
}


@router.post(
    "/images/generations",
    summary="Make pictures (OpenAI)",
    response_model=ImagesAnswer,
    responses={
        200: {"content": {EVENTS: event_stream(EVENT_TYPES)}, **sends(*MADE)},
        **refusals(404, 409, 410, 415, 429, 504),
    },
    openapi_extra=asks("Idempotency-Key", "Cache-Control", body="ImagesRequest"),
)
async def openai_generate(request: Request) -> Response:
    """Makes the pictures of `POST /generate` for clients of OpenAI's images API. The body may have the fields of both.
    The prompt may be a label of a conditional model, and has no other effect. With `stream`, partial images are
    predictions of x0."""
    jobs: JobService = request.app.state.jobs
    settings = request.app.state.settings
    with jobs.admission.counting_refusals(tenant_of(request)):
        asked = parse_images(await read_json_body(request, settings.max_body_bytes) or b"{}")
        body = asked.generate(_labels(asked, jobs, settings.default_model))
        context = RequestContext(attached=not asked.stream, **from_headers(request))
        try:
            _, height, width = resolve_request(body, jobs.cards, settings, context).shape
        except Invalid as error:
            ours = {"frames": "partial_images"} if asked.partial_images else {}  # our names and the caller's
            raise Invalid(*((ours.get(name, name), message) for name, message in error.fields)) from None
        asked.check_size(width, height)
        job = await jobs.submit(body, context)
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.request.seed)} | ({"X-Cache": "hit"} if job.cached else {})
    if asked.stream:
        return ServerSent(_events(asked, job, jobs.watch(job)), headers, partial(jobs.leave, job))
    if not await succeeds(request, jobs, job):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    urls = None
    if asked.response_format == "url":
        urls = [urljoin(str(request.base_url), f"{job.path}/images/{i}") for i in range(job.request.n)]
    return await jobs.in_thread(lambda: JSONResponse(_answer(asked, job, urls), headers=headers))


def _labels(asked: ImagesRequest, jobs: JobService, named: str | None) -> Labels | None:
    """The labels of the model that is asked for; None if there is no such model, which is refused later."""
    model = (asked.model_extra or {}).get("model") or default_model(jobs.cards, named)
    return jobs.cards[model].labels if isinstance(model, str) and model in jobs.cards else None


def _file(asked: ImagesRequest, png: bytes) -> str:
    """A picture in the requested format, as base64. Slow: call it in a thread."""
    if asked.format != "png":
        quality = 100 if asked.output_compression is None else asked.output_compression
        png = encode.still(png, f"image/{asked.format}", quality)
    return base64.b64encode(png).decode()


def _size(job: Job) -> str:
    _, height, width = job.request.shape
    return f"{width}x{height}"


def _answer(asked: ImagesRequest, job: Job, urls: list[str] | None) -> ImagesAnswer:
    def entry(image: Image) -> ImageEntry:
        where: ImageFile = {"url": urls[image.index]} if urls else {"b64_json": _file(asked, image.png)}
        return {**where, "revised_prompt": UNUSED, "seed": image.seed}

    return {
        "created": int(job.finished_at or job.created_at),
        "data": [entry(image) for _, image in sorted(job.images.items())],
        "background": "opaque",
        "output_format": asked.format,
        "size": _size(job),
        "usage": USAGE,
    }


def _event(event: PartialImage | WholeImage | ErrorEvent) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


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
        yield _event({"type": "error", "error": error_object(problem(job.failure or RuntimeError()))})


async def _image_event(asked: ImagesRequest, job: Job, message: PictureMessage) -> bytes:
    header, png = unpack(await message.packed())
    about: ImageEvent = {
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
        return _event({**about, "type": "image_generation.completed", "usage": USAGE, "revised_prompt": UNUSED})
    assert job.request.frames is not None
    index = job.request.frames.points.index(header["step"]) - 1  # the first point is pure noise and has no x0
    return _event({**about, "type": "image_generation.partial_image", "partial_image_index": index})


def _model(name: str) -> ModelEntry:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ddpm-server"}  # 0: unknown


@router.get("/models", summary="List models (OpenAI)", response_model=ModelList)
async def openai_list_models(request: Request) -> JSONResponse:
    """The names of all models. `GET /models` has more."""
    return JSONResponse({"object": "list", "data": [_model(name) for name in request.app.state.jobs.cards]})


@router.get("/models/{name}", summary="Get a model (OpenAI)", response_model=ModelEntry, responses=refusals(404))
async def openai_get_model(request: Request, name: str) -> JSONResponse:
    """The name of a model. `GET /models/{name}` has more."""
    return JSONResponse(_model(card_of(name, request.app.state.jobs.cards).name))
