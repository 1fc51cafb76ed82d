"""Connections: what uvicorn leaves unbounded is bounded here, before any of it becomes a request.

uvicorn has one timeout (between two requests) and no cap on heads, on pipelines, or on what a websocket may say. These
are its own protocols with a time for each part of a request, and a number of bytes for all of it.
"""

import asyncio
import http
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.http11 import Response
from websockets.server import ServerProtocol

from server.errors import HeadTooLarge, Malformed, Problem, ServerError, TargetTooLong, TooManyConnections, TooSlow
from server.errors import problem as problem_of

MAX_TARGET_BYTES = 4096  # path and query
MAX_HEADER_BYTES, MAX_HEADERS_BYTES, MAX_HEADERS = 8000, 32 << 10, 100  # one of them, all of them, how many
MAX_HEAD_BYTES = MAX_TARGET_BYTES + MAX_HEADERS_BYTES
SLACK_BYTES = 1 << 20  # of a body that is too large, read so that the answer can be, and of what chunks are wrapped in
PIPELINED = 16  # requests of one connection that wait for their turn
RESERVE, RESERVE_S = 64, 2.0  # connections beyond the cap that may ask for /healthz, and how long they may take
PROBE = b"/healthz"
SAID_AT_ONCE, SAID_PER_S = 64 << 10, 16 << 10  # bytes that a websocket may say, besides two bodies
POLICY = 1008


@dataclass(slots=True, eq=False)
class Caps:
    """What connections may take. `refused` hears the code of everything that is refused."""

    connections: int
    body_bytes: int
    request_s: float
    refused: Callable[[str], None]
    beyond: "dict[Connection, None]" = field(default_factory=dict)  # connections beyond the cap, the oldest first


class Config(uvicorn.Config):
    """uvicorn's configuration, and the caps of its connections."""

    def __init__(self, app: Any, caps: Caps, **knobs: Any) -> None:
        super().__init__(app, http=Connection, ws=Socket, **knobs)
        self.caps = caps


def _document(answer: Problem) -> tuple[list[tuple[str, str]], bytes]:
    """The headers and the body of a problem whose connection is closed after it."""
    id = secrets.token_hex(8)
    body = json.dumps(answer.body(id)).encode()
    headers = {
        "date": formatdate(usegmt=True),
        "content-type": "application/problem+json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        "connection": "close",
        "x-request-id": id,
    }
    return [*(headers | answer.headers).items()], body


class Connection(HttpToolsProtocol):
    """A connection over which requests come, one after the other."""

    def __init__(self, config: Config, *more: Any, **others: Any) -> None:
        super().__init__(config, *more, **others)
        self._caps = config.caps
        self._refusal: ServerError | None = None  # why the parser was stopped; None: it stopped by itself
        self._clock: asyncio.TimerHandle | None = None
        self._in_head, self._received, self._headers_bytes = True, 0, 0  # of the request that is being read
        self._running: RequestResponseCycle | None = None  # the request that is being answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        caps = self._caps
        if len(self.connections) <= caps.connections:
            return self._start_clock(caps.request_s)
        caps.beyond[self] = None
        if len(caps.beyond) > RESERVE:
            next(iter(caps.beyond)).transport.abort()
        self._start_clock(min(RESERVE_S, caps.request_s))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._caps.beyond.pop(self, None)
        self.pipeline.clear()
        if self._running is not None and self._running is not self.cycle:  # which uvicorn would not tell of it
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _start_clock(self, seconds: float) -> None:
        self._stop_clock()
        self._clock = self.loop.call_later(seconds, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        if self._received == 0:
            return self.transport.close()  # nothing was asked, nothing is answered
        part = "head" if self._in_head else "body"
        self._refuse(TooSlow(f"the {part} of a request must arrive within {self._caps.request_s:g} s"))

    def _refuse(self, error: ServerError) -> None:
        """Answers, if it is this request's turn, and closes."""
        self._stop_clock()
        answer = problem_of(error)
        self._caps.refused(answer.code)
        running = self._running
        if running is None or running.response_complete or (running is self.cycle and not running.response_started):
            headers, body = _document(answer)
            lines = [f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in headers]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        if running is not None:
            running.disconnected = True
            running.message_event.set()
        self.pipeline.clear()
        self.transport.close()

    def _stop(self, error: ServerError) -> None:
        """Ends parsing, from within one of the parser's callbacks: it comes back to `send_400_response`."""
        self._refusal = error
        raise error

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or Malformed("this is not a request as RFC 9112 has it"))

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._received > MAX_HEAD_BYTES + SAID_AT_ONCE:
            self._refuse(HeadTooLarge(f"the head of a request must have at most {MAX_HEAD_BYTES} bytes"))
        elif self._received > MAX_HEAD_BYTES + 8 * self._caps.body_bytes + SLACK_BYTES:
            self.transport.close()  # it has been refused, and goes on all the same

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._received, self._headers_bytes = True, 1, 0
        self._start_clock(RESERVE_S if self in self._caps.beyond else self._caps.request_s)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            self._stop(TargetTooLong(f"path and query must have at most {MAX_TARGET_BYTES} bytes together"))

    def on_header(self, name: bytes, value: bytes) -> None:
        size = len(name) + len(value) + 4
        self._headers_bytes += size
        if size > MAX_HEADER_BYTES or self._headers_bytes > MAX_HEADERS_BYTES or len(self.headers) >= MAX_HEADERS:
            limits = f"{MAX_HEADERS} headers, of {MAX_HEADER_BYTES} bytes each and {MAX_HEADERS_BYTES} in all"
            self._stop(HeadTooLarge(f"a request may have at most {limits}"))
        if self._in_head:  # what comes behind a body must not change what was decided before it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_clock()
        self._check_target()
        if len(self.pipeline) >= PIPELINED:
            self._stop(Malformed(f"at most {PIPELINED} requests may wait for the answer to the one before"))
        spare = self in self._caps.beyond
        if spare and self.url != PROBE:
            most = self._caps.connections
            self._stop(TooManyConnections(f"there are {most} connections, as many as may be"))
        super().on_headers_complete()
        if spare:
            self.cycle.keep_alive = False

    def _check_target(self) -> None:
        """A path, or a whole URL of the host that the request is for (RFC 9112, 3.2.2), over HTTP 1.0 or 1.1."""
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            self._stop(Malformed("requests are HTTP/1.1"))
        hosts = [value.lower() for name, value in self.headers if name == b"host"]
        start = b"" if self.url.startswith(b"/") else self.url.lower().partition(b"://")[2].partition(b"/")[0]
        if not self.url.isascii() or (not self.url.startswith(b"/") and [start] != hosts):
            self._stop(Malformed("the target of a request must be a path, in ASCII"))

    def on_message_complete(self) -> None:
        self._stop_clock()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if cycle.more_body:
            self._start_clock(self._caps.request_s)
        super()._start_asgi_task(cycle, app)

    def handle_websocket_upgrade(self) -> None:
        self._stop_clock()
        self._caps.beyond.pop(self, None)
        super().handle_websocket_upgrade()


class _Handshake(ServerProtocol):
    """The websocket protocol, which does not repeat what is wrong with a handshake."""

    def reject(self, status: Any, text: str) -> Response:
        status = http.HTTPStatus(status)
        words = "this is not a websocket handshake as RFC 6455 has it" if status < 500 else "an error, which was logged"
        headers, body = _document(Problem(status.value, "malformed" if status < 500 else "internal", words))
        return Response(status.value, status.phrase, Headers(headers), body)


class Socket(WebSocketsSansIOProtocol):
    """A websocket, which may say little: two bodies, and so many bytes a second."""

    def __init__(self, config: Config, *more: Any, **others: Any) -> None:
        super().__init__(config, *more, **others)
        self._caps = config.caps
        self.conn = _Handshake(max_size=config.ws_max_size, logger=self.logger)
        self._may_say = float(MAX_HEAD_BYTES + 2 * config.caps.body_bytes + SAID_AT_ONCE)  # bytes, as of `_heard_at`
        self._most, self._heard_at = self._may_say, self.loop.time()

    def data_received(self, data: bytes) -> None:
        now = self.loop.time()
        self._may_say = min(self._most, self._may_say + (now - self._heard_at) * SAID_PER_S) - len(data)
        self._heard_at = now
        if self._may_say >= 0:
            super().data_received(data)
        elif not self.transport.is_closing():
            self._end(POLICY, "more was said than is listened to")

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # uvicorn would log where it came from
                return self._end(1007, "messages are UTF-8")
        super().send_receive_event_to_app()

    def _end(self, code: int, reason: str) -> None:
        """Says why, if it was not said already, and closes without listening to the end."""
        if self.handshake_complete and not self.close_sent:
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self._caps.refused("malformed")
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.close()
