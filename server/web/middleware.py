"""The one ASGI middleware: every HTTP request and every websocket passes it before a route.

It takes the path prefix off, gives each request an id, checks Host, Origin and key, lets browsers read the answer,
counts websockets, and answers HEAD. All paths need a key unless they are named here. A websocket is refused with an
HTTP status, before it is accepted.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.errors import NotFound, ServerError, TooManyConnections, Unauthenticated, problem
from server.jobs.tenants import Tenant
from server.settings import Settings
from server.web.auth import SAME_FOR_ALL, KeyFile, Keyring, offered
from server.web.hosts import Headers, Rules
from server.web.http import refusal, request_id_of

PROTOCOL = "ddpm.v1"  # the subprotocol of a websocket whose other offered subprotocol is its key
OPEN = {"/", "/docs", "/healthz", "/readyz"}
PROBES = {"/healthz", "/readyz"}  # load balancers ask for them by address, so any Host will do
STATIC = "/static/"
METRICS = "/metrics"
SAFE_METHODS = {"GET", "HEAD"}
EVENTS = "/events"  # ends the paths of streams, which are for whoever may open a websocket
STARTS = ("http.response.start", "websocket.accept", "websocket.http.response.start")  # messages with headers


def _values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header."""
    return [value for given, value in scope["headers"] if given == name]


@dataclass(frozen=True, slots=True)
class Access:
    """Which requests may pass. keys: None if no key is needed. any_host: paths that are answered for every Host."""

    rules: Rules
    keys: KeyFile | None
    metrics_key: Keyring | None
    any_host: Set[str]

    @classmethod
    def read(cls, settings: Settings) -> "Access":
        """What the settings say. Raises SettingsError."""
        keys = KeyFile(Path(settings.api_keys)) if settings.api_keys else None
        secret = settings.metrics_key.get_secret_value()
        rules = Rules.read(settings.allowed_hosts, settings.allowed_origins, keys is not None)
        if not secret:
            return cls(rules, keys, None, PROBES)
        return cls(rules, keys, Keyring.of_one(secret), PROBES | {METRICS})  # a page in a browser has no such key

    def check_source(self, scope: Scope) -> None:
        """Checks path, Host and Origin. Raises NotFound, BadHost, Forbidden."""
        if not scope["path"].isprintable() or b"%2f" in scope["raw_path"].lower():  # a route's $ lets \\n pass
            raise NotFound("there is no such path")
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if scope["type"] == "websocket" or scope["path"] not in self.any_host:
            self.rules.check_host(hosts)
        if scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS or scope["path"].endswith(EVENTS):
            self.rules.check_origin(origins, hosts[0] if hosts else b"")

    def tenant(self, scope: Scope) -> Tenant | None:
        """The tenant whose key the request brings; None if it needs none. Raises Unauthenticated."""
        path, subprotocols = scope["path"], scope.get("subprotocols", ())
        if path == METRICS and self.metrics_key is not None:
            self.metrics_key.owner(offered(scope["headers"]))
            return None
        if self.keys is None or (scope["type"] == "http" and (path in OPEN or path.startswith(STATIC))):
            return None
        if path == METRICS:
            raise Unauthenticated(SAME_FOR_ALL)
        return self.keys.owner(offered(scope["headers"], subprotocols))


class Middleware:
    """ASGI middleware. refused: is called with the code of every refusal. prefix: the path under which a proxy offers
    the server, which it may have taken off."""

    def __init__(
        self, app: ASGIApp, access: Access, max_websockets: int, refused: Callable[[str], None], prefix: str
    ) -> None:
        self._app, self._access, self._max_websockets, self._refused = app, access, max_websockets, refused
        self._prefix = prefix
        self._websockets = 0  # open ones

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        id = request_id_of(scope["headers"])
        common = [(b"x-request-id", id.encode()), *self._access.rules.cors(scope["headers"])]
        scope["headers"] = [each for each in scope["headers"] if each[0] != b"range"]  # answers are whole
        scope.setdefault("state", {}).update(request_id=id, headers=common)
        logs.request_id.set(id)
        head = scope["type"] == "http" and scope["method"] == "HEAD"
        answer = _answer(common, head, send)
        if self._prefix and scope["path"] == self._prefix:  # the page's links are relative
            return await RedirectResponse(f"{self._prefix}/", 308)(scope, receive, answer)
        if scope["path"].startswith(f"{self._prefix}/"):
            scope["path"] = scope["path"].removeprefix(self._prefix)
        try:
            self._access.check_source(scope)
        except ServerError as error:
            return await self._refuse(error, scope, receive, answer)
        asked = scope["type"] == "http" and scope["method"] == "OPTIONS"
        if asked and (told := self._access.rules.preflight(scope["headers"])) is not None:
            return await _preflight(told)(scope, receive, answer)
        await self._authenticate({**scope, "method": "GET"} if head else scope, receive, answer)

    async def _authenticate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The second half, for requests of pages and programs that may use the server, if they have the key."""
        try:
            scope["state"]["tenant"] = self._access.tenant(scope)
            if scope["type"] == "websocket" and self._websockets >= self._max_websockets:
                raise TooManyConnections(f"there are {self._max_websockets} websockets, as many as may be")
        except ServerError as error:
            return await self._refuse(error, scope, receive, send)
        if scope["type"] == "http":
            return await self._app(scope, receive, send)
        self._websockets += 1
        try:
            await self._app(scope, receive, _websocket_answer(scope, receive, send))
        finally:
            self._websockets -= 1

    async def _refuse(self, error: ServerError, scope: Scope, receive: Receive, send: Send) -> None:
        answer = problem(error)
        self._refused(answer.code)
        await refusal(scope, answer)(scope, receive, send)


def _preflight(headers: Headers) -> Response:
    answer = Response(status_code=204)
    answer.raw_headers += headers
    return answer


def _answer(common: Headers, head: bool, send: Send) -> Send:
    """`send` for all answers: adds the headers that all have, and leaves out the body where HEAD was asked for."""
    is_complete = False

    async def answer(message: Message) -> None:
        nonlocal is_complete
        if message["type"] in STARTS:
            message["headers"] = [*message.get("headers", ()), *common]
        elif head and message["type"] == "http.response.body":
            if is_complete:
                return
            is_complete, message = True, {"type": message["type"], "body": b""}  # a stream would not end for long
        await send(message)

    return answer


def _websocket_answer(scope: Scope, receive: Receive, send: Send) -> Send:
    """`send` for a websocket: agrees to our subprotocol, and answers a path without a route with a problem."""
    accepted = False

    async def answer(message: Message) -> None:
        nonlocal accepted
        if message["type"] == "websocket.close" and not accepted:  # routes of ours accept before they close
            return await refusal(scope, problem(NotFound("there is no such websocket")))(scope, receive, send)
        if message["type"] == "websocket.accept":
            accepted = True
            if PROTOCOL in scope["subprotocols"]:
                message = {**message, "subprotocol": PROTOCOL}
        await send(message)

    return answer
