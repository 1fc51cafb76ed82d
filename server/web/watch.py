"""Websockets: watch a job, any number of clients at once, or create a job that lives as long as its websocket."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import NoReturn

from fastapi import APIRouter, Response, WebSocket, WebSocketDisconnect

from model.errors import PlanError
from server.bounds import whole_number
from server.errors import (
    BadInput,
    EngineFailed,
    Gone,
    NotFound,
    NotReady,
    StorageFull,
    TooBusy,
    problem,
)
from server.jobs.job import Job, State
from server.jobs.request import RequestContext
from server.jobs.schemas import MAX_SEQ, Seq, parse_json
from server.jobs.service import JobService
from server.jobs.stream import Subscriber, TextMessage, error_message
from server.web.http import tenant_of
from server.web.jobs import find_job
from server.web.openapi import websocket

router = APIRouter(tags=["jobs"])
BATCH = 8  # messages sent before other tasks have their turn: a long replay must not starve them
MESSAGE_S, BURST = 0.1, 50  # a client may send one message in this time on average, and so many at once
NO_HANDSHAKE = "this is a websocket: it needs a handshake as RFC 6455 has it"
FIRST_MESSAGE_S = 10.0  # within which a new websocket must send its request
SLOW_S = 1.0  # a subscriber whose message takes longer to send misses the frames of that time
STALLED_S = 10.0  # a subscriber whose message takes longer is disconnected
DONE, WRONG_KIND, ABNORMAL_CLOSURE = 1000, 1003, 1006
POLICY, ENGINE_FAILED, RESTARTING, TRY_LATER = 1008, 1011, 1012, 1013
BAD_REQUEST, UNKNOWN_JOB = 4400, 4404


class _Close(Exception):
    """The websocket must be closed with a code."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@asynccontextmanager
async def _accepted(socket: WebSocket) -> AsyncIterator[None]:
    """Accepts a websocket, and closes it at the end, or for an error, with the code that says why."""
    await socket.accept()
    try:
        try:
            yield
        except (NotFound, Gone) as error:
            raise _Close(UNKNOWN_JOB, str(error)) from None
        except (BadInput, PlanError, TooBusy, NotReady, StorageFull, EngineFailed) as error:
            answer = problem(error)
            await _send(socket, error_message(error, socket.state.request_id).json)
            raise _Close(BAD_REQUEST if answer.status < 429 else TRY_LATER, answer.code) from None
    except _Close as close:
        try:
            async with asyncio.timeout(STALLED_S):
                await socket.close(close.code, close.reason[:120])
        except (TimeoutError, RuntimeError, WebSocketDisconnect):
            return  # the client has disconnected
    except WebSocketDisconnect:
        return


@router.get("/jobs/{id}/stream", summary="Watch a job (websocket)", **websocket())
async def stream_job(id: str, after: Seq = None) -> Response:
    """A websocket that sends the messages of a job, from number `after` + 1 on. Closing it cancels nothing."""
    raise NotFound(NO_HANDSHAKE)


@router.websocket("/jobs/{id}/stream")
async def watch_job(socket: WebSocket, id: str, after: Seq = None) -> None:
    """Sends the messages of a job, from number `after` + 1 on."""
    async with _accepted(socket):
        passed = 0 if after is None else whole_number("after", after, 0, MAX_SEQ)
        await _watch(socket, await find_job(socket, id), passed)


@router.get("/generate/stream", summary="Make pictures and watch (websocket)", **websocket(first="GenerateRequest"))
async def stream_new_job() -> Response:
    """A websocket whose first message is the body of `POST /generate`; the messages of the job follow. Closing it
    cancels the job."""
    raise NotFound(NO_HANDSHAKE)


@router.websocket("/generate/stream")
async def watch_new_job(socket: WebSocket) -> None:
    """Creates a job from the first message, a body of `POST /generate`, and sends its messages. A disconnect cancels
    it."""
    jobs: JobService = socket.app.state.jobs
    async with _accepted(socket):
        try:
            text = await asyncio.wait_for(_receive(socket), FIRST_MESSAGE_S)
        except TimeoutError:
            raise _Close(POLICY, f"no request within {FIRST_MESSAGE_S:g} s") from None
        with jobs.admission.counting_refusals(tenant_of(socket)):
            job = await jobs.submit(text.encode(), RequestContext(shows=True, tenant=tenant_of(socket)))
        try:
            await _watch(socket, job, 0)
        finally:
            with suppress(StorageFull):  # nobody waits for the disk
                await jobs.cancel(job)


async def _watch(socket: WebSocket, job: Job, after: int) -> NoReturn:
    """Sends messages and obeys the client's, to the end. Raises _Close or WebSocketDisconnect."""
    sending = asyncio.create_task(_send_all(socket, socket.app.state.jobs.watch(job, after)))
    listening = asyncio.create_task(_listen(socket, job))
    for task in await _first_of(sending, listening):
        task.result()
    if job.state is not State.PARKED:
        raise _Close(DONE)
    raise _Close(ENGINE_FAILED if isinstance(job.failure, EngineFailed) else RESTARTING)


async def _first_of(*tasks: "asyncio.Task[None]") -> "set[asyncio.Task[None]]":
    """The tasks that have ended, as soon as there is one; the others are cancelled and have ended on return."""
    try:
        return (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]
    finally:
        for task in tasks:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # or asyncio would report that nobody retrieved it


async def _send_all(socket: WebSocket, subscriber: Subscriber) -> None:
    now = asyncio.get_running_loop().time
    async with aclosing(subscriber.messages()) as messages:
        async for message in messages:
            data = message.json if isinstance(message, TextMessage) else await message.packed()
            began = now()
            try:
                async with asyncio.timeout(STALLED_S):
                    await _send(socket, data)
            except TimeoutError:
                raise _Close(TRY_LATER, "too slow") from None
            if now() - began > SLOW_S:
                subscriber.fell_behind()
            if message.seq % BATCH == 0:
                await asyncio.sleep(0)


async def _listen(socket: WebSocket, job: Job) -> None:
    due = 0.0  # when the next message is in time, if all came at an even pace
    while True:
        try:
            said = parse_json((await _receive(socket)).encode())
        except BadInput as error:
            raise _Close(POLICY, str(error)) from None
        now = asyncio.get_running_loop().time()
        due = max(due, now - BURST * MESSAGE_S) + MESSAGE_S
        if due > now:
            raise _Close(POLICY, f"at most {1 / MESSAGE_S:g} messages a second are listened to")
        if said == {"type": "cancel"}:
            await socket.app.state.jobs.cancel(job)
        elif said == {"type": "ping"}:
            await _send(socket, json.dumps({"type": "pong", "job": job.id, "seq": len(job.stream.kept)}))
        else:
            raise _Close(POLICY, 'only {"type": "cancel"} and {"type": "ping"} are understood')
        await asyncio.sleep(0)


async def _send(socket: WebSocket, data: str | bytes) -> None:
    """Sends one message. Raises WebSocketDisconnect if the client has disconnected."""
    try:
        await (socket.send_text(data) if isinstance(data, str) else socket.send_bytes(data))
    except RuntimeError:  # of starlette and uvicorn, for a closed websocket
        raise WebSocketDisconnect(ABNORMAL_CLOSURE) from None


async def _receive(socket: WebSocket) -> str:
    """The next text message. Raises WebSocketDisconnect, or _Close for a binary message."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", DONE))
    text = message.get("text")
    if text is None:
        raise _Close(WRONG_KIND, "messages are JSON in words")
    return str(text)
