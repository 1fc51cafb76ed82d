"""What all HTTP routes share: bodies within bounds, `Accept`, callers who go away, request ids."""

import asyncio
import re
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.errors import BodyTooLarge, Malformed, NotAcceptable, Problem, UnsupportedMedia
from server.jobs.tenants import Tenant
from server.web.openai_schema import PREFIX, error_object

T = TypeVar("T")
ANSWERS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
TAG = re.compile(r'"[^"]*"')
KEY = re.compile(r"[!-~]{1,255}")
REQUEST_ID = re.compile(r"[\w-]{1,64}", re.ASCII)


class RequestIds:
    """ASGI middleware: every request has an id, the client's own if it is well-formed; every answer tells it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = id
        logs.request_id.set(id)

        async def send_with_id(message: Message) -> None:
            if message["type"] in ANSWERS:
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        await self.app(scope, receive, send_with_id)


class Heads:
    """ASGI middleware: whatever answers GET answers HEAD, with the same headers and without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, send_without_body)


def refusal(scope: Scope, answer: Problem) -> JSONResponse:
    """A problem as it is answered. OpenAI's clients find it in their form, with their status for what is ill-formed,
    and with a word on whether it is worth their while to try again."""
    headers = {"Cache-Control": "no-store", **answer.headers}
    error = {}
    if scope["path"].startswith(PREFIX):
        answer = replace(answer, status=400 if answer.status == 422 else answer.status)
        headers["X-Should-Retry"] = "true" if "Retry-After" in headers else "false"
        error = {"error": error_object(answer)}
    body = answer.body(scope.get("state", {}).get("request_id", "")) | error
    return JSONResponse(body, answer.status, headers, media_type="application/problem+json")


def owner_of(request: HTTPConnection) -> Tenant | None:
    """Whose key came with this request; nobody's if none is needed."""
    owner: Tenant | None = getattr(request.state, "owner", None)
    return owner


def name_of_owner(request: HTTPConnection) -> str | None:
    """The name of whoever's key came with this request."""
    owner = owner_of(request)
    return None if owner is None else owner.name


def header(request: HTTPConnection, name: str) -> str | None:
    """A header that is a list: all its lines as one (RFC 9110, 5.3)."""
    lines = request.headers.getlist(name)
    return ", ".join(lines) if lines else None


def prefers(request: Request, preference: str) -> bool:
    """Whether this is among what a caller prefers (RFC 7240); what parameters it has does not matter."""
    given = (header(request, "prefer") or "").split(",")
    return preference in [part.partition(";")[0].strip().lower() for part in given]


def already_has(request: Request, tag: str) -> bool:
    """Whether a caller says that it has what bears this ETag (RFC 9110, 13.1.2)."""
    given = header(request, "if-none-match") or ""
    return given.strip() == "*" or tag.removeprefix("W/") in TAG.findall(given)


async def read_json_body(request: Request, limit: int) -> bytes:
    """The body, which must claim to be JSON and be small. Raises BodyTooLarge, UnsupportedMedia, Malformed."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("the body must be sent as it is, without a content-encoding")
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise BodyTooLarge(f"the body must be at most {limit} bytes")
    except ClientDisconnect:
        raise Malformed("the caller left before its body had arrived") from None
    if body and media != "application/json" and not media.endswith("+json"):
        raise UnsupportedMedia("the body must be sent as content-type: application/json")
    return bytes(body)


def negotiate(accept: str | None, offers: Sequence[str]) -> str:
    """The best of `offers` for an Accept header (RFC 9110, 12.5.1), the first if all will do. Raises NotAcceptable."""
    ranges = []
    for part in (accept or "*/*").split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights = [p[2:] for p in parameters if p.startswith("q=")]
        try:
            weight_of = float(weights[0]) if weights else 1.0
        except ValueError:
            continue
        if 0 <= weight_of <= 1:  # which nan is not
            ranges.append((media, weight_of))

    def weight(offer: str) -> float:
        kind = offer.partition("/")[0]
        for pattern in (offer, f"{kind}/*", "*/*"):  # the most specific range decides
            found = [q for media, q in ranges if media == pattern]
            if found:
                return max(found)
        return 0.0

    best = max(offers, key=weight)
    if weight(best) <= 0:
        raise NotAcceptable(f"this can be answered as {', '.join(offers)}")
    return best


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key, if there is one. Raises Malformed."""
    given = request.headers.getlist("idempotency-key")
    if len(given) > 1 or not all(KEY.fullmatch(key) for key in given):
        raise Malformed("Idempotency-Key must be there once, with 1 to 255 visible ASCII characters")
    return given[0] if given else None


def makes_again(request: Request) -> bool:
    """Whether pictures that were made before will not do."""
    return "no-cache" in [part.strip().lower() for part in (header(request, "cache-control") or "").split(",")]


async def unless_gone(request: Request, work: Coroutine[None, None, T]) -> T | None:
    """The result of `work`; or None as soon as the caller has gone away, and then the work is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    return task.result() if task in await first_of(task, leaving) else None


async def first_of(*tasks: "asyncio.Task[Any]") -> "set[asyncio.Task[Any]]":
    """Those of these tasks that have ended, as soon as there is one; the rest are cancelled, and over on return."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # or asyncio would report that nobody looked at it
