"""What HTTP routes share: problems as answers, request headers, small JSON bodies."""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from email.utils import formatdate
from itertools import takewhile
from typing import Any

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.types import Scope

from server.bounds import unknown
from server.errors import BodyTooLarge, ExpectationFailed, Invalid, Malformed, NotAcceptable, Problem, UnsupportedMedia
from server.jobs.tenants import Tenant
from server.web.hosts import Headers
from server.web.openai_schema import PREFIX, error_object

Json = dict[str, Any]
TEXT: Json = {"type": "string"}
EVENTS = "text/event-stream"
MOST_WRONG = 20  # that are told of one request
ITEM = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*"?)+')  # of a list; commas in quotes separate nothing
TAG = re.compile(r'"[^"]*"')
WEIGHT = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")  # also as old clients write it, without a digit before the point
KEY = re.compile(r"[!-~]{1,255}")
REQUEST_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
PROBLEM = "application/problem+json"

# The headers of answers, as OpenAPI: a schema, and what it says. The first is on all answers.
HEADERS: dict[str, tuple[Json, str]] = {
    "X-Request-Id": (TEXT, "The id of this request in logs and problems."),
    "X-Job-Id": (TEXT, "The job's id."),
    "X-Seed": (TEXT | {"pattern": "^[0-9]+$"}, "The seed of the first picture."),
    "X-Cache": (TEXT | {"enum": ["hit"]}, "The pictures are those of an earlier equal request."),
    "Location": (TEXT, "The job's path."),
    "Preference-Applied": (TEXT | {"enum": ["respond-async"]}, "What was done of Prefer."),
    "ETag": (TEXT, "The hash of the picture."),
    "Cache-Control": (TEXT, "Who may keep the answer, and for how long."),
    "Vary": (TEXT, "The request headers that decide the answer."),
    "Retry-After": (TEXT | {"pattern": "^[0-9]+$"}, "Seconds until a retry may succeed."),
    "RateLimit": (TEXT, "What is left of the quota."),
    "RateLimit-Policy": (TEXT, "The quota."),
    "WWW-Authenticate": (TEXT | {"enum": ["Bearer"]}, "How to send a key."),
    "X-Should-Retry": (TEXT | {"enum": ["true", "false"]}, "Whether a retry may succeed, for OpenAI's clients."),
}
# Those of requests that routes read: a schema, an example, and what it says.
PARAMETERS: dict[str, tuple[Json, str, str]] = {
    "Accept": (TEXT, "image/*", "The media type of the answer."),
    "Prefer": (TEXT, "respond-async", "`respond-async`: answer 202 with the job at once. Others have no effect."),
    "Idempotency-Key": (
        TEXT | {"pattern": "^[!-~]{1,255}$"},
        "order-1207",
        "Makes the request safe to repeat: the same key and body are the same job.",
    ),
    "Cache-Control": (TEXT, "no-cache", "`no-cache`, `no-store` and `max-age` make the pictures again."),
    "Last-Event-ID": (
        {"type": "integer", "minimum": 0},
        "0",
        "Continue behind this message of server-sent events; a POST needs the Idempotency-Key of the earlier request.",
    ),
    "If-None-Match": (TEXT, '"1f"', "Answer 304 if this is the ETag."),
    "X-Request-Id": (TEXT, "my-request-1", "An id for logs and problems, of up to 64 letters, digits, - and _."),
}


def request_id_of(headers: Headers) -> str:
    """The id of a request: its X-Request-Id if that has the form of one, else a new one."""
    given = [value for name, value in headers if name == b"x-request-id"]
    said = given[-1].decode("latin-1") if given else ""
    return said if REQUEST_ID.fullmatch(said) else secrets.token_hex(8)


def _form(answer: Problem, path: str) -> tuple[Problem, Json]:
    """A problem with the headers that all have, and what its body has besides. Under OpenAI's paths it has the form and
    the status that OpenAI's clients expect, and says whether a retry makes sense."""
    headers = {"Cache-Control": "no-store", **answer.headers}
    if not path.startswith(PREFIX):
        return replace(answer, headers=headers), {}
    headers["X-Should-Retry"] = "true" if "Retry-After" in headers else "false"
    answer = replace(answer, status=400 if answer.status == 422 else answer.status, headers=headers)
    return answer, {"error": error_object(answer)}


def refusal(scope: Scope, answer: Problem) -> JSONResponse:
    """The response for a problem."""
    answer, more = _form(answer, scope["path"])
    body = answer.body(scope.get("state", {}).get("request_id", "")) | more
    return JSONResponse(body, answer.status, answer.headers, media_type=PROBLEM)


class DocumentResponse(JSONResponse):
    """A document in which some values are dataclasses."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, default=asdict, ensure_ascii=False, separators=(",", ":")).encode()


async def check_request(connection: HTTPConnection) -> None:
    """A dependency of all routes, which refuses what they do not understand. Raises BadInput."""
    with connection.app.state.jobs.admission.counting_refusals(tenant_of(connection)):
        _check_headers(connection)
        if connection.scope["query_string"]:
            _check_query(connection)


def _check_headers(connection: HTTPConnection) -> None:
    """Raises ExpectationFailed; Malformed for a body that the route does not take; NotAcceptable."""
    route, method = connection.scope["route"], connection.scope.get("method")
    if (expected := header(connection, "expect")) is not None and expected.strip().lower() != "100-continue":
        raise ExpectationFailed("of Expect, only 100-continue is understood")
    size = header(connection, "transfer-encoding") or header(connection, "content-length") or "0"
    if method != "POST" and size != "0":
        raise Malformed("this route takes no body")
    if 406 in getattr(route, "responses", ()):  # else it has one form, and sends that to everybody
        forms = route.responses.get(200, {}).get("content", ["application/json"])
        negotiate(header(connection, "accept"), list(forms))


def _check_query(connection: HTTPConnection) -> None:
    """Raises Invalid for parameters that the route does not know or that come twice."""
    known = [field.alias for field in connection.scope["route"].dependant.query_params]
    where = "; fields go into the body" if connection.scope.get("method") == "POST" else ""
    wrong, seen = list[tuple[str, str]](), set[str]()
    for name, _ in connection.query_params.multi_items():
        if name not in known:
            pointer, said = unknown("query parameter", name, known)
            wrong.append((pointer, said + where))
        elif name in seen:
            wrong.append((name, f"{name} must be there once"))
        seen.add(name)
    if wrong:
        raise Invalid(*wrong[:MOST_WRONG])


def too_large(limit: int) -> BodyTooLarge:
    """What is raised for a body, or the promise of one, of more bytes than this."""
    return BodyTooLarge(f"the body must be at most {limit} bytes")


def closing(answer: Problem, path: str, given: Headers) -> tuple[list[tuple[str, str]], bytes]:
    """The headers and the body of a problem outside of the application, after which the connection is closed.
    given: the headers of the request, as far as they were read"""
    id = request_id_of(given)
    answer, more = _form(answer, path)
    body = json.dumps(answer.body(id) | more).encode()
    headers = {"content-type": PROBLEM, "connection": "close", "content-length": str(len(body))}
    headers |= {"date": formatdate(usegmt=True), "x-request-id": id} | answer.headers
    return [*headers.items()], body


def tenant_of(request: HTTPConnection) -> Tenant | None:
    """The tenant whose key came with this request; None if the server needs no key."""
    tenant: Tenant | None = request.state.tenant
    return tenant


def header(request: HTTPConnection, name: str) -> str | None:
    """All lines of a header as one (RFC 9110, 5.3)."""
    lines = request.headers.getlist(name)
    return ", ".join(lines) if lines else None


def directives(request: HTTPConnection, name: str) -> dict[str, str]:
    """The items of a header that is a list, Prefer or Cache-Control: their names in lower case and their values, or "".
    Of equal names the first counts (RFC 7240, 2). Parameters behind a semicolon are left out."""
    items = (part.partition(";")[0].partition("=") for part in reversed(ITEM.findall(header(request, name) or "")))
    return {key.strip().lower(): value.strip().strip('"') for key, _, value in items}


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
    """What the headers of a request say about its job: fields of RequestContext. Raises Malformed.

    Directives of Cache-Control that are not named here are ignored, or hold in any case (RFC 9111, 5.2): pictures do
    not age.
    """
    control = directives(request, "cache-control").keys()
    if "only-if-cached" in control:
        raise Malformed("Cache-Control: only-if-cached is not understood")
    again = not control.isdisjoint({"no-cache", "no-store", "max-age"})
    return {"again": again, "key": idempotency_key(request), "tenant": tenant_of(request)}


async def read_json_body(request: Request, limit: int) -> bytes:
    """The body, declared as JSON and of at most `limit` bytes. Raises BodyTooLarge, UnsupportedMedia, Malformed."""
    for name, usual in (("content-encoding", "identity"), ("transfer-encoding", "chunked")):
        if (header(request, name) or usual).strip().lower() != usual:
            raise UnsupportedMedia(f"the body must be sent as it is, with no other {name} than {usual}")
    given, body = header(request, "content-type"), bytearray()
    media, parameters = _media_type("application/json" if given is None else given)
    charset = parameters.get("charset", "utf-8")
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large(limit)
    except ClientDisconnect:
        raise Malformed("the caller left before its body had arrived") from None
    if body and (charset != "utf-8" or (media != "application/json" and not media.endswith("+json"))):
        raise UnsupportedMedia("the body must be sent as content-type: application/json, in UTF-8")
    return bytes(body)


def _media_type(text: str) -> tuple[str, dict[str, str]]:
    """A media type or range, and its parameters, in lower case."""
    media, *parameters = (piece.strip().lower() for piece in text.split(";"))
    pairs = (parameter.partition("=") for parameter in parameters if parameter)
    return media, {name.strip(): value.strip().strip('"') for name, _, value in pairs}


def negotiate(accept: str | None, offers: Sequence[str]) -> str:
    """The best of `offers` for an Accept header (RFC 9110, 12.5.1); of equals, the first. Raises NotAcceptable.

    The offers have no parameters, but for `charset=utf-8`. What stands behind the weight has no meaning.
    """
    ranges: dict[str, float] = {}
    for part in ITEM.findall(accept or "*/*"):
        media, parameters = _media_type(part)
        weight = parameters.get("q", "1")
        if {name: parameters[name] for name in takewhile("q".__ne__, parameters)} not in ({}, {"charset": "utf-8"}):
            continue
        if WEIGHT.fullmatch(weight) and float(weight) <= 1:
            ranges[media] = max(float(weight), ranges.get(media, 0.0))

    def weight_of(offer: str) -> float:
        patterns = (offer, f"{offer.partition('/')[0]}/*", "*/*")  # the most specific range decides
        return next((ranges[pattern] for pattern in patterns if pattern in ranges), 0.0)

    best = max(offers, key=weight_of)
    if weight_of(best) <= 0:
        raise NotAcceptable(f"this can be answered as {', '.join(offers)}")
    return best
