"""Watching over a websocket: any number of viewers of a job, or a job that lives as long as its viewer does."""

import asyncio
import json
import time
from contextlib import aclosing
from typing import Any, NoReturn

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from model.errors import PlanError
from server.errors import BadInput, EngineFailed, Gone, NotFound, NotReady, TooBusy, problem
from server.feed import Text, Viewer
from server.job import Job
from server.jobs import Jobs
from server.routes.http import first_of
from server.schemas import parse_json

router = APIRouter()
FIRST_MESSAGE_S = 10.0  # within which a new socket has to say what it wants
SLOW_S = 1.0  # a message that takes longer to send has cost its viewer the frames of that time
STALLED_S = 10.0  # and one that takes longer than this, its viewer
DONE, WRONG_KIND, POLICY, ENGINE_FAILED, TRY_LATER = 1000, 1003, 1008, 1011, 1013
BAD_REQUEST, UNKNOWN_JOB = 4400, 4404


class _Closed(Exception):
    """This socket is to be closed with a code."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@router.websocket("/jobs/{id}/stream")
async def watch_job(socket: WebSocket, id: str) -> None:
    """Watch a job from its start, or from message `after` + 1 on."""
    jobs: Jobs = socket.app.state.jobs
    await socket.accept()
    try:
        job = jobs.find(id)
        await _watch(socket, jobs, job, _after(socket.query_params.get("after")))
    except (NotFound, Gone) as error:
        await _close(socket, UNKNOWN_JOB, str(error))
    except _Closed as closed:
        await _close(socket, closed.code, closed.reason)
    except WebSocketDisconnect:
        return


@router.websocket("/generate/stream")
async def watch_new_job(socket: WebSocket) -> None:
    """The first message is the body of `POST /generate`; then watch. Closing the socket cancels the job."""
    jobs: Jobs = socket.app.state.jobs
    await socket.accept()
    job: Job | None = None
    try:
        text = await asyncio.wait_for(_receive(socket), FIRST_MESSAGE_S)
        job = await jobs.submit(text.encode(), shows=True)
        await _watch(socket, jobs, job, 0)
    except TimeoutError:
        await _close(socket, POLICY, f"no request within {FIRST_MESSAGE_S:g} s")
    except (BadInput, PlanError, TooBusy, NotReady, EngineFailed) as error:
        answer = problem(error)
        await socket.send_text(json.dumps({"type": "error", "problem": answer.body("")}))
        await _close(socket, BAD_REQUEST if answer.status < 429 else TRY_LATER, answer.code)
    except _Closed as closed:
        await _close(socket, closed.code, closed.reason)
    except WebSocketDisconnect:
        return
    finally:
        if job is not None:
            await jobs.cancel(job)


def _after(given: str | None) -> int:
    if given is None:
        return 0
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise _Closed(BAD_REQUEST, "after must be the number of a message")
    return int(given)


async def _watch(socket: WebSocket, jobs: Jobs, job: Job, after: int) -> None:
    """Sends what happens, does what the viewer says, to the end. Raises _Closed or WebSocketDisconnect."""
    sending = asyncio.create_task(_send_all(socket, jobs.watch(job, after)))
    listening = asyncio.create_task(_listen(socket, jobs, job))
    done = await first_of(sending, listening)
    for task in done:
        task.result()
    failed = job.status == "failed" and isinstance(job.failure, EngineFailed)
    await _close(socket, ENGINE_FAILED if failed else DONE, "")


async def _send_all(socket: WebSocket, viewer: Viewer) -> None:
    async with aclosing(viewer.messages()) as messages:
        async for message in messages:
            began = time.monotonic()
            try:
                async with asyncio.timeout(STALLED_S):
                    if isinstance(message, Text):
                        await socket.send_text(message.json)
                    else:
                        await socket.send_bytes(await message.packed())
            except TimeoutError:
                raise _Closed(TRY_LATER, "too slow") from None
            if time.monotonic() - began > SLOW_S:
                viewer.fell_behind()


async def _listen(socket: WebSocket, jobs: Jobs, job: Job) -> NoReturn:
    while True:
        said: Any = parse_json_message(await _receive(socket))
        if said == {"type": "cancel"}:
            await jobs.cancel(job)
        elif said == {"type": "ping"}:
            await socket.send_text(json.dumps({"type": "pong"}))
        else:
            raise _Closed(POLICY, 'only {"type": "cancel"} and {"type": "ping"} are understood')


def parse_json_message(text: str) -> object:
    """What a viewer says. Raises _Closed if it is not JSON."""
    try:
        return parse_json(text.encode())
    except BadInput as error:
        raise _Closed(POLICY, str(error)) from None


async def _receive(socket: WebSocket) -> str:
    """The next message in words. Raises WebSocketDisconnect, or _Closed for one in bytes."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", DONE))
    text = message.get("text")
    if text is None:
        raise _Closed(WRONG_KIND, "messages are JSON in words")
    return str(text)


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    try:
        async with asyncio.timeout(STALLED_S):
            await socket.close(code, reason[:120])
    except (TimeoutError, RuntimeError, WebSocketDisconnect):
        return  # it is gone already
