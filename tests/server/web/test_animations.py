"""Animations show the frames that were asked for: x_t, x0, or both side by side."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.cli.main import main
from tests.server.conftest import Server

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
N, STEPS, POINTS = 2, 6, (0, 2, 4, 6)
BLACK = np.zeros((8, 8), np.uint8)
MEDIA = ["image/gif", "image/apng", "image/webp"]


def pixels(image: Image.Image) -> Pixels:
    """A grey picture. -> [H, W]"""
    return np.asarray(image.convert("L"))


def frames_of(data: bytes) -> list[Pixels]:
    """The pictures of an animation."""
    with Image.open(io.BytesIO(data)) as moving:
        shown = []
        for place in range(getattr(moving, "n_frames", 1)):
            moving.seek(place)
            shown.append(pixels(moving))
        return shown


def expected(server: Server, job: str, kind: str) -> list[Pixels]:
    """The same, put together from the messages of the job: two pictures beside each other, each as its kinds are."""
    sent: dict[tuple[int, int, str], Pixels] = {}
    for block in server.client.get(f"/jobs/{job}/events").text.split("\n\n"):
        data = json.loads(block.partition("data: ")[2] or "{}")
        if "b64_png" in data:
            with Image.open(io.BytesIO(base64.b64decode(data["b64_png"]))) as image:
                sent[data["index"], data["step"], data["kind"]] = pixels(image)
    kinds = ("x_t", "x0") if kind == "both" else (kind,)
    points = [step for step in POINTS[:-1] if (0, step, kinds[0]) in sent]
    shown = [[sent.get((i, step, each), BLACK) for i in range(N) for each in kinds] for step in points]
    shown.append([sent[i, STEPS, "image"] for i in range(N) for _ in kinds])
    return [np.hstack(row) for row in shown]


@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize(("kind", "count", "width"), [("x_t", 4, 16), ("x0", 3, 16), ("both", 4, 32)])
def test_an_animation_shows_the_kind_of_frames_that_was_asked_for(
    server: Server, kind: str, count: int, width: int, media: str
) -> None:
    asked = {"seed": 3, "steps": STEPS, "n": N, "frames": {"every": 2, "kind": kind}}
    answer = server.client.post("/generate", json=asked, headers={"accept": media})
    again = server.client.get(f"/jobs/{answer.headers['x-job-id']}/trajectory", headers={"accept": media})
    shown = frames_of(answer.content)

    assert again.content == answer.content
    assert [frame.shape for frame in shown] == [(8, width)] * count
    assert len(expected(server, answer.headers["x-job-id"], kind)) == count
    for frame, right in zip(shown, expected(server, answer.headers["x-job-id"], kind), strict=True):
        assert np.abs(frame.astype(int) - right).max() <= 1  # WebP knows no grey


def test_both_begins_without_a_prediction_and_ends_on_the_picture(server: Server) -> None:
    asked = {"seed": 3, "steps": STEPS, "frames": {"count": 3, "kind": "both"}}
    answer = server.client.post("/generate", json=asked, headers={"accept": "image/apng"})
    first, middle, last = frames_of(answer.content)
    picture = server.client.get(f"/jobs/{answer.headers['x-job-id']}/images/0").content

    assert np.array_equal(first[:, 8:], BLACK) and not np.array_equal(first[:, :8], BLACK)
    assert not np.array_equal(middle[:, :8], middle[:, 8:])
    with Image.open(io.BytesIO(picture)) as image:
        assert np.array_equal(last, np.hstack([pixels(image)] * 2))


def test_the_command_writes_both_kinds_into_one_file(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.gif"
    asked = ["--seed", "3", "--steps", "6", "--frames-every", "2", "--frames-kind", "both", "--frames", str(out)]

    assert main(["generate", "--url", f"http://127.0.0.1:{server.port}", "-o", str(tmp_path / "a.png"), *asked]) == 0
    assert [frame.shape for frame in frames_of(out.read_bytes())] == [(8, 16)] * 4
