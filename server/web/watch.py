"""Watching over a websocket: any number of viewers of a job, or a job that lives as long as its viewer does."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import NoReturn

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from model.errors import PlanError
from server.bounds import whole_number
from server.errors import BadInput, EngineFailed, Gone, NotFound, NotReady, StorageFull, TooBusy, problem
from server.jobs.job import Job, State
from server.jobs.request import RequestContext
from server.jobs.schemas import parse_json
from server.jobs.service import JobService
from server.jobs.stream import Subscriber, Text, told_of
from server.web.http import first_of, name_of_owner, owner_of

router = APIRouter()
MESSAGES_AT_A_TIME = 8  # are sent before others have their turn: a long replay must not keep them waiting
MESSAGE_S, MESSAGES_AT_ONCE = 0.1, 50  # a viewer may say something so often, and so much without a pause
MOST_MESSAGES = 10**9 - 1  # that a job could ever have
FIRST_MESSAGE_S = 10.0  # within which a new socket has to say what it wants
SLOW_S = 1.0  # a message that takes longer to send has cost its viewer the frames of that time
STALLED_S = 10.0  # and one that takes longer than this, its viewer
DONE, WRONG_KIND, GONE, POLICY, ENGINE_FAILED, RESTARTING, TRY_LATER = 1000, 1003, 1006, 1008, 1011, 1012, 1013
BAD_REQUEST, UNKNOWN_JOB = 4400, 4404


class _Closed(Exception):
    """This socket is to be closed with a code."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@asynccontextmanager
async def _talk(socket: WebSocket) -> AsyncIterator[None]:
    """An accepted socket. Whatever ends the talk closes it, with the code that says why."""
    await socket.accept()
    try:
        try:
            yield
        except (NotFound, Gone) as error:
            raise _Closed(UNKNOWN_JOB, str(error)) from None
        except (BadInput, PlanError, TooBusy, NotReady, StorageFull, EngineFailed) as error:
            answer = problem(error)
            await _send(socket, told_of(error, socket.state.request_id).json)
            raise _Closed(BAD_REQUEST if answer.status < 429 else TRY_LATER, answer.code) from None
    except _Closed as closed:
        try:
            async with asyncio.timeout(STALLED_S):
                await socket.close(closed.code, closed.reason[:120])
        except (TimeoutError, RuntimeError, WebSocketDisconnect):
            return  # it is gone already
    except WebSocketDisconnect:
        return


@router.websocket("/jobs/{id}/stream")
async def watch_job(socket: WebSocket, id: str) -> None:
    """Watch a job from its start, or from message `after` + 1 on."""
    jobs: JobService = socket.app.state.jobs
    async with _talk(socket):
        after = whole_number("after", socket.query_params.get("after", "0"), 0, MOST_MESSAGES)
        await _watch(socket, jobs, await jobs.repository.find(id, name_of_owner(socket)), after)


@router.websocket("/generate/stream")
async def watch_new_job(socket: WebSocket) -> None:
    """The first message is the body of `POST /generate`; then watch. Closing the socket cancels the job."""
    jobs: JobService = socket.app.state.jobs
    async with _talk(socket):
        try:
            text = await asyncio.wait_for(_receive(socket), FIRST_MESSAGE_S)
        except TimeoutError:
            raise _Closed(POLICY, f"no request within {FIRST_MESSAGE_S:g} s") from None
        with jobs.admission.counting_refusals():
            job = await jobs.submit(text.encode(), RequestContext(shows=True, tenant=owner_of(socket)))
        try:
            await _watch(socket, jobs, job, 0)
        finally:
            await jobs.cancel(job)


async def _watch(socket: WebSocket, jobs: JobService, job: Job, after: int) -> NoReturn:
    """Sends what happens, does what the viewer says, to the end. Raises _Closed or WebSocketDisconnect."""
    sending = asyncio.create_task(_send_all(socket, jobs.watch(job, after)))
    listening = asyncio.create_task(_listen(socket, jobs, job))
    for task in await first_of(sending, listening):
        task.result()
    if job.state is not State.PARKED:
        raise _Closed(DONE)
    raise _Closed(ENGINE_FAILED if isinstance(job.failure, EngineFailed) else RESTARTING)


async def _send_all(socket: WebSocket, viewer: Subscriber) -> None:
    async with aclosing(viewer.messages()) as messages:
        async for message in messages:
            data = message.json if isinstance(message, Text) else await message.packed()
            began = time.monotonic()
            try:
                async with asyncio.timeout(STALLED_S):
                    await _send(socket, data)
            except TimeoutError:
                raise _Closed(TRY_LATER, "too slow") from None
            if time.monotonic() - began > SLOW_S:
                viewer.fell_behind()
            if message.seq % MESSAGES_AT_A_TIME == 0:
                await asyncio.sleep(0)


async def _listen(socket: WebSocket, jobs: JobService, job: Job) -> NoReturn:
    earliest = 0.0  # when the next message would be in time, if all had kept the pace
    while True:
        said = _understand(await _receive(socket))
        now = time.monotonic()
        earliest = max(earliest, now - MESSAGES_AT_ONCE * MESSAGE_S) + MESSAGE_S
        if earliest > now:
            raise _Closed(POLICY, f"at most {1 / MESSAGE_S:g} messages a second are listened to")
        if said == {"type": "cancel"}:
            await jobs.cancel(job)
        elif said == {"type": "ping"}:
            await _send(socket, json.dumps({"type": "pong", "job": job.id, "seq": len(job.stream.kept)}))
        else:
            raise _Closed(POLICY, 'only {"type": "cancel"} and {"type": "ping"} are understood')
        await asyncio.sleep(0)


def _understand(text: str) -> object:
    try:
        return parse_json(text.encode())
    except BadInput as error:
        raise _Closed(POLICY, str(error)) from None


async def _send(socket: WebSocket, data: str | bytes) -> None:
    """One message. Raises WebSocketDisconnect if nobody is there any more."""
    try:
        await (socket.send_text(data) if isinstance(data, str) else socket.send_bytes(data))
    except RuntimeError:  # what starlette and uvicorn say of a socket that has been closed
        raise WebSocketDisconnect(GONE) from None


async def _receive(socket: WebSocket) -> str:
    """The next message in words. Raises WebSocketDisconnect, or _Closed for one in bytes."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", DONE))
    text = message.get("text")
    if text is None:
        raise _Closed(WRONG_KIND, "messages are JSON in words")
    return str(text)
