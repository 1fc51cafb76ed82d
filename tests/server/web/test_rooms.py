"""The small rooms: Accept headers, settings, logs, contact sheets."""

import json
import logging

import numpy as np
import pytest

from server.errors import NotAcceptable, SettingsError, TooBusy
from server.jobs.admission import Capacity
from server.jobs.encode import contact_sheet, npy, png
from server.logs import JsonLines
from server.settings import Settings
from server.web.http import negotiate
from tests.server.fakes import read_texts

OFFERS = ("image/png", "application/json", "application/zip")


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        (None, "image/png"),
        ("*/*", "image/png"),
        ("", "image/png"),
        ("application/json", "application/json"),
        ("application/*", "application/json"),
        ("text/html, application/zip", "application/zip"),
        ("image/png;q=0.1, application/json;q=0.5", "application/json"),
        ("*/*;q=0.1, application/zip", "application/zip"),
        ("image/png;q=0, */*", "application/json"),
        ("IMAGE/PNG", "image/png"),
        ("image/png;q=nonsense, application/zip", "application/zip"),
    ],
)
def test_the_most_specific_range_decides(accept: str | None, answer: str) -> None:
    assert negotiate(accept, OFFERS) == answer


def test_what_nobody_can_make_is_not_acceptable() -> None:
    with pytest.raises(NotAcceptable, match="application/zip"):
        negotiate("text/html", OFFERS)


def test_flags_override_variables_and_other_variables_do_not_matter() -> None:
    settings = Settings.read({"DDPM_SLOTS": "4", "DDPM_EXACT": "0", "HOME": "x"}, {"slots": "8"})

    assert (settings.slots, settings.exact) == (8, False)


def test_an_unknown_variable_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match="DDPM_SLOTZ is not a setting; there are .*DDPM_SLOTS"):
        Settings.read({"DDPM_SLOTZ": "4"})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("PORT", "70000", "DDPM_PORT must lie in 0..65535, got 70000: port to listen on"),
        ("SLOTS", "many", "DDPM_SLOTS must be an integer in 0..1024: pictures in one batch"),
        ("MAX_QUEUED_STEPS", "0", "DDPM_MAX_QUEUED_STEPS must be at least 1, got 0: "),
        ("REQUEST_S", "0.05", "DDPM_REQUEST_S must lie in 0.1..3600, got 0.05: "),
        ("EXACT", "perhaps", "DDPM_EXACT must be yes or no: "),
        ("DTYPE", "int8", "DDPM_DTYPE must be one of auto, float32, bfloat16, float16: "),
        ("DEVICE", "gpu", "DDPM_DEVICE is ill-formed: cpu, cuda (every GPU), cuda:N or cuda:N,M; auto: "),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_can(name: str, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.read({f"DDPM_{name}": text})

    assert str(refusal.value).startswith(said)


def test_a_full_queue_says_when_there_will_be_room() -> None:
    capacity = Capacity(10)
    capacity.take(6, step_s=1)
    with pytest.raises(TooBusy) as refusal:
        capacity.take(7, step_s=1.5)

    assert refusal.value.retry_after_s == 5  # three image-steps too many, of one and a half seconds each
    capacity.steps -= 3
    capacity.take(7, step_s=1)
    assert capacity.steps == 10


def test_a_record_is_one_line_whatever_is_in_it() -> None:
    record = logging.makeLogRecord({"msg": "a\nb\x1b[0m\u2028", "levelname": "INFO", "request_id": "r\n1"})

    line = JsonLines().format(record)

    assert len(line.splitlines()) == 1
    assert json.loads(line)["request_id"] == "r\n1"


def test_one_picture_is_its_own_contact_sheet() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)

    assert np.array_equal(contact_sheet([picture]), picture)


def test_a_png_carries_its_texts_and_nothing_else() -> None:
    data = png(np.zeros((4, 4, 3), np.uint8), {"seed": "42", "model": "digits"})

    assert read_texts(data) == {"seed": "42", "model": "digits"}
    assert data == png(np.zeros((4, 4, 3), np.uint8), {"seed": "42", "model": "digits"})


def test_npy_holds_little_endian_float32() -> None:
    assert npy([np.zeros((1, 2, 2), np.float32)])[:40].startswith(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'")
