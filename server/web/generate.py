"""`POST /generate`: a seed and a step count in, a picture out, in whatever form `Accept` asks for."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from ddpm_client.wire import unpack
from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import Gone
from server.jobs import encode
from server.jobs.job import Job, Kind, State
from server.jobs.request import RequestContext
from server.jobs.service import JobService
from server.jobs.stream import Message, Subscriber, Text, told_of
from server.web.http import (
    header,
    idempotency_key,
    makes_again,
    negotiate,
    owner_of,
    prefers,
    read_json_body,
    unless_gone,
)

router = APIRouter()
PNG, JSON, NPY, ZIP = "image/png", "application/json", "application/x-npy", "application/zip"
EVENTS = "text/event-stream"
ANIMATIONS = ("image/gif", "image/apng", "image/webp")
ANSWERS = (PNG, JSON, NPY, ZIP, EVENTS, *ANIMATIONS)
CLIENT_CLOSED_REQUEST = 499  # nobody is there to read it; for the log
PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": PROBLEM}
    for status, text in {
        400: "the body is not JSON",
        406: "no such answer",
        409: "the job that came with this Idempotency-Key has not ended; Location, Retry-After",
        413: "the body is too large",
        415: "the body is not declared as JSON",
        422: "a field is out of bounds; `errors` names it. Or the Idempotency-Key came with another body before",
        429: "the queue is full; Retry-After says for how long",
        503: "not ready, or the disk is full; Retry-After",
        504: "the deadline has passed",
    }.items()
}


def picture(job: Job) -> bytes:
    """The picture, or all of them on a contact sheet."""
    if job.request.n == 1:
        return job.images[0].png
    sheet = encode.contact_sheet([job.images[i].picture for i in range(job.request.n)])
    return encode.png(sheet, job.texts(job.request.seed) | {"n": str(job.request.n)})


def archive(job: Job) -> bytes:
    """The pictures as PNGs in a zip."""
    return encode.archive({f"{i:04d}-seed-{job.images[i].seed}.png": job.images[i].png for i in range(job.request.n)})


def array(job: Job) -> bytes:
    """The pictures as one array."""
    floats = [image.floats for _, image in sorted(job.images.items()) if image.floats is not None]
    if len(floats) < job.request.n:
        raise Gone("the unrounded pictures of this job are no longer held")
    return encode.npy(floats)


def animation(job: Job, media: str) -> bytes:
    """The denoising, all pictures side by side, ending on the finished ones."""
    chosen = job.request.frames
    assert chosen is not None
    if not job.frames:
        raise Gone("the frames of this job are no longer held; the same request makes them again")
    kind: Kind = "x0" if chosen.frames.kind == "x0" else "x_t"
    points = [step for step in chosen.points if (0, step, kind) in job.frames and step < job.request.sampling.steps]
    sheets = [encode.contact_sheet([job.frames[i, step, kind] for i in range(job.request.n)]) for step in points]
    last = encode.contact_sheet([job.images[i].picture for i in range(job.request.n)])
    return encode.animation([*sheets, last], media)


async def draw(jobs: JobService, job: Job, media: str) -> bytes:
    """The animation. Few are drawn at once, so that frames of others need not wait for a thread."""
    async with jobs.drawing:
        return await asyncio.to_thread(animation, job, media)


ENCODERS: dict[str, Callable[[Job], bytes]] = {PNG: picture, NPY: array, ZIP: archive}


@router.post(
    "/generate",
    summary="Make pictures",
    response_class=Response,
    responses={200: {"content": {media: {} for media in ANSWERS}}, 202: {"content": {JSON: {}}}, **PROBLEMS},
    openapi_extra={"requestBody": {"content": {JSON: {"schema": {"$ref": "#/components/schemas/GenerateRequest"}}}}},
)
async def generate(request: Request) -> Response:
    """Makes `n` pictures and answers as `Accept` asks: a PNG (or a contact sheet), the job as JSON, the unrounded
    float32 array as npy, a zip of PNGs, the denoising as an animation, or all that happens as server-sent events.
    The same request gives the same bytes. A caller that leaves cancels, unless it asked by `Prefer: respond-async`
    for an answer at once."""
    jobs: JobService = request.app.state.jobs
    later = prefers(request, "respond-async")
    with jobs.admission.counting_refusals():
        media = negotiate(header(request, "accept"), ANSWERS)
        body = await read_json_body(request, request.app.state.settings.max_body_bytes)
        context = RequestContext(
            floats=media == NPY,
            shows=later or media == EVENTS,
            draws=media in ANIMATIONS and not later,
            later=later,
            attached=not later and media != EVENTS,
            again=makes_again(request),
            key=idempotency_key(request),
            tenant=owner_of(request),
        )
        job = await jobs.submit(body or b"{}", context)
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.request.seed), "Vary": "Accept, Prefer"}
    if job.cached:
        headers["X-Cache"] = "hit"
    if later:
        headers |= {"Location": f"/jobs/{job.id}", "Preference-Applied": "respond-async"}
        return JSONResponse(jobs.document(job), 202, headers)
    if media == EVENTS:
        return ServerSent(jobs, job, _events(job, jobs.watch(job), request.state.request_id), headers)
    try:
        if await unless_gone(request, jobs.result(job)) is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        await jobs.leave(job)
    if media == JSON:
        return await asyncio.to_thread(lambda: JSONResponse(job.document(pictures=True), headers=headers))
    if media in ANIMATIONS:
        return Response(await draw(jobs, job, media), media_type=media, headers=headers)
    return Response(await asyncio.to_thread(ENCODERS[media], job), media_type=media, headers=headers)


class ServerSent(StreamingResponse):
    """What happens to a job, as server-sent events. Whoever stops reading cancels it."""

    def __init__(self, jobs: JobService, job: Job, events: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, media_type=EVENTS, headers=headers | {"Cache-Control": "no-store"})
        self._jobs, self._job = jobs, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # here, not in the generator: of a caller who leaves at once, that is never begun
            await self._jobs.leave(self._job)


async def _events(job: Job, viewer: Subscriber, request_id: str) -> AsyncGenerator[bytes]:
    """Everything that happens; or, at the end, why no more of it will be told by this server."""
    async with aclosing(viewer.messages()) as messages:
        async for message in messages:
            yield await _event(message)
            await asyncio.sleep(0)  # a long replay must not keep the others waiting
    if job.state is State.PARKED and job.failure is not None:
        yield await _event(told_of(job.failure, request_id, job.stream))


async def _event(message: Message) -> bytes:
    if isinstance(message, Text):
        name, data = message.body["type"], message.json
    else:
        name, (header, png) = "frame" if message.passing else "image", unpack(await message.packed())
        data = json.dumps(header | {"b64_png": base64.b64encode(png).decode()})
    return f"event: {name}\nid: {message.seq}\ndata: {data}\n\n".encode()
