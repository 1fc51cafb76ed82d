"""OpenAI's images API, as far as models that know no words can speak it: what may be asked, and errors in its form.

The fields of `POST /generate` may stand beside OpenAI's own. They are checked where those of all requests are.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.errors import Invalid, Problem
from server.jobs.schemas import Frames, GenerateRequest, parse_object, validate

PREFIX = "/v1/"  # of paths whose errors speak this language, too
MOST_PARTIAL = 3
INVALID, TOO_MANY, OURS = "invalid_request_error", "rate_limit_error", "server_error"


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`. What is not named here is a field of `POST /generate`, or refused."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: str | None = Field(None, max_length=32_000, description="has no effect: these models know no words")
    size: str | None = Field(None, max_length=16, description="auto, or the size of the model's pictures, as 32x32")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json if not given")
    output_format: Literal["png", "webp", "jpeg"] | None = Field(None, description="png if not given")
    output_compression: int | None = Field(None, ge=0, le=100, description="of webp, 100: lossless; of jpeg")
    stream: bool | None = Field(None, description="whether the answer is server-sent events")
    partial_images: int | None = Field(None, ge=0, le=MOST_PARTIAL, description="so many x0 of each picture; streams")
    background: Literal["auto", "opaque"] | None = Field(None, description="pictures are opaque")
    quality: Literal["auto", "standard"] | None = Field(None, description="has no effect; `steps` has")
    moderation: Literal["auto", "low"] | None = Field(None, description="has no effect: there is nothing to moderate")
    user: str | None = Field(None, description="has no effect")
    safety_identifier: str | None = Field(None, description="has no effect")

    @property
    def format(self) -> str:
        """The kind of file that pictures are answered as."""
        return self.output_format or "png"

    def generate(self) -> bytes:
        """The same as a body of `POST /generate`."""
        fields = dict(self.model_extra or {})
        if self.partial_images:  # so many between noise and picture, evenly spread
            frames = Frames(count=self.partial_images + 2, kind="x0")
            fields["frames"] = frames.model_dump(exclude_none=True)
        return json.dumps(fields).encode()

    def check_size(self, width: int, height: int) -> None:
        """Raises Invalid if another size is asked for."""
        if self.size not in (None, "auto", f"{width}x{height}"):
            raise Invalid(("size", f"size must be auto or {width}x{height}, the size of this model's pictures"))


def parse_images(body: bytes) -> ImagesRequest:
    """A request in OpenAI's words. Raises Malformed, or Invalid naming what is wrong."""
    request = validate(parse_object(body), ImagesRequest)
    known = [*ImagesRequest.model_fields, *GenerateRequest.model_fields]
    if request.model_extra and not request.model_extra.keys() <= set(known):
        raise Invalid(("", f"unknown field; there are {', '.join(known)}"))
    if request.partial_images and not request.stream:
        raise Invalid(("partial_images", "partial_images need stream: true"))
    if request.stream and "frames" in (request.model_extra or {}):
        raise Invalid(("frames", "frames: of a stream, partial_images says how many there are"))
    if request.response_format == "url" and (request.stream or request.format != "png"):
        raise Invalid(("response_format", "response_format must be b64_json for a stream, and for what is not png"))
    if request.output_compression is not None and request.format == "png":
        raise Invalid(("output_compression", "output_compression is for webp and jpeg only"))
    return request


def error_object(problem: Problem) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = TOO_MANY if problem.status == 429 else OURS if problem.status >= 500 else INVALID
    named = [error["pointer"].removeprefix("/") for error in problem.errors if error["pointer"]]
    param = named[0] if named else None
    return {"message": problem.detail, "type": kind, "param": param, "code": problem.code}
