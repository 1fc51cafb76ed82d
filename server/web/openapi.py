"""What `/openapi.json` says, completed: problems as they are answered, keys, and the bounds this server was given."""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from model.sampling.plan import SAMPLERS
from server.jobs.schemas import GenerateRequest
from server.jobs.service import JobService
from server.settings import Settings
from server.web.openai_schema import ImagesRequest

PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"pointer": {"type": "string"}, "message": {"type": "string"}},
                "required": ["pointer", "message"],
            },
        },
    },
    "required": ["type", "title", "status", "detail", "code", "request_id"],
}
REFUSAL = {
    "description": "a problem; its `code` and `detail` say which",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
KEY = {"type": "http", "scheme": "bearer", "description": "an API key; needed if this server was given any"}


def _bounded(jobs: JobService, settings: Settings) -> dict[str, Any]:
    """The schema of a request, and those it refers to, with what depends on settings and models."""
    request = GenerateRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = request.pop("$defs")
    fields = request["properties"]
    longest = max(card.process.schedule.T for card in jobs.cards.values())
    fields["n"] |= {"maximum": settings.max_n}
    fields["sampler"] |= {"enum": list(SAMPLERS)}
    for field, bounds in (("steps", {"maximum": longest}), ("model", {"enum": list(jobs.cards)})):
        fields[field]["anyOf"][0] |= bounds
    for properties in (fields, schemas["Frames"]["properties"]):
        for name, field in properties.items():
            if "anyOf" not in field:  # null is as good as leaving it out
                about = {word: field.pop(word) for word in ("title", "description", "default")}
                properties[name] = about | {"anyOf": [field, {"type": "null"}]}
    images = ImagesRequest.model_json_schema() | {"additionalProperties": False}
    images["properties"] = fields | images["properties"]
    return schemas | {"GenerateRequest": request, "ImagesRequest": images, "Problem": PROBLEM}


def _operations(document: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (operation for path in document["paths"].values() for operation in path.values())


def describe(app: FastAPI, jobs: JobService, settings: Settings) -> None:
    """Lets `app` tell all of this at `/openapi.json`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            document["components"] = {"schemas": _bounded(jobs, settings), "securitySchemes": {"key": KEY}}
            document["security"] = [{"key": []}] if settings.api_keys else [{}]
            for operation in _operations(document):
                answers = operation["responses"]
                if "HTTPValidationError" in str(answers.get("422")):  # FastAPI's own idea of it
                    del answers["422"]
                answers["default"] = REFUSAL
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
