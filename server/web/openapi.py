"""`/openapi.json`: FastAPI's document, with our problems, API keys, and the bounds of this server's settings."""

from itertools import chain
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from model.sampling.plan import SAMPLERS
from server.jobs.schemas import GenerateRequest
from server.jobs.service import JobService
from server.settings import Settings
from server.web.openai_schema import ImagesRequest

TEXT = {"type": "string"}
FIELD_ERROR = {"type": "object", "properties": {"pointer": TEXT, "message": TEXT}, "required": ["pointer", "message"]}
PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "A problem document (RFC 9457).",
    "properties": {
        **dict.fromkeys(("type", "title", "detail", "code", "request_id"), TEXT),
        "status": {"type": "integer"},
        "errors": {"type": "array", "items": FIELD_ERROR},
    },
    "required": ["type", "title", "status", "detail", "code", "request_id"],
}
REFUSAL = {
    "description": "A problem; `code` names it, `detail` explains it.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
KEY = {"type": "http", "scheme": "bearer", "description": "An API key, if the server has any."}


def _bounded(jobs: JobService, settings: Settings) -> dict[str, Any]:
    """The schemas of all bodies, with the bounds that depend on settings and models."""
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
            if "anyOf" not in field:  # null means that the field is not set
                about = {word: field.pop(word) for word in ("title", "description", "default")}
                properties[name] = about | {"anyOf": [field, {"type": "null"}]}
    images = ImagesRequest.model_json_schema() | {"additionalProperties": False}
    images["properties"] = fields | images["properties"]
    return schemas | {"GenerateRequest": request, "ImagesRequest": images, "Problem": PROBLEM}


def describe(app: FastAPI, jobs: JobService, settings: Settings) -> None:
    """Makes `app` serve this document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            document["components"] = {"schemas": _bounded(jobs, settings), "securitySchemes": {"key": KEY}}
            document["security"] = [{"key": []}] if settings.api_keys else [{}]
            for operation in chain.from_iterable(path.values() for path in document["paths"].values()):
                answers = operation["responses"]
                if "HTTPValidationError" in str(answers.get("422")):  # FastAPI's own, which is never sent
                    del answers["422"]
                answers["default"] = REFUSAL
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
