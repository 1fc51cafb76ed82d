"""The door: what every request, over HTTP or for a websocket, has to pass before any route hears of it.

Everything is closed unless it is named here. Nothing is accepted first and refused later: a websocket is refused with
an HTTP status, like everybody else.
"""

from collections.abc import Callable, Set
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import NotFound, ServerError, TooManyConnections, Unauthenticated, problem
from server.settings import Settings
from server.web.auth import SAME_FOR_ALL, Keyring, offered
from server.web.hosts import Rules
from server.web.http import refusal

PROTOCOL = "ddpm.v1"  # what a websocket that offers it is answered with: its key is not to be echoed
OPEN = {"/", "/healthz", "/readyz"}
PROBES = {"/healthz", "/readyz"}  # asked by addresses that nobody knows beforehand
STATIC = "/static/"
METRICS = "/metrics"
SAFE = {"GET", "HEAD"}
OTHER_SITES_MAY_READ = (
    *("X-Job-Id", "X-Seed", "X-Request-Id", "X-Cache", "Location", "ETag", "Preference-Applied"),
    *("Retry-After", "RateLimit", "RateLimit-Policy", "X-Should-Retry"),
)
OTHER_SITES_MAY_SEND = (
    *("Authorization", "Accept", "Cache-Control", "Content-Type", "Idempotency-Key", "Prefer", "X-Request-Id"),
)


def headers_of(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header."""
    return [value for given, value in scope["headers"] if given == name]


async def refuse(error: ServerError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with a problem; a websocket that was not accepted yet, too."""
    await refusal(scope, problem(error))(scope, receive, send)


class Door:
    """ASGI middleware that lets through whatever `check` does not raise a ServerError for. `refused` hears the code."""

    def __init__(self, app: ASGIApp, check: Callable[[Scope], None], refused: Callable[[str], None]) -> None:
        self.app, self._check, self._refused = app, check, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._check(scope)
            except ServerError as error:
                self._refused(problem(error).code)
                return await refuse(error, scope, receive, send)
        await self.app(scope, receive, send)


class WebSockets:
    """ASGI middleware that counts websockets, and answers those that fit no route, or are too many, with a problem."""

    def __init__(self, app: ASGIApp, most: int, refused: Callable[[str], None]) -> None:
        self.app, self._most, self._refused = app, most, refused
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            return await self.app(scope, receive, send)
        if self._open >= self._most:
            full = TooManyConnections(f"there are {self._most} websockets, as many as may be")
            self._refused(problem(full).code)
            return await refuse(full, scope, receive, send)
        accepted = False

        async def answer(message: Message) -> None:
            nonlocal accepted
            if message["type"] == "websocket.close" and not accepted:  # no route of ours closes before it accepts
                return await refuse(NotFound("there is no such websocket"), scope, receive, send)
            if message["type"] == "websocket.accept":
                accepted = True
                if PROTOCOL in scope["subprotocols"]:
                    message = {**message, "subprotocol": PROTOCOL}
            await send(message)

        self._open += 1
        try:
            await self.app(scope, receive, answer)
        finally:
            self._open -= 1


def check_whereabouts(rules: Rules, for_all: Set[str], scope: Scope) -> None:
    """From whose page it comes, and for which host, unless it is a path for all. Raises BadHost, Forbidden."""
    hosts = headers_of(scope, b"host")
    if scope["type"] == "websocket" or scope["path"] not in for_all:
        rules.check_host(hosts)
    if scope["type"] == "websocket" or scope["method"] not in SAFE:
        rules.check_origin(headers_of(scope, b"origin"), hosts[0] if hosts else b"")


def check_key(keys: Keyring | None, metrics_key: Keyring | None, scope: Scope) -> None:
    """Who sent it, which is kept in the request's state as `owner`. Raises Unauthenticated."""
    path, key = scope["path"], offered(scope["headers"], scope.get("subprotocols", ()))
    if path == METRICS and metrics_key is not None:
        metrics_key.owner(key)
    elif keys is None or (scope["type"] == "http" and (path in OPEN or path.startswith(STATIC))):
        return
    elif path == METRICS:
        raise Unauthenticated(SAME_FOR_ALL)
    else:
        scope["state"]["owner"] = keys.owner(key)


def install(app: FastAPI, settings: Settings, refused: Callable[[str], None]) -> None:
    """Puts the door before all routes of `app`. Raises SettingsError."""
    keys = Keyring.read(Path(settings.api_keys)) if settings.api_keys else None
    secret = settings.metrics_key.get_secret_value()
    metrics_key = Keyring.of_one(secret) if secret else None
    rules = Rules.read(settings.allowed_hosts, settings.allowed_origins, keys is not None)
    for_all = PROBES | ({METRICS} if metrics_key is not None else set())  # whoever has that key is no page
    app.add_middleware(WebSockets, most=settings.max_websockets, refused=refused)  # the innermost comes first
    app.add_middleware(Door, check=partial(check_key, keys, metrics_key), refused=refused)
    if rules.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=rules.origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=OTHER_SITES_MAY_SEND,
            expose_headers=OTHER_SITES_MAY_READ,
        )
    app.add_middleware(Door, check=partial(check_whereabouts, rules, for_all), refused=refused)
