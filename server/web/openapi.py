"""`/openapi.json`: FastAPI's document of the routes, with headers, problems, websockets, examples, keys, and the bounds
of this server's settings.

A route names the type of its answer as `response_model`, though it returns a response, which FastAPI sends as it is.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from model.checkpoint.card import ModelCard
from model.sampling.plan import SAMPLERS
from server.catalog import default_model
from server.documents import (
    ClientMessage,
    JobWithPngs,
    PictureEvent,
    PictureHeader,
    PongMessage,
    ProblemDocument,
    TextDocument,
)
from server.errors import ANSWERS, UNFORESEEN
from server.jobs.schemas import GenerateRequest
from server.jobs.service import JobService
from server.settings import Settings
from server.web.http import HEADERS, PARAMETERS, PROBLEM, TEXT, Json
from server.web.middleware import METRICS, OPEN
from server.web.openai_schema import PREFIX, ErrorEvent, ImagesRequest, OpenAIProblem, PartialImage, WholeImage

JSON = "application/json"
FILE = TEXT | {"format": "binary"}
# The `data` of a job's events, by the name of the event
JOB_EVENTS = dict.fromkeys(("frame", "image"), "PictureEvent") | {
    name: kind.__name__
    for kind in get_args(get_args(TextDocument)[0])
    for name in get_args(get_type_hints(kind)["type"])
    if kind is not PongMessage
}
TAGS = {
    "pictures": "Make pictures: wait for them, stream them, or ask for a job.",
    "jobs": "Jobs that run or have ended, their pictures and their messages.",
    "models": "The models that are served.",
    "server": "Whether the server lives, is ready, and what it has done.",
    "openai": "OpenAI's images API, for clients that speak it.",
}
OF_PROBLEMS = {
    401: ["WWW-Authenticate"],
    409: ["Location?", "Retry-After?"],
    429: ["Retry-After", "RateLimit?", "RateLimit-Policy?"],
    503: ["Retry-After?"],
}
KEYS = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "metrics_key": {"type": "http", "scheme": "bearer", "description": "The key of `/metrics`."},
}
ALWAYS = (400, 401, 408, 413, 414, 417, 422, 431, 500, 503)  # problems of any request


def refusals(*statuses: int) -> dict[int | str, Json]:
    """`responses` of a route: the statuses of its problems, besides those that any request may have."""
    return {status: {} for status in statuses}


def sends(*names: str) -> Json:
    """Part of an answer in `responses`: its headers. One whose name ends with `?` is not always there."""
    said = {}
    for name in names:
        kind, text = HEADERS[name.rstrip("?")]
        said[name.rstrip("?")] = {"description": text, "required": not name.endswith("?"), "schema": kind}
    return {"headers": said}


def asks(*names: str, body: str = "") -> Json:
    """`openapi_extra` of a route: the headers that it reads, and the name of its body's schema."""
    asked: Json = {"parameters": [{"$ref": f"#/components/parameters/{name}"} for name in names]}
    return asked | ({"requestBody": {"content": {JSON: {"schema": schema(body)}}}} if body else {})


def schema(name: str) -> Json:
    """A reference to a schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def event_stream(kinds: Mapping[str, str]) -> Json:
    """Server-sent events as the content of an answer. The schema is that of each event, as tools for OpenAPI 3.1
    have it. kinds: the schema of the `data` by the name of the event."""

    def event(kind: str) -> Json:
        names = [name for name in kinds if kinds[name] == kind]
        data = {"type": "string", "contentMediaType": JSON, "contentSchema": schema(kind)}
        properties = {"event": TEXT | {"enum": names}, "id": TEXT, "data": data}
        return {"type": "object", "properties": properties, "required": ["event", "data"]}

    return {"schema": {"oneOf": [event(kind) for kind in dict.fromkeys(kinds.values())]}}


def websocket(first: str = "") -> Json:
    """Arguments of the route that describes a websocket. OpenAPI has no websockets: messages are in an extension.
    first: the schema of what a client sends first."""
    messages = {"receives": schema("StreamMessage"), "receives_binary": schema("PictureHeader")}
    messages |= {"sends": schema("ClientMessage")} | ({"sends_first": schema(first)} if first else {})
    about = "A websocket: messages are in `x-websocket`, of binary ones the JSON that stands before the PNG."
    return {
        "status_code": 101,
        "response_class": Response,
        "response_description": about,
        "responses": refusals(404),
        "openapi_extra": {"x-websocket": messages},
    }


def _requests(jobs: JobService, settings: Settings) -> Json:
    """The schemas of all bodies, with the bounds that depend on settings and models."""
    request = GenerateRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas: Json = request.pop("$defs")
    images = ImagesRequest.model_json_schema() | {"additionalProperties": False}
    fields = request["properties"]
    longest = max(card.process.schedule.T for card in jobs.cards.values())
    fields["n"] |= {"maximum": settings.max_n}
    fields["sampler"] |= {"enum": list(SAMPLERS)}
    fields["timesteps"]["anyOf"][0]["items"] |= {"maximum": longest}
    bounds = {"steps": {"maximum": longest}, "timesteps": {"maxItems": longest}, "labels": {"maxItems": settings.max_n}}
    fields["model"]["anyOf"][0] |= {"enum": list(jobs.cards)}
    for field, bound in bounds.items():
        fields[field]["anyOf"][0] |= bound
    for properties in (fields, schemas["Frames"]["properties"], images["properties"]):
        for name, field in properties.items():
            kinds = field.pop("anyOf", None) or [field, {"type": "null"}]  # null means that it is not set
            about = {word: field.pop(word) for word in ("description", "default") if field.get(word) is not None}
            if "default" in about:  # generated clients take a field with a default for one that is always there
                about["x-default"] = about.pop("default")
            properties[name] = about | {"anyOf": kinds}
    images["properties"] = fields | images["properties"]
    return schemas | {"GenerateRequest": request, "ImagesRequest": images}


def _answers() -> Json:
    """The schemas of what no route names as its only answer."""
    types: Json = {kind.__name__: kind for kind in (JobWithPngs, PictureEvent, PictureHeader, ClientMessage)}
    types |= {kind.__name__: kind for kind in (ProblemDocument, OpenAIProblem, PartialImage, WholeImage, ErrorEvent)}
    adapters: list[tuple[str, Literal["serialization"], TypeAdapter[Any]]] = [
        (name, "serialization", TypeAdapter(kind)) for name, kind in (types | {"": TextDocument}).items()
    ]
    made, found = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    schemas: Json = found["$defs"] | {"StreamMessage": made["", "serialization"]}
    codes = {code for _, code in [*ANSWERS.values(), UNFORESEEN]}
    schemas["ProblemDocument"]["properties"]["code"]["enum"] = sorted(codes)
    return schemas


def _problem(status: int, openai: bool) -> Json:
    """The answer with this status: a problem, with the codes that it may have."""
    ours = (400, 422) if openai and status == 400 else (status,)
    kinds = {code: str(kind.__doc__).partition(". ")[0] for kind, (its, code) in ANSWERS.items() if its in ours}
    kinds |= {UNFORESEEN[1]: "A bug"} if status == UNFORESEEN[0] else {}
    names = [*OF_PROBLEMS.get(status, ()), "X-Request-Id", "Cache-Control", *(["X-Should-Retry"] if openai else ())]
    content = {"schema": schema("OpenAIProblem" if openai else "ProblemDocument")}
    about = " ".join(f"`{code}`: {text.rstrip('.')}." for code, text in kinds.items())
    return {"description": about, "content": {PROBLEM: content}} | sends(*names)


def _complete(path: str, method: str, operation: Json, settings: Settings) -> Json:
    """Adds what all operations have: problems, headers and keys. -> the problems, as components"""
    openai, answers = path.startswith(PREFIX), operation["responses"]
    statuses = {int(status) for status in answers if int(status) >= 400} | {*ALWAYS}
    statuses |= {403} if method != "get" or "101" in answers else set()
    statuses -= {422} if openai else set()
    operation["responses"] = {status: answer for status, answer in answers.items() if int(status) < 400}
    for answer in operation["responses"].values():
        answer.setdefault("headers", {}).update(sends("X-Request-Id")["headers"])
    problems = {status: f"{'OpenAI' if openai else 'Problem'}{status}" for status in sorted(statuses)}
    for status, name in problems.items():
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{name}"}
    operation.setdefault("parameters", []).extend(asks("X-Request-Id")["parameters"])
    if path in OPEN:
        operation["security"] = []
    elif path == METRICS and settings.metrics_key.get_secret_value():
        operation["security"] = [{"metrics_key": []}]
    return {name: _problem(status, openai) for status, name in problems.items()}


def _examples(card: ModelCard) -> Json:
    """Bodies that this server accepts."""
    steps, label = card.process.schedule.T, {"label": card.labels.choices[-1]} if card.labels is not None else {}
    few, body = min(steps, 10), {"model": card.name, "seed": 42, "steps": min(steps, 100)} | label
    picture = {"summary": "a picture", "value": body}
    return {
        "GenerateRequest": {
            "picture": picture,
            "several": {"summary": "four pictures by ddim", "value": body | {"n": 4, "sampler": "ddim", "steps": few}},
            "frames": {"summary": "with five frames", "value": body | {"frames": {"count": 5, "kind": "both"}}},
        },
        "ImagesRequest": {"picture": {"summary": "a picture", "value": {"prompt": "", **body}}},
    }


def _without_title(schema: Json) -> Json:
    """A schema without the title that pydantic makes of its name."""
    return {word: value for word, value in schema.items() if word != "title" or not isinstance(value, str)}


def _document(app: FastAPI, jobs: JobService, settings: Settings) -> Json:
    tags = [{"name": name, "description": text} for name, text in TAGS.items()]
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=tags
    )
    schemas = document["components"]["schemas"] | _answers() | _requests(jobs, settings)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, which is never sent
        del schemas[name]
    for name in ("ModelStatus", "Source"):  # dataclasses, of which every field is sent
        schemas[name]["required"] = list(schemas[name]["properties"])
    name = default_model(jobs.cards, settings.default_model) or next(iter(jobs.cards))
    examples = _examples(jobs.cards[name])
    problems: Json = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            problems |= _complete(path, method, operation, settings)
            for content in operation.get("requestBody", {}).get("content", {}).values():
                content["examples"] = examples[content["schema"]["$ref"].rpartition("/")[2]]
            for parameter in operation["parameters"]:
                if parameter.get("name") == "name":
                    parameter["example"] = name
    document["components"] = {
        "schemas": json.loads(json.dumps(schemas), object_hook=_without_title),
        "parameters": {
            name: {"name": name, "in": "header", "description": text, "schema": kind, "example": example}
            for name, (kind, example, text) in PARAMETERS.items()
        },
        "responses": problems,
        "securitySchemes": KEYS,
    }
    if settings.path_prefix:
        document["servers"] = [{"url": settings.path_prefix}]
    document["security"] = [{"key": []}] if settings.api_keys else []
    return document


def describe(app: FastAPI, jobs: JobService, settings: Settings) -> None:
    """Makes `app` serve this document."""

    def openapi() -> Json:
        app.openapi_schema = app.openapi_schema or _document(app, jobs, settings)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
