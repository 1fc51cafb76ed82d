"""What clients may send. Unknown fields are refused, numbers are strict; bounds that the model sets are in orders."""

import json
from collections.abc import Mapping
from hashlib import sha256
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic.fields import FieldInfo

from model.checkpoint.labels import MAX_NAME
from model.checkpoint.presets import Preset
from model.checkpoint.scheduler import MAX_T
from model.nets.config import MAX_LABELS
from model.options import unique_keys
from model.sampling.labels import MOST_GUIDANCE, RANDOM
from model.sampling.schedule import Spacing, Variance
from model.sampling.table import HISTORY, Noise
from server.bounds import kind_of, says, unknown
from server.documents import Status as JobStatus
from server.errors import Invalid, Malformed

MAX_SEED = 2**53  # what every JSON reader keeps exactly
MAX_DEPTH = 32
TOO_DEEP = f"brackets nest deeper than {MAX_DEPTH}"
Form = TypeVar("Form", bound=BaseModel)
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
MAX_SEQ = 10**9 - 1  # of a message
MOST_JOBS, JOBS = 200, 50  # in one answer: at most, and unless told otherwise
# What stands in a URL is text, and is read by its route; this is what it may be.
Status = Annotated[str | None, WithJsonSchema({"type": "string", "enum": list(STATUSES), "examples": ["succeeded"]})]
Limit = Annotated[
    str | None,
    WithJsonSchema(
        {"type": "integer", "minimum": 1, "maximum": MOST_JOBS, "description": f"{JOBS} if none", "examples": [20]}
    ),
]
After = Annotated[str | None, WithJsonSchema({"type": "string", "description": "a job's id"})]
Seq = Annotated[str | None, WithJsonSchema({"type": "integer", "minimum": 0, "maximum": MAX_SEQ, "examples": [0]})]
Index = Annotated[
    str, WithJsonSchema({"type": "integer", "minimum": 0, "description": "of a picture of the job", "examples": [0]})
]

Timestep = Annotated[int, Field(ge=1, lt=MAX_SEED)]


def _label(value: object) -> object:
    if (type(value) is int and abs(value) < MAX_SEED) or (isinstance(value, str) and 1 <= len(value) <= MAX_NAME):
        return value  # the model knows which there are
    raise ValueError(f"must be a label's number, {RANDOM} or a name of 1 to {MAX_NAME} characters")


Label = Annotated[
    Any,
    BeforeValidator(_label),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": MAX_LABELS - 1},
                {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
            ]
        }
    ),
]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    null_is_said: ClassVar[str] = ""  # the field that may be null; any other is then as good as left out

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        as_good = cls.model_fields.keys() - {cls.null_is_said}
        return {name: given for name, given in value.items() if given is not None or name not in as_good}


class Frames(_Fields):
    """Which states of a picture are shown on its way."""

    every: int | None = Field(None, ge=1, lt=MAX_SEED, description="after so many updates each, and after the last")
    count: int | None = Field(None, ge=2, lt=MAX_SEED, description="so many, evenly spread from noise to picture")
    kind: Literal["x_t", "x0", "both"] = Field("x_t", description="the noisy picture, the one predicted from it, both")

    @model_validator(mode="after")
    def _one_of(self) -> "Frames":
        if (self.every is None) == (self.count is None):
            raise ValueError("must have either every or count")
        return self


class GenerateRequest(_Fields):
    """The body of `POST /generate`."""

    null_is_said = "frames"  # that there are none

    model: str | None = Field(None, min_length=1, max_length=64, description="name of a model directory")
    seed: int | None = Field(None, ge=0, lt=MAX_SEED, description="drawn at random if not given, and always told")
    steps: int | None = Field(None, ge=1, lt=MAX_SEED, description="denoising steps, 1 .. T of the model")
    n: int = Field(1, ge=1, lt=MAX_SEED, description="pictures; image i is the picture of seed + i")
    preset: Preset | None = Field(
        None, description="a sampler, its steps and its other fields, as the model has chosen them"
    )
    sampler: str = Field(
        "ddpm", max_length=32, description="ddpm, greedy, ddim, dpmpp, unipc, deis, ipndm or dpmpp_sde"
    )
    order: int | None = Field(None, ge=1, le=HISTORY + 1, description="of samplers that have several")
    eta: float | None = Field(None, ge=0, le=1, description="ddim only: 0 adds no noise, 1 as much as ddpm")
    variance: Variance | None = Field(None, description="ddpm only; learned: nets that have it")
    spacing: Spacing | None = Field(None, description="which timesteps are visited")
    timesteps: list[Timestep] | None = Field(
        None, min_length=1, max_length=MAX_T, fail_fast=True, description="the levels visited, descending, T .. 1"
    )
    plan: str | None = Field(None, min_length=1, max_length=64, description="name of a plan of the model")
    label: Label | None = Field(
        None, description="of a conditional model: a number, a name, or `random`: drawn from each picture's seed"
    )
    labels: list[Label] | None = Field(
        None, min_length=1, max_length=MAX_SEED, description="a label for each picture, instead of one for all"
    )
    guidance: float | None = Field(
        None,
        ge=0,
        le=MOST_GUIDANCE,
        description="of pictures with a label: 1 adds nothing, more obeys more; costs double",
    )
    guidance_interval: list[Timestep] | None = Field(
        None, min_length=2, max_length=2, description="the highest and the lowest noise level with guidance"
    )
    clip: bool | None = Field(None, description="whether x0 is clamped to [-1, 1] in every step")
    noise: Noise = Field(
        "philox", description="torch: the draws that diffusers makes; which pictures are then its own: docs/numerics.md"
    )
    frames: Frames | None = Field(
        None, description="30 for streams, animations and asynchronous jobs, fewer if these are too many; else none"
    )
    priority: int = Field(0, ge=-10, le=10, description="higher is seated first")
    deadline_s: float | None = Field(None, gt=0, le=1e6, description="give up after this many seconds")
    webhook: str | None = Field(None, description="https URL to which the job is posted when it has ended")


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: object) -> None:
    """Raises ValueError if lists and objects nest deeper than MAX_DEPTH."""
    level, depth = [value], 0  # all values inside so many lists and objects
    while containers := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        level = [*chain.from_iterable(each.values() if isinstance(each, dict) else each for each in containers)]


def parse_json(body: bytes) -> object:
    """Strict JSON: UTF-8, no NaN, no duplicate names, not too deep. Raises Malformed."""
    try:
        text = body.decode("utf-8")
        value: object = json.loads(text, parse_constant=_constant, object_pairs_hook=unique_keys)
        _check_depth(value)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # of half a character nothing can be said, not even in a log
    except RecursionError:
        raise Malformed(f"the body is not valid JSON: {TOO_DEEP}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise Malformed(f"the body is not valid JSON at {where}") from None
    except UnicodeError:
        raise Malformed("the body must be JSON in UTF-8, without unpaired surrogates") from None
    except ValueError as error:
        detail = "a number has too many digits" if "digits" in str(error) else str(error)
        raise Malformed(f"the body is not valid JSON: {detail}") from None
    return value


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises Malformed, Invalid."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise Invalid(("", "the body must be a JSON object"))
    return value


def fingerprint(value: object) -> str:
    """A hash of a value that JSON can hold, however its members are ordered."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def validate(value: dict[str, Any], form: type[Form], largest: Mapping[str, int] | None = None) -> Form:
    """A request of this form. largest: of fields, by name, where less is allowed here and now than the form says.
    Raises Invalid."""
    largest, wrong = largest or {}, dict[str, str]()
    try:
        made = form.model_validate(value)
    except ValidationError as error:
        wrong |= dict(_wrong(form, one, largest) for one in error.errors(include_url=False)[:20])
    for name, most in largest.items():
        if type(value.get(name)) is int and value[name] > most:
            beyond = {"type": "less_than_equal", "input": value[name]}
            wrong[name] = f"{name} {says(form.model_fields[name], beyond, most)}"
    if wrong:
        raise Invalid(*wrong.items())
    return made


def _wrong(form: type[BaseModel], error: Mapping[str, Any], largest: Mapping[str, int]) -> tuple[str, str]:
    """Where something is wrong, and what."""
    names, field = list[str](), FieldInfo()
    for part in error["loc"]:
        if isinstance(part, int):  # an item of a list
            field = FieldInfo.from_annotation(get_args(kind_of(field))[0])
        elif part not in form.model_fields:
            return unknown("field", str(part), form.model_fields, names)
        else:
            field = form.model_fields[part]
        names.append(str(part))
        if isinstance(kind := kind_of(field), type) and issubclass(kind, BaseModel):
            form = kind
    return "/".join(names), f"{'.'.join(names)} {says(field, error, largest.get(names[0]))}"
