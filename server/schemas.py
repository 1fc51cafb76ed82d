"""What clients may send. Unknown fields are refused, numbers are strict; bounds that the model sets are in jobs."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import BadInput

MAX_SEED = 2**53
MAX_DEPTH = 32


class GenerateRequest(BaseModel):
    """The body of `POST /generate`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title="GenerateRequest")

    model: str | None = Field(None, max_length=64, description="name of a model directory")
    seed: int | None = Field(None, ge=0, lt=MAX_SEED, description="drawn at random if not given, and always told")
    steps: int | None = Field(None, ge=1, le=10_000, description="denoising steps, 1 .. T of the model")
    n: int = Field(1, ge=1, le=4096, description="pictures; image i is the picture of seed + i")
    sampler: str = Field("ddpm", max_length=32, description="ddpm, greedy, ddim or dpmpp_2m")
    eta: float | None = Field(None, ge=0, le=1, description="ddim only: 0 adds no noise, 1 as much as ddpm")
    variance: Literal["small", "large", "learned"] | None = Field(None, description="ddpm only")
    spacing: Literal["leading", "linspace", "trailing"] | None = Field(None, description="which timesteps are visited")
    clip: bool | None = Field(None, description="whether x0 is clamped to [-1, 1] in every step")
    noise: Literal["philox", "torch"] = Field("philox", description="torch: the draws that diffusers makes")
    priority: int = Field(0, ge=-10, le=10, description="higher is seated first")
    deadline_s: float | None = Field(None, gt=0, le=1e6, description="give up after this many seconds")


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return values


def _depth(text: str) -> int:
    """The deepest nesting of brackets; brackets inside strings count too, which only makes this stricter."""
    deepest = depth = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def parse_json(body: bytes) -> object:
    """Strict JSON: UTF-8, no NaN, no duplicate names, not too deep. Raises BadInput (400)."""
    try:
        text = body.decode("utf-8")
        if _depth(text) > MAX_DEPTH:
            raise ValueError(f"brackets nest deeper than {MAX_DEPTH}")
        value: object = json.loads(text, parse_constant=_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise BadInput(400, "malformed-json", f"the body is not valid JSON at {where}") from None
    except UnicodeDecodeError:
        raise BadInput(400, "malformed-json", "the body must be JSON in UTF-8") from None
    except ValueError as error:
        detail = "a number has too many digits" if "digits" in str(error) else str(error)
        raise BadInput(400, "malformed-json", f"the body is not valid JSON: {detail}") from None
    return value


def parse_generate(body: bytes) -> GenerateRequest:
    """The body of `POST /generate`. Raises BadInput: 400 if it is not JSON, 422 naming each field that is wrong."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise BadInput(422, "invalid-request", "the body must be a JSON object", [_invalid("", "must be an object")])
    try:
        return GenerateRequest.model_validate(value)
    except ValidationError as error:
        known = GenerateRequest.model_fields
        errors = []
        for e in error.errors(include_url=False, include_input=False, include_context=False)[:20]:
            name = str(e["loc"][0]) if e["loc"] else ""
            errors.append(_invalid(f"/{name}", e["msg"]) if name in known else _invalid("", _unknown()))
        fields = ", ".join(sorted({e["pointer"] for e in errors if e["pointer"]})) or "the body"
        raise BadInput(422, "invalid-request", f"{fields}: {errors[0]['message']}", errors) from None


def _unknown() -> str:
    return f"unknown field; there are {', '.join(GenerateRequest.model_fields)}"


def _invalid(pointer: str, message: str) -> dict[str, str]:
    return {"pointer": pointer, "message": message}
