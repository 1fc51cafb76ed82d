"""What HTTP routes share: problems as answers, request headers, small JSON bodies."""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from email.utils import formatdate
from typing import Any

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.types import Scope

from server.errors import BodyTooLarge, Malformed, NotAcceptable, Problem, UnsupportedMedia
from server.jobs.tenants import Tenant
from server.web.openai_schema import PREFIX, error_object

TAG = re.compile(r'"[^"]*"')
KEY = re.compile(r"[!-~]{1,255}")


def refusal(scope: Scope, answer: Problem) -> JSONResponse:
    """The response for a problem. Under OpenAI's paths it has the form and the status that OpenAI's clients expect, and
    says whether a retry makes sense."""
    headers = {"Cache-Control": "no-store", **answer.headers}
    error = {}
    if scope["path"].startswith(PREFIX):
        answer = replace(answer, status=400 if answer.status == 422 else answer.status)
        headers["X-Should-Retry"] = "true" if "Retry-After" in headers else "false"
        error = {"error": error_object(answer)}
    body = answer.body(scope.get("state", {}).get("request_id", "")) | error
    return JSONResponse(body, answer.status, headers, media_type="application/problem+json")


def too_large(limit: int) -> BodyTooLarge:
    """What is raised for a body, or the promise of one, of more bytes than this."""
    return BodyTooLarge(f"the body must be at most {limit} bytes")


def closing(answer: Problem) -> tuple[list[tuple[str, str]], bytes]:
    """The headers and the body of a problem outside of the application, after which the connection is closed."""
    id = secrets.token_hex(8)
    body = json.dumps(answer.body(id)).encode()
    headers = {"content-type": "application/problem+json", "cache-control": "no-store", "connection": "close"}
    headers |= {"content-length": str(len(body)), "date": formatdate(usegmt=True), "x-request-id": id} | answer.headers
    return [*headers.items()], body


def tenant_of(request: HTTPConnection) -> Tenant | None:
    """The tenant whose key came with this request; None if the server needs no key."""
    tenant: Tenant | None = request.state.tenant
    return tenant


def header(request: HTTPConnection, name: str) -> str | None:
    """All lines of a header as one (RFC 9110, 5.3)."""
    lines = request.headers.getlist(name)
    return ", ".join(lines) if lines else None


def words(request: HTTPConnection, name: str) -> list[str]:
    """The words of a header that is a list, in lower case and without parameters: Prefer, Cache-Control."""
    return [part.partition(";")[0].strip().lower() for part in (header(request, name) or "").split(",")]


def has_current(request: Request, tag: str) -> bool:
    """Whether If-None-Match names this ETag (RFC 9110, 13.1.2)."""
    given = header(request, "if-none-match") or ""
    return given.strip() == "*" or tag.removeprefix("W/") in TAG.findall(given)


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key, if there is one. Raises Malformed."""
    given = request.headers.getlist("idempotency-key")
    if len(given) > 1 or not all(KEY.fullmatch(key) for key in given):
        raise Malformed("Idempotency-Key must be there once, with 1 to 255 visible ASCII characters")
    return given[0] if given else None


def from_headers(request: Request) -> dict[str, Any]:
    """What the headers of a request say about its job: fields of RequestContext. Raises Malformed."""
    again = "no-cache" in words(request, "cache-control")
    return {"again": again, "key": idempotency_key(request), "tenant": tenant_of(request)}


async def read_json_body(request: Request, limit: int) -> bytes:
    """The body, declared as JSON and of at most `limit` bytes. Raises BodyTooLarge, UnsupportedMedia, Malformed."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("the body must be sent as it is, without a content-encoding")
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large(limit)
    except ClientDisconnect:
        raise Malformed("the caller left before its body had arrived") from None
    if body and media != "application/json" and not media.endswith("+json"):
        raise UnsupportedMedia("the body must be sent as content-type: application/json")
    return bytes(body)


def negotiate(accept: str | None, offers: Sequence[str]) -> str:
    """The best of `offers` for an Accept header (RFC 9110, 12.5.1); of equals, the first. Raises NotAcceptable."""
    ranges: dict[str, float] = {}
    for part in (accept or "*/*").split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        try:
            weight = next((float(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        except ValueError:
            continue
        if 0 <= weight <= 1:  # which nan is not
            ranges[media] = max(weight, ranges.get(media, 0.0))

    def weight_of(offer: str) -> float:
        patterns = (offer, f"{offer.partition('/')[0]}/*", "*/*")  # the most specific range decides
        return next((ranges[pattern] for pattern in patterns if pattern in ranges), 0.0)

    best = max(offers, key=weight_of)
    if weight_of(best) <= 0:
        raise NotAcceptable(f"this can be answered as {', '.join(offers)}")
    return best
