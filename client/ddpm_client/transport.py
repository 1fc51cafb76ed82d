"""What both transports share: the server's address, the options for httpx and websockets, what their errors mean."""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import httpx
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from ddpm_client.errors import DONE, ClientError, Response, TimedOut, Unreachable, close_error, refusal_in
from ddpm_client.protocol import Receive, Send, T

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0  # of silence
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_S = 10.0  # until a connection is open
MAX_MESSAGE_BYTES = 1 << 28  # a picture is much smaller
TIMEOUTS = (TimeoutError, asyncio.TimeoutError, httpx.TimeoutException)  # the first two differ in Python 3.10
ERRORS = (httpx.TransportError, WebSocketException, OSError, *TIMEOUTS)


class Address:
    """A server's URL and the API key for it. Raises ValueError."""

    def __init__(self, url: str, key: str | None) -> None:
        parsed, key = _parse(url), (key or "").strip()  # a key file ends with a newline
        if not (key.isascii() and key.isprintable()):
            raise ValueError("a key consists of visible ASCII characters")
        self.url, self.headers = str(parsed).rstrip("/"), {"Authorization": f"Bearer {key}"} if key else {}
        self.use_proxies = parsed.host not in LOOPBACK  # those of the environment; none leads to this machine

    def http_options(self) -> dict[str, Any]:
        """The arguments for an httpx client."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        return {"base_url": self.url, "headers": self.headers, "limits": limits, "trust_env": self.use_proxies}

    def websocket_options(self, effect: Receive) -> dict[str, Any]:
        """The arguments for websockets' `connect`."""
        return {
            "uri": f"ws{self.url.removeprefix('http')}{effect.path}",
            "additional_headers": self.headers,
            "compression": None,  # PNGs are compressed already
            "max_size": MAX_MESSAGE_BYTES,
            "open_timeout": min(effect.timeout_s, CONNECT_S),
            "close_timeout": 1,
            **({} if self.use_proxies else {"proxy": None}),
        }


def _parse(url: str) -> httpx.URL:
    """Raises a ValueError that does not repeat the URL, which may contain a password."""
    with suppress(httpx.InvalidURL):
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host and (parsed.port is None or 0 < parsed.port < 1 << 16):
            return parsed
    raise ValueError("the URL of a server is like http://127.0.0.1:8000 or https://example.com")


def request_options(effect: Send) -> dict[str, Any]:
    """The arguments for httpx's `request`. Raises ValueError for NaN and infinity, which JSON lacks."""
    timeout = httpx.Timeout(effect.timeout_s, connect=min(effect.timeout_s, CONNECT_S))
    return dict(method=effect.method, url=effect.path, json=effect.json, headers=effect.headers, timeout=timeout)


def reply_for(error: Exception) -> ClientError | None:
    """What one of ERRORS means for a flow; None if the server closed a websocket that has no more messages."""
    if isinstance(error, InvalidStatus):
        headers = {name.lower(): value for name, value in error.response.headers.raw_items()}
        return refusal_in(Response(error.response.status_code, headers, bytes(error.response.body or b"")))
    if isinstance(error, ConnectionClosed):
        code, reason = (error.rcvd.code, error.rcvd.reason) if error.rcvd is not None else (None, "")
        return None if code == DONE else close_error(code, reason)
    if isinstance(error, TIMEOUTS):
        return TimedOut("the server has said nothing for too long")
    return Unreachable(f"the server cannot be reached: {error}")


async def within(seconds: float, coroutine: Awaitable[T]) -> T:
    """The coroutine's result. Raises TimeoutError. Before Python 3.12 asyncio.wait_for can swallow a cancellation."""
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()
