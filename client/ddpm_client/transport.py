"""How the flows of a client are performed: httpx to ask, websockets to watch, and two ways to wait."""

import asyncio
import re
import time
from typing import Any, TypeVar

import httpx
from websockets.asyncio import client as asyncio_sockets
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync import client as sockets

from ddpm_client.errors import Answer, LineBroken
from ddpm_client.protocol import Ask, Flow, HangUp, Hear, Heard, Open, Rest, Wish

T = TypeVar("T")
URL = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0  # without hearing anything
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_S = 10.0  # until there is a connection
VISIBLE = re.compile(r"[ -~]*")  # what may stand in a header
MOST_BYTES = 1 << 28  # of one message: a picture is much smaller


class Address:
    """Where a server is, and by which key it is asked. Raises ValueError."""

    def __init__(self, url: str, key: str | None) -> None:
        parsed = _parsed(url)
        self.url = str(parsed).rstrip("/")
        self.sockets = "ws" + self.url.removeprefix("http")
        key = (key or "").strip()  # as a file has it, with the end of its line
        if not VISIBLE.fullmatch(key):
            raise ValueError("a key consists of visible ASCII characters")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.through_proxies = parsed.host not in LOOPBACK  # of the environment; none leads to this machine
        self.limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)


def _parsed(url: str) -> httpx.URL:
    """Raises ValueError that does not repeat it: there may be a password in it."""
    try:
        parsed = httpx.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host and (parsed.port is None or 0 < parsed.port < 1 << 16):
            return parsed
    except httpx.InvalidURL:
        pass
    raise ValueError("the URL of a server is like http://127.0.0.1:8000 or https://example.com")


def _answer(response: httpx.Response) -> Answer:
    return Answer(response.status_code, dict(response.headers), response.content)


def _asked(wish: Ask) -> dict[str, Any]:
    """A wish as httpx is told of it."""
    timeout = httpx.Timeout(wish.timeout_s, connect=min(wish.timeout_s, CONNECT_S))
    return {"json": wish.body, "headers": wish.headers, "timeout": timeout}


def _opened(wish: Open, address: Address) -> dict[str, Any]:
    """A wish as websockets is told of it."""
    timeout_s = min(wish.timeout_s, CONNECT_S)
    # Pictures are compressed already.
    knobs: dict[str, Any] = {"compression": None, "max_size": MOST_BYTES, "open_timeout": timeout_s}
    if not address.through_proxies:
        knobs["proxy"] = None
    return {"additional_headers": address.headers, "close_timeout": 1, **knobs}


def _broken(error: Exception) -> LineBroken:
    """What went wrong with a connection."""
    if isinstance(error, InvalidStatus):
        response = error.response
        headers = {name.lower(): value for name, value in response.headers.raw_items()}
        return LineBroken(str(error), Answer(response.status_code, headers, bytes(response.body or b"")))
    if isinstance(error, ConnectionClosed):
        code, reason = (error.rcvd.code, error.rcvd.reason) if error.rcvd is not None else (None, "")
        return LineBroken(reason or "the connection to the server was lost", code=code)
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return LineBroken("the server has said nothing for too long", silent=True)
    return LineBroken(f"the server cannot be reached: {error}")


class Line:
    """Performs flows, in the thread that calls it. It has at most one websocket."""

    def __init__(self, address: Address, http: httpx.Client) -> None:
        self._address, self._http = address, http
        self._socket: sockets.ClientConnection | None = None

    def run(self, flow: Flow[T]) -> T:
        """What comes of a flow."""
        heard: Heard | LineBroken = None
        while True:
            try:
                wish = flow.throw(heard) if isinstance(heard, LineBroken) else flow.send(heard)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                heard = self._perform(wish)
            except (httpx.TransportError, WebSocketException, OSError) as error:
                heard = _broken(error)

    def _perform(self, wish: Wish) -> Heard:
        match wish:
            case Ask():
                return _answer(self._http.request(wish.method, wish.path, **_asked(wish)))
            case Open():
                uri = f"{self._address.sockets}{wish.path}"
                self._socket = sockets.connect(uri, legacy=True, **_opened(wish, self._address))
            case Hear():
                assert self._socket is not None
                return self._socket.recv(wish.timeout_s)
            case HangUp():
                assert self._socket is not None
                self._socket.close()
            case Rest():
                time.sleep(wish.seconds)
        return None


class AsyncLine:
    """Performs flows on the event loop. It has at most one websocket."""

    def __init__(self, address: Address, http: httpx.AsyncClient) -> None:
        self._address, self._http = address, http
        self._socket: asyncio_sockets.ClientConnection | None = None

    async def run(self, flow: Flow[T]) -> T:
        """What comes of a flow."""
        heard: Heard | LineBroken = None
        while True:
            try:
                wish = flow.throw(heard) if isinstance(heard, LineBroken) else flow.send(heard)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                heard = await self._perform(wish)
            except (httpx.TransportError, WebSocketException, OSError) as error:
                heard = _broken(error)

    async def _perform(self, wish: Wish) -> Heard:
        match wish:
            case Ask():
                return _answer(await self._http.request(wish.method, wish.path, **_asked(wish)))
            case Open():
                uri = f"{self._address.sockets}{wish.path}"
                self._socket = await asyncio_sockets.connect(uri, **_opened(wish, self._address))
            case Hear():
                assert self._socket is not None
                async with asyncio.timeout(wish.timeout_s):
                    return await self._socket.recv()
            case HangUp():
                assert self._socket is not None
                await self._socket.close()
            case Rest():
                await asyncio.sleep(wish.seconds)
        return None
