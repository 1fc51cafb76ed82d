"""OpenAI's images API over the same path as `POST /generate`, for tools that speak nothing else: `docs/openai.md`."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from ddpm_client.wire import unpack
from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from server.errors import NotFound, Problem, problem
from server.jobs import encode
from server.jobs.job import Image, Job, State, StoredImage
from server.jobs.request import RequestContext, resolve_request
from server.jobs.service import JobService
from server.jobs.stream import Shown, Subscriber, Text
from server.web.generate import CLIENT_CLOSED_REQUEST, EVENTS, JSON, PROBLEMS, ServerSent
from server.web.http import idempotency_key, makes_again, owner_of, read_json_body, unless_gone
from server.web.openai_schema import ImagesRequest, error_object, parse_images

router = APIRouter(prefix="/v1")
# Nothing here has anything to do with tokens, which OpenAI's types have no other word for.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
NOTHING = ""  # what of the prompt was made use of
REFUSALS = {status: answer for status, answer in PROBLEMS.items() if status not in (406, 422)}


@router.post(
    "/images/generations",
    summary="Make pictures, as OpenAI's clients ask for them",
    responses={200: {"content": {JSON: {}, EVENTS: {}}}, **REFUSALS},
    openapi_extra={"requestBody": {"content": {JSON: {"schema": {"$ref": "#/components/schemas/ImagesRequest"}}}}},
)
async def generations(request: Request) -> Response:
    """The pictures that `POST /generate` makes, in the form of OpenAI's images API. Its fields may stand beside those
    of OpenAI. The prompt has no effect. With `stream`, partial images are x0 as it was predicted on the way."""
    jobs: JobService = request.app.state.jobs
    settings = request.app.state.settings
    with jobs.admission.counting_refusals():
        asked = parse_images(await read_json_body(request, settings.max_body_bytes) or b"{}")
        body, again, owner = asked.generate(), makes_again(request), owner_of(request)
        context = RequestContext(attached=not asked.stream, again=again, key=idempotency_key(request), tenant=owner)
        _, height, width = resolve_request(body, jobs.cards, settings, context).shape
        asked.check_size(width, height)
        job = await jobs.submit(body, context)
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.request.seed)} | ({"X-Cache": "hit"} if job.cached else {})
    if asked.stream:
        return ServerSent(jobs, job, _events(asked, job, jobs.watch(job)), headers)
    try:
        if await unless_gone(request, jobs.result(job)) is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await jobs.leave(job)
    urls = None
    if asked.response_format == "url":
        urls = [str(request.url_for("job_image", id=job.id, index=i)) for i in range(job.request.n)]
    return await asyncio.to_thread(lambda: JSONResponse(_answer(asked, job, urls), headers=headers))


def _file(asked: ImagesRequest, png: bytes) -> str:
    """A picture as it was asked for. Slow: in a thread."""
    if asked.format != "png":
        quality = 100 if asked.output_compression is None else asked.output_compression
        png = encode.still(png, f"image/{asked.format}", quality)
    return base64.b64encode(png).decode()


def _size(job: Job) -> str:
    _, height, width = job.request.shape
    return f"{width}x{height}"


def _answer(asked: ImagesRequest, job: Job, urls: list[str] | None) -> dict[str, Any]:
    def entry(image: Image | StoredImage) -> dict[str, Any]:
        where = {"url": urls[image.index]} if urls else {"b64_json": _file(asked, image.png)}
        return {**where, "revised_prompt": NOTHING, "seed": image.seed}

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


def _error(answer: Problem) -> bytes:
    return _event("error", error=error_object(answer))


async def _events(asked: ImagesRequest, job: Job, viewer: Subscriber) -> AsyncGenerator[bytes]:
    """Each picture, and before it the partial ones; or what has become of them instead."""
    async with aclosing(viewer.messages()) as messages:
        async for message in messages:
            if isinstance(message, Text):
                yield _told(message)
            elif not message.passing or message.header["step"] < message.header["steps"]:
                yield await _shown(asked, job, message)  # after the last step x0 is the picture itself
            await asyncio.sleep(0)
    if job.state is State.PARKED and job.failure is not None:
        yield _error(problem(job.failure))


def _told(message: Text) -> bytes:
    document = message.body.get("document")
    if document is None or document["status"] == "succeeded":
        return b":\n\n"  # a comment, by which proxies see that the line is alive
    return _error(_failure(document))


async def _shown(asked: ImagesRequest, job: Job, message: Shown) -> bytes:
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
        return _event("image_generation.completed", **about, usage=USAGE, revised_prompt=NOTHING)
    assert job.request.frames is not None
    place = job.request.frames.points.index(header["step"]) - 1  # the first is pure noise, of which there is no x0
    return _event("image_generation.partial_image", **about, partial_image_index=place)


def _failure(document: Mapping[str, Any]) -> Problem:
    """What a job has failed with, or that somebody has cancelled it."""
    error = document["error"]
    if error is None:
        return Problem(409, "cancelled", "the job was cancelled")
    return Problem(error["status"], error["code"], error["detail"], error.get("errors", []))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ddpm-server"}  # 0: a directory does not say


@router.get("/models", summary="The models that are served, as OpenAI's clients ask for them")
async def model_list(request: Request) -> JSONResponse:
    """The names of all models; `GET /models` says more."""
    return JSONResponse({"object": "list", "data": [_model(name) for name in request.app.state.jobs.cards]})


@router.get("/models/{name}", summary="One model, as OpenAI's clients ask for it")
async def model_entry(request: Request, name: str) -> JSONResponse:
    """That there is such a model; `GET /models/{name}` says more."""
    cards = request.app.state.jobs.cards
    if name not in cards:
        raise NotFound(f"there is no such model; there are {', '.join(cards)}")
    return JSONResponse(_model(name))
