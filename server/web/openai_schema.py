"""The request body and the error object of OpenAI's images API, as far as models without text can speak it.

The body may also have the fields of `POST /generate`, which are checked as those of all requests.
"""

import json
import re
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from model.sampling.labels import Labels
from server.bounds import unknown
from server.documents import ProblemDocument
from server.errors import Invalid, Problem
from server.jobs.schemas import Frames, GenerateRequest, parse_object, validate

PREFIX = "/v1/"  # of paths whose errors have OpenAI's form, too
MAX_PARTIAL = 3
PROMPT = re.compile(r"^\s*label\s*:", re.IGNORECASE)  # what a prompt that is a label may begin with
CODES = {"model-not-found": "model_not_found"}  # ours, and those that OpenAI's clients know
ErrorKind: TypeAlias = Literal["invalid_request_error", "rate_limit_error", "server_error"]
ImageFormat: TypeAlias = Literal["png", "webp", "jpeg"]


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`. Extra fields must be those of `POST /generate`."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: str | None = Field(
        None,
        max_length=32_000,
        description="Of a conditional model: a label, as `7` or `label: 7`. No other text has an effect.",
    )
    size: str | None = Field(
        None, max_length=16, description="`auto` or the size of the model's pictures, such as `32x32`."
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="Default: b64_json.")
    output_format: ImageFormat | None = Field(None, description="Default: png.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp; 100: lossless webp."
    )
    stream: bool | None = Field(None, description="Whether to answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL, description="Predictions of x0 per picture, for streams."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    quality: Literal["auto", "standard"] | None = Field(None, description="No effect: `steps` decides quality.")
    moderation: Literal["auto", "low"] | None = Field(None, description="No effect.")
    user: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")

    @property
    def format(self) -> ImageFormat:
        """The image format."""
        return self.output_format or "png"

    def generate(self, labels: Labels | None) -> bytes:
        """The same as a body of `POST /generate`. labels: of the model that is asked for"""
        fields = dict(self.model_extra or {})
        if labels is not None and not fields.keys() & {"label", "labels"}:
            label = labels.meant(PROMPT.sub("", self.prompt or "").strip())
            fields |= {} if label is None else {"label": label}
        if self.partial_images:  # evenly spaced between noise and picture
            frames = Frames(count=self.partial_images + 2, kind="x0")
            fields["frames"] = frames.model_dump(exclude_none=True)
        return json.dumps(fields).encode()

    def check_size(self, width: int, height: int) -> None:
        """Raises Invalid for another size."""
        if self.size not in (None, "auto", f"{width}x{height}"):
            raise Invalid(("size", f"size must be auto or {width}x{height}, the size of this model's pictures"))


class OpenAIError(TypedDict):
    """An error in OpenAI's form."""

    message: str
    type: ErrorKind
    param: Annotated[str | None, Field(description="the field that is wrong")]
    code: str


class OpenAIProblem(ProblemDocument):
    """Why a request was refused, in both forms."""

    error: OpenAIError


class TokenDetails(TypedDict):
    """Tokens by kind: none."""

    image_tokens: int
    text_tokens: int


class Usage(TypedDict):
    """Tokens, which OpenAI's types require: none."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImageFile(TypedDict, total=False):
    """A picture: its file in base64, or its URL."""

    b64_json: str
    url: str


class ImageEntry(ImageFile):
    """A picture: its file in base64, or its URL; and its seed."""

    revised_prompt: str
    seed: int


class ImagesAnswer(TypedDict):
    """The pictures of a request."""

    created: int
    data: list[ImageEntry]
    background: Literal["opaque"]
    output_format: ImageFormat
    size: str
    usage: Usage


class ImageEvent(TypedDict):
    """What the events of pictures have in common."""

    b64_json: str
    created_at: int
    background: Literal["opaque"]
    output_format: ImageFormat
    quality: Literal["auto"]
    size: str
    index: int
    seed: int


class PartialImage(ImageEvent):
    """A prediction of x0 on the way to a picture."""

    type: Literal["image_generation.partial_image"]
    partial_image_index: int


class WholeImage(ImageEvent):
    """A finished picture."""

    type: Literal["image_generation.completed"]
    usage: Usage
    revised_prompt: str


class ErrorEvent(TypedDict):
    """Why there are no more pictures."""

    type: Literal["error"]
    error: OpenAIError


class ModelEntry(TypedDict):
    """The name of a model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """The names of all models."""

    object: Literal["list"]
    data: list[ModelEntry]


def parse_images(body: bytes) -> ImagesRequest:
    """A request in OpenAI's form. Raises Malformed, or Invalid naming each wrong field."""
    request = validate(parse_object(body), ImagesRequest)
    known = [*ImagesRequest.model_fields, *GenerateRequest.model_fields]
    if strange := [name for name in request.model_extra or {} if name not in known]:
        raise Invalid(*(unknown("field", name, known) for name in strange[:20]))
    if request.partial_images and not request.stream:
        raise Invalid(("partial_images", "partial_images need stream: true"))
    if request.stream and "frames" in (request.model_extra or {}):
        raise Invalid(("frames", "frames: of a stream, partial_images says how many there are"))
    if request.response_format == "url" and (request.stream or request.format != "png"):
        raise Invalid(("response_format", "response_format must be b64_json for a stream, and for what is not png"))
    if request.output_compression is not None and request.format == "png":
        raise Invalid(("output_compression", "output_compression is for webp and jpeg only"))
    return request


def error_object(problem: Problem) -> OpenAIError:
    """An error in OpenAI's form."""
    kind: ErrorKind = "server_error" if problem.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if problem.status == 429 else kind
    named = [error["pointer"].removeprefix("/") for error in problem.errors if error["pointer"]]
    param = named[0] if named else None
    code = CODES.get(problem.code, problem.code)
    return {"message": problem.detail, "type": kind, "param": param, "code": code}
