"""`POST /generate`: a request in, pictures out, in the media type that `Accept` asks for."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial

from ddpm_client.wire import unpack
from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Message as ASGIMessage
from starlette.types import Receive, Scope, Send

from model.engine.events import Picture
from server.bounds import whole_number
from server.documents import JobDocument, Kind
from server.errors import Gone, Invalid, Malformed
from server.jobs import encode
from server.jobs.job import Job, State
from server.jobs.request import RequestContext
from server.jobs.schemas import MAX_SEQ
from server.jobs.service import JobService
from server.jobs.stream import Message, Subscriber, TextMessage, error_message
from server.web.http import EVENTS, directives, from_headers, header, negotiate, read_json_body, tenant_of
from server.web.openapi import FILE, JOB_EVENTS, JSON, asks, event_stream, refusals, schema, sends

router = APIRouter(tags=["pictures"])
PNG, NPY, ZIP = "image/png", "application/x-npy", "application/zip"
ANIMATIONS = ("image/gif", "image/apng", "image/webp")
ANSWERS = (PNG, JSON, NPY, ZIP, EVENTS, *ANIMATIONS)
CONTENT = dict.fromkeys((PNG, NPY, ZIP, *ANIMATIONS), {"schema": FILE}) | {
    JSON: {"schema": schema("JobWithPngs")},
    EVENTS: event_stream(JOB_EVENTS),
}
BEAT_S = 15.0  # of silence, after which a stream of events has a comment
CLIENT_CLOSED_REQUEST = 499  # nobody reads it
MADE = ("X-Job-Id", "X-Seed", "X-Cache?", "Vary", "Cache-Control?")  # headers of pictures


def picture(job: Job) -> bytes:
    """The PNG of a job: its picture, or a contact sheet of several."""
    if job.request.n == 1:
        return job.images[0].png
    sheet = encode.contact_sheet([job.images[i].picture for i in range(job.request.n)])
    return encode.png(sheet, job.sheet_texts)


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
    """The animation of the denoising, on contact sheets, up to the finished pictures; x_t and x0 side by side if both
    were asked for. Raises Gone."""
    watched = job.request.frames
    assert watched is not None
    if not job.frames:
        raise Gone("the frames of this job are no longer held; the same request makes them again")
    kinds: Sequence[Kind] = ("x_t", "x0") if watched.frames.kind == "both" else (watched.frames.kind,)
    points = [
        step for step in watched.points if (0, step, kinds[0]) in job.frames and step < job.request.sampling.steps
    ]
    finished = [job.images[i].picture for i in range(job.request.n)]
    shown: list[list[list[Picture | None]]] = [  # by point, picture and kind; before the first step there is no x0
        [[job.frames.get((i, step, kind)) for kind in kinds] for i in range(job.request.n)] for step in points
    ]
    shown.append([[picture] * len(kinds) for picture in finished])
    sheets = [encode.contact_sheet([encode.side_by_side(each) for each in pictures]) for pictures in shown]
    return encode.animation(sheets, media)


async def draw(jobs: JobService, job: Job, media: str) -> bytes:
    """The animation. A semaphore leaves threads free to encode the frames of other jobs."""
    async with jobs.drawing:
        return await jobs.in_thread(lambda: animation(job, media))


ENCODERS: dict[str, Callable[[Job], bytes]] = {PNG: picture, NPY: array, ZIP: archive}


@router.post(
    "/generate",
    summary="Make pictures",
    response_class=Response,
    responses={
        200: {"description": "What `Accept` asks for.", "content": CONTENT, **sends(*MADE)},
        202: {
            "description": "The job, with `Prefer: respond-async`.",
            "model": JobDocument,
            **sends(*MADE, "Location", "Preference-Applied"),
        },
        **refusals(404, 406, 409, 410, 415, 429, 504),
    },
    openapi_extra=asks("Accept", "Prefer", "Idempotency-Key", "Cache-Control", "Last-Event-ID", body="GenerateRequest"),
)
async def generate(request: Request) -> Response:
    """Makes `n` pictures. `Accept` chooses the answer: a PNG (a contact sheet if `n` > 1), the job as JSON, the
    unrounded float32 array as npy, a zip of PNGs, an animation of the denoising, or server-sent events of all that
    happens. The same request gives the same bytes. A client that disconnects cancels the job, unless it asked for an
    immediate answer with `Prefer: respond-async`."""
    jobs: JobService = request.app.state.jobs
    with jobs.admission.counting_refusals(tenant_of(request)):
        media, preferred = negotiate(header(request, "accept"), ANSWERS), directives(request, "prefer")
        later = preferred.get("respond-async") == ""  # the other preferences are ignored (RFC 7240, 2)
        body = await read_json_body(request, request.app.state.settings.max_body_bytes)
        context = RequestContext(
            floats=media == NPY,
            shows=later or media == EVENTS,
            draws=media in ANIMATIONS and not later,
            later=later,
            attached=not later and media != EVENTS,
            **from_headers(request),
        )
        passed = _passed(request, media == EVENTS and not later, context.key)
        job = await jobs.submit(body or b"{}", context)
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.request.seed), "Vary": "Accept, Prefer"}
    if job.cached:
        headers["X-Cache"] = "hit"
    if later:
        headers |= {"Location": job.path, "Preference-Applied": "respond-async"}
        return JSONResponse(jobs.document(job), 202, headers)
    if media == EVENTS:
        sent = sent_events(job, jobs.watch(job, passed), request.state.request_id)
        return ServerSent(sent, headers, partial(jobs.leave, job))
    if not await succeeds(request, jobs, job):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if media == JSON:
        return await jobs.in_thread(lambda: JSONResponse(job.document(pictures=True), headers=headers))
    if media in ANIMATIONS:
        return Response(await draw(jobs, job, media), media_type=media, headers=headers)
    return Response(await jobs.in_thread(lambda: ENCODERS[media](job)), media_type=media, headers=headers)


def last_event_id(request: Request) -> int | None:
    """The number of the message behind which a client that reconnects continues. Raises Invalid."""
    if (last := header(request, "last-event-id")) is None:
        return None
    try:
        return whole_number("Last-Event-ID", last, 0, MAX_SEQ)
    except Invalid as error:
        raise Invalid(("", str(error))) from None  # a pointer leads into the body


def _passed(request: Request, streams: bool, key: str | None) -> int:
    """The number of the message behind which a stream continues. Raises Invalid, Malformed."""
    passed = last_event_id(request) or 0
    if passed and not streams:
        raise Malformed(f"Last-Event-ID is for answers as {EVENTS}")
    if passed and key is None:
        raise Malformed("Last-Event-ID needs the Idempotency-Key of the request that it continues")
    return passed


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
    """Server-sent events. leave: is called when they have ended or the client has disconnected."""

    def __init__(
        self, events: AsyncGenerator[bytes], headers: dict[str, str], leave: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        at_once = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would keep events until it has many
        super().__init__(events, media_type=EVENTS, headers=headers | at_once)
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the generator, which never starts if the client disconnects at once
            if self._leave is not None:
                await self._leave()

    async def stream_response(self, send: Send) -> None:
        """Sends the events, and a comment when there was none for so long that a proxy might close the connection."""
        sent = 0

        async def counted(message: ASGIMessage) -> None:
            nonlocal sent
            await send(message)
            sent += 1

        async def beat() -> None:
            while True:
                before = sent
                await asyncio.sleep(BEAT_S)
                if sent == before:
                    await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})

        beating = asyncio.create_task(beat())
        try:
            await super().stream_response(counted)
        finally:
            beating.cancel()


async def sent_events(
    job: Job, subscriber: Subscriber, request_id: str, retry_ms: int | None = None
) -> AsyncGenerator[bytes]:
    """Every message of the job; at the end, if the job was parked, the reason. retry_ms: before a client reconnects"""
    if retry_ms is not None:
        yield f"retry: {retry_ms}\n\n".encode()
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
