"""Requests and events are those of the server."""

import json

import pytest
from ddpm_client import Dropped, Ended, Event, Frame, Picture, Queued, Request, Resync
from ddpm_client.types import event
from ddpm_client.wire import pack

from server.jobs.schemas import GenerateRequest

HEADER = {"job": "j", "seq": 3, "index": 1, "seed": 8, "step": 5, "steps": 9, "t": 400, "image_type": "image/png"}


def test_a_request_has_the_fields_that_the_server_knows() -> None:
    assert list(Request.__annotations__) == list(GenerateRequest.model_fields)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"type": "queued", "position": 2, "eta_s": 1.5}, Queued("j", 3, position=2, eta_s=1.5)),
        ({"type": "dropped", "from": 4, "to": 7}, Dropped("j", 3, first=4, last=7)),
        ({"type": "resync"}, Resync("j", 3)),
        ({"type": "failed", "document": {}}, Ended("j", 3, status="failed", document={})),
        ({"type": "a kind of tomorrow"}, None),
    ],
)
def test_a_text_message_is_an_event(message: dict[str, object], expected: Event | None) -> None:
    assert event(json.dumps({"job": "j", "seq": 3, **message})) == expected


def test_a_binary_message_is_a_picture_or_a_frame() -> None:
    frame = Frame("j", 3, index=1, seed=8, png=b"png", step=5, steps=9, t=400, kind="x_t")

    assert event(pack(HEADER | {"kind": "image"}, b"png")) == Picture("j", 3, index=1, seed=8, png=b"png")
    assert event(pack(HEADER | {"kind": "x_t"}, b"png")) == frame
