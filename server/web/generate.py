"""`POST /generate`: a request in, pictures out, in the media type that `Accept` asks for."""

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
from server.jobs.stream import Message, Subscriber, TextMessage, error_message
from server.web.http import from_headers, header, negotiate, read_json_body, words

router = APIRouter()
PNG, JSON, NPY, ZIP = "image/png", "application/json", "application/x-npy", "application/zip"
EVENTS = "text/event-stream"
ANIMATIONS = ("image/gif", "image/apng", "image/webp")
ANSWERS = (PNG, JSON, NPY, ZIP, EVENTS, *ANIMATIONS)
CLIENT_CLOSED_REQUEST = 499  # nobody reads it
PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": PROBLEM}
    for status, text in {
        400: "The body is not valid JSON.",
        406: "No media type that `Accept` allows can be produced.",
        409: "The job with this Idempotency-Key has not ended: see the headers Location and Retry-After.",
        413: "The body is too large.",
        415: "The body is not declared as JSON.",
        422: "A field is out of bounds (`errors` names it), or the Idempotency-Key was used with another body.",
        429: "The queue is full, or the quota is used up: see the header Retry-After.",
        503: "The server is not ready, or its disk is full: see the header Retry-After.",
        504: "The deadline was missed, or cannot be met.",
    }.items()
}


def picture(job: Job) -> bytes:
    """The PNG of a job: its picture, or a contact sheet of several."""
    if job.request.n == 1:
        return job.images[0].png
    sheet = encode.contact_sheet([job.images[i].picture for i in range(job.request.n)])
    return encode.png(sheet, job.texts(job.request.seed) | {"n": str(job.request.n)})


def archive(job: Job) -> bytes:
    """A zip of PNGs."""
    return encode.archive({f"{i:04d}-seed-{job.images[i].seed}.png": job.images[i].png for i in range(job.request.n)})


def array(job: Job) -> bytes:
    """The unrounded pictures as one npy array, [n, C, H, W] float32. Raises Gone."""
    floats = [image.floats for _, image in sorted(job.images.items()) if image.floats is not None]
    if len(floats) < job.request.n:
        raise Gone("the unrounded pictures of this job are no longer held")
    return encode.npy(floats)


def animation(job: Job, media: str) -> bytes:
    """The animation of the denoising, on contact sheets, up to the finished pictures. Raises Gone."""
    watched = job.request.frames
    assert watched is not None
    if not job.frames:
        raise Gone("the frames of this job are no longer held; the same request makes them again")
    kind: Kind = "x0" if watched.frames.kind == "x0" else "x_t"
    points = [step for step in watched.points if (0, step, kind) in job.frames and step < job.request.sampling.steps]
    sheets = [encode.contact_sheet([job.frames[i, step, kind] for i in range(job.request.n)]) for step in points]
    last = encode.contact_sheet([job.images[i].picture for i in range(job.request.n)])
    return encode.animation([*sheets, last], media)


async def draw(jobs: JobService, job: Job, media: str) -> bytes:
    """The animation. A semaphore leaves threads free to encode the frames of other jobs."""
    async with jobs.drawing:
        return await jobs.in_thread(lambda: animation(job, media))


ENCODERS: dict[str, Callable[[Job], bytes]] = {PNG: picture, NPY: array, ZIP: archive}


@router.post(
    "/generate",
    summary="Make pictures",
    response_class=Response,
    responses={200: {"content": {media: {} for media in ANSWERS}}, 202: {"content": {JSON: {}}}, **PROBLEMS},
    openapi_extra={"requestBody": {"content": {JSON: {"schema": {"$ref": "#/components/schemas/GenerateRequest"}}}}},
)
async def generate(request: Request) -> Response:
    """Makes `n` pictures. `Accept` chooses the answer: a PNG (a contact sheet if `n` > 1), the job as JSON, the
    unrounded float32 array as npy, a zip of PNGs, an animation of the denoising, or server-sent events of all that
    happens. The same request gives the same bytes. A client that disconnects cancels the job, unless it asked for an
    immediate answer with `Prefer: respond-async`."""
    jobs: JobService = request.app.state.jobs
    with jobs.admission.counting_refusals():
        media, later = negotiate(header(request, "accept"), ANSWERS), "respond-async" in words(request, "prefer")
        body = await read_json_body(request, request.app.state.settings.max_body_bytes)
        context = RequestContext(
            floats=media == NPY,
            shows=later or media == EVENTS,
            draws=media in ANIMATIONS and not later,
            later=later,
            attached=not later and media != EVENTS,
            **from_headers(request),
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
    if not await succeeds(request, jobs, job):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if media == JSON:
        return await jobs.in_thread(lambda: JSONResponse(job.document(pictures=True), headers=headers))
    if media in ANIMATIONS:
        return Response(await draw(jobs, job, media), media_type=media, headers=headers)
    return Response(await jobs.in_thread(lambda: ENCODERS[media](job)), media_type=media, headers=headers)


async def succeeds(request: Request, jobs: JobService, job: Job) -> bool:
    """Waits until a job has succeeded -> False if the client disconnects before, which leaves the job. Raises what the
    job failed with."""

    async def watch_client() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        result.cancel()

    result, client = asyncio.create_task(jobs.result(job)), asyncio.create_task(watch_client())
    try:
        await result
    except asyncio.CancelledError:
        has_left = client.done()  # else the server ends
        await jobs.leave(job)
        if not has_left:
            raise
        return False
    finally:
        client.cancel()
    return True


class ServerSent(StreamingResponse):
    """Server-sent events of a job. A client that stops reading leaves the job, which may cancel it."""

    def __init__(self, jobs: JobService, job: Job, events: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, media_type=EVENTS, headers=headers | {"Cache-Control": "no-store"})
        self._jobs, self._job = jobs, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the generator, which never starts if the client disconnects at once
            await self._jobs.leave(self._job)


async def _events(job: Job, subscriber: Subscriber, request_id: str) -> AsyncGenerator[bytes]:
    """Every message of the job; at the end, if the job was parked, the reason."""
    async with aclosing(subscriber.messages()) as messages:
        async for message in messages:
            yield await _event(message)
            await asyncio.sleep(0)  # a long replay must not starve other tasks
    if job.state is State.PARKED and job.failure is not None:
        yield await _event(error_message(job.failure, request_id, job.stream))


async def _event(message: Message) -> bytes:
    if isinstance(message, TextMessage):
        name, data = message.body["type"], message.json
    else:
        name, (header, png) = "frame" if message.passing else "image", unpack(await message.packed())
        data = json.dumps(header | {"b64_png": base64.b64encode(png).decode()})
    return f"event: {name}\nid: {message.seq}\ndata: {data}\n\n".encode()
