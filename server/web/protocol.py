"""uvicorn's protocols for HTTP and websockets, with limits that uvicorn does not have.

uvicorn limits only the time between two requests. Here parts of a request, pipelines and websockets have limits, too.
"""

import asyncio
import http
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.http11 import Response
from websockets.server import ServerProtocol

from server import errors
from server.troubles import Troubles
from server.web.hosts import targets
from server.web.http import closing, too_large

MAX_TARGET_BYTES = 4096  # path and query
MAX_HEADER_BYTES, MAX_HEADERS_BYTES, MAX_HEADERS = 8000, 32 << 10, 100  # one header, all headers, their number
MAX_HEAD_BYTES = MAX_TARGET_BYTES + MAX_HEADERS_BYTES
SLACK_BYTES = 1 << 20  # of a refused body that are read before the connection is cut, and of chunk headers
MAX_PIPELINED = 16  # requests of a connection that wait for the response before theirs
RESERVED, RESERVED_S = 64, 2.0  # connections beyond the limit, for health checks alone, and their time
PROBE, CONNECTIONS = b"/healthz", "connections"
LINGER_S = 2.0  # for which a client that was refused may go on sending its body, before the connection is cut
BURST_BYTES, BYTES_PER_S = 64 << 10, 16 << 10  # that a websocket may send besides two bodies
INVALID_TEXT, POLICY = 1007, 1008


@dataclass(slots=True, eq=False, kw_only=True)
class Limits:
    """The limits of all connections together and of each. refused: is called with the code of every refusal."""

    connections: int
    body_bytes: int
    request_s: float  # for the head of a request, and again for its body
    refused: Callable[[str], None]
    cors: Callable[[list[tuple[bytes, bytes]]], list[tuple[bytes, bytes]]] = lambda headers: []  # of the answer
    prefix: str = ""  # of paths, as Settings.path_prefix
    troubles: Troubles = field(default_factory=Troubles)
    reserved: "dict[Connection, None]" = field(default_factory=dict)  # connections beyond the limit, oldest first


class Config(uvicorn.Config):
    """uvicorn's configuration with limits."""

    def __init__(self, app: Any, limits: Limits, **others: Any) -> None:
        super().__init__(app, http=Connection, ws=Socket, **others)
        self.limits = limits


class Connection(HttpToolsProtocol):
    """An HTTP connection."""

    def __init__(self, config: Config, *more: Any, **others: Any) -> None:
        super().__init__(config, *more, **others)
        self._limits, self.url = config.limits, b""
        self._refusal: errors.ServerError | None = None  # the error that a parser callback raised; None: a parser error
        self._timer: asyncio.TimerHandle | None = None
        self._in_head, self._received, self._headers_bytes = True, 0, 0  # of the request being read
        self._lingers = False  # a body was refused before it came, and what comes of it is dropped
        self._running: RequestResponseCycle | None = None  # the request being answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        reserved, most = self._limits.reserved, self._limits.connections
        if len(self.connections) > most:
            self._limits.troubles.begin(CONNECTIONS, f"there are {most}, as many as may be")
            reserved[self] = None
            if len(reserved) > min(RESERVED, most):
                next(iter(reserved)).transport.abort()
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._limits.reserved.pop(self, None)
        self.pipeline.clear()
        if self._running is not self.cycle:  # uvicorn tells only the last request of a pipeline
            self._disconnect_running()
        super().connection_lost(exc)
        if len(self.connections) <= self._limits.connections // 2:
            self._limits.troubles.end(CONNECTIONS)

    def _disconnect_running(self) -> None:
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def _start_timer(self) -> None:
        self._stop_timer()
        request_s = self._limits.request_s
        seconds = min(RESERVED_S, request_s) if self in self._limits.reserved else request_s
        self._timer = self.loop.call_later(seconds, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _on_timeout(self) -> None:
        if self._received == 0:
            return self.transport.close()
        part = "head" if self._in_head else "body"
        self._refuse(errors.TooSlow(f"the {part} of a request must arrive within {self._limits.request_s:g} s"))

    def _refuse(self, error: errors.ServerError) -> None:
        """Answers, if no response to an earlier request is due or under way, and closes the connection."""
        self._stop_timer()
        answer, running = errors.problem(error), self._running
        self._limits.refused(answer.code)
        if running is None or running.response_complete or (running is self.cycle and not running.response_started):
            path = self.url.decode("latin-1").removeprefix(self._limits.prefix)
            headers, body = closing(answer, path, self.headers or [])
            lines = [f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in headers]
            lines += [f"{k.decode()}: {v.decode('latin-1')}" for k, v in self._limits.cors(self.headers or [])]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._disconnect_running()
        self.pipeline.clear()
        if not isinstance(error, errors.BodyTooLarge):
            return self.transport.close()
        self.transport.write_eof()  # closed now, the connection would be reset, and many clients send before they read
        self._lingers, self._in_head, self._timer = True, False, self.loop.call_later(LINGER_S, self.transport.close)

    def _stop(self, error: errors.ServerError) -> None:
        """Ends parsing, from a callback of the parser, which then calls `send_400_response`."""
        self._refusal = error
        raise error

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or errors.Malformed("this is not a request as RFC 9112 has it"))

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if not self._lingers:
            super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._received > MAX_HEAD_BYTES + BURST_BYTES:
            self._refuse(errors.HeadTooLarge(f"the head of a request must have at most {MAX_HEAD_BYTES} bytes"))
        elif self._received > MAX_HEAD_BYTES + 8 * self._limits.body_bytes + SLACK_BYTES:
            self.transport.close()  # the body was refused, and the client goes on sending

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._received, self._headers_bytes = True, 1, 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            self._stop(errors.TargetTooLong(f"path and query must have at most {MAX_TARGET_BYTES} bytes together"))

    def on_header(self, name: bytes, value: bytes) -> None:
        size = len(name) + len(value) + 4
        self._headers_bytes += size
        if size > MAX_HEADER_BYTES or self._headers_bytes > MAX_HEADERS_BYTES or len(self.headers) >= MAX_HEADERS:
            limits = f"{MAX_HEADERS} headers, of {MAX_HEADER_BYTES} bytes each and {MAX_HEADERS_BYTES} in all"
            self._stop(errors.HeadTooLarge(f"a request may have at most {limits}"))
        if self._in_head:  # a trailer behind the body must not change what was decided before it
            super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            self._stop(errors.Malformed("requests are HTTP/1.1"))
        if not targets(self.url, [value for name, value in self.headers if name == b"host"]):
            self._stop(errors.Malformed("the target of a request must be a path, in ASCII, without a fragment"))
        if any(int(value) > self._limits.body_bytes for name, value in self.headers if name == b"content-length"):
            self._stop(too_large(self._limits.body_bytes))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(errors.Malformed(f"at most {MAX_PIPELINED} requests may wait for the answer to the one before"))
        reserved = self in self._limits.reserved
        if reserved and self.url.removeprefix(self._limits.prefix.encode()) != PROBE:
            self._stop(
                errors.TooManyConnections(f"there are {self._limits.connections} connections, as many as may be")
            )
        super().on_headers_complete()
        if reserved:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._stop_timer()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if cycle.more_body:
            self._start_timer()
        super()._start_asgi_task(cycle, app)

    def handle_websocket_upgrade(self) -> None:
        self._stop_timer()
        self._limits.reserved.pop(self, None)
        super().handle_websocket_upgrade()


class _Handshake(ServerProtocol):
    """The websocket protocol, with refusals of a handshake that do not repeat it."""

    def reject(self, status: Any, text: str) -> Response:
        status = http.HTTPStatus(status)
        words = "this is not a websocket handshake as RFC 6455 has it" if status < 500 else "an error, which was logged"
        answer = errors.Problem(status.value, "malformed" if status < 500 else "internal", words)
        headers, body = closing(answer, "", [])
        return Response(status.value, status.phrase, Headers(headers), body)


class Socket(WebSocketsSansIOProtocol):
    """A websocket, which may send two bodies and so many bytes a second."""

    def __init__(self, config: Config, *more: Any, **others: Any) -> None:
        super().__init__(config, *more, **others)
        self._limits = config.limits
        self.conn = _Handshake(max_size=config.ws_max_size, logger=self.logger)
        self._capacity = float(MAX_HEAD_BYTES + 2 * config.limits.body_bytes + BURST_BYTES)
        self._allowance, self._as_of = self._capacity, self.loop.time()  # bytes, a bucket that fills evenly

    def data_received(self, data: bytes) -> None:
        now = self.loop.time()
        self._allowance = min(self._capacity, self._allowance + (now - self._as_of) * BYTES_PER_S) - len(data)
        self._as_of = now
        if self._allowance >= 0:
            super().data_received(data)
        elif not self.transport.is_closing():
            self._end(POLICY, "more was said than is listened to")

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:  # uvicorn would log the message
                return self._end(INVALID_TEXT, "messages are UTF-8")
        super().send_receive_event_to_app()

    def _end(self, code: int, reason: str) -> None:
        """Closes the websocket with a code, without waiting for the client's close."""
        if self.handshake_complete and not self.close_sent:
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self._limits.refused("malformed")
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.close()
