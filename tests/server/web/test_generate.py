"""`POST /generate` against a real server process with a real engine: pictures, in every form they can be asked for."""

import asyncio
import io
import json
import socket
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from unittest import mock

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request
from starlette.types import Message

from server.web.generate import succeeds
from tests.server.conftest import Server
from tests.server.fakes import read_texts


def generate(server: Server, accept: str = "image/png", **body: Any) -> httpx.Response:
    answer = server.client.post("/generate", json=body, headers={"accept": accept})
    assert answer.status_code == 200, answer.text
    return answer


def pixels(png: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_the_same_request_gives_the_same_bytes(server: Server) -> None:
    first, second = (generate(server, seed=7, steps=5) for _ in range(2))

    assert first.content == second.content
    assert first.headers["content-type"] == "image/png"
    assert first.headers["x-seed"] == "7"
    assert pixels(first.content).shape == (8, 8)


def test_image_i_is_the_picture_of_seed_plus_i(server: Server) -> None:
    archive = zipfile.ZipFile(io.BytesIO(generate(server, "application/zip", seed=40, steps=5, n=5).content))
    alone = [generate(server, seed=40 + i, steps=5).content for i in range(5)]

    assert [archive.read(name) for name in archive.namelist()] == alone


def test_a_contact_sheet_has_no_gaps_and_is_filled_up_with_black(server: Server) -> None:
    sheet = pixels(generate(server, seed=40, steps=5, n=5).content)
    alone = [pixels(generate(server, seed=40 + i, steps=5).content) for i in range(5)]

    expected = np.block([[*alone[:3]], [*alone[3:], np.zeros((8, 8), np.uint8)]])
    assert np.array_equal(sheet, expected)


def test_json_is_the_job_with_all_defaults_filled_in(server: Server) -> None:
    job = generate(server, "application/json", seed=3, steps=5, n=2, sampler="ddim").json()

    assert job["status"] == "succeeded"
    assert job["request"] == {
        "model": "tiny",
        "seed": 3,
        "n": 2,
        "sampler": "ddim",
        "steps": 5,
        "order": None,
        "timesteps": None,
        "plan": None,
        "spacing": "leading",
        "labels": None,
        "guidance": None,
        "guidance_interval": None,
        "clip": True,
        "noise": "philox",
        "variance": None,
        "eta": 0.0,
        "frames": None,
        "priority": 0,
        "deadline_s": None,
        "webhook": None,
    }
    for index, image in enumerate(job["images"]):
        png = server.client.get(image["url"])
        assert (image["index"], image["seed"]) == (index, 3 + index)
        assert image["sha256"] == sha256(png.content).hexdigest()
        assert png.headers["etag"] == f'"{image["sha256"]}"'
        assert png.content == generate(server, seed=3 + index, steps=5, sampler="ddim").content
        again = server.client.get(image["url"], headers={"if-none-match": png.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_npy_is_unrounded_and_rounds_to_the_png(server: Server) -> None:
    array = np.load(io.BytesIO(generate(server, "application/x-npy", seed=9, steps=5, n=2).content))

    assert (array.shape, array.dtype) == ((2, 1, 8, 8), np.float32)
    assert np.abs(array).max() <= 1
    rounded = np.round((array / 2 + 0.5) * 255).astype(np.uint8)
    assert np.array_equal(rounded[1, 0], pixels(generate(server, seed=10, steps=5).content))


def test_a_picture_can_be_made_again_from_its_own_text_chunks(server: Server) -> None:
    picture = generate(server, sampler="ddim", eta=0.5, steps=4, clip=False, noise="torch").content
    texts = read_texts(picture)
    numbers: dict[str, Callable[[str], Any]] = {
        "seed": int,
        "steps": int,
        "eta": float,
        "clip": lambda word: word == "true",
    }
    request = {k: numbers.get(k, str)(v) for k, v in texts.items() if k not in ("digest", "numerics")}

    assert generate(server, **request).content == picture


def test_a_missing_seed_is_drawn_and_reported(server: Server) -> None:
    picture = generate(server, steps=2)

    assert picture.content == generate(server, steps=2, seed=int(picture.headers["x-seed"])).content


def test_an_empty_request_uses_the_defaults_of_the_model(server: Server) -> None:
    job = server.client.post("/generate", headers={"accept": "application/json"}).json()

    assert (job["request"]["steps"], job["request"]["variance"]) == (30, "small")


@pytest.mark.parametrize("sampler", ["ddpm", "greedy", "ddim", "dpmpp_2m"])
def test_other_pictures_in_the_batch_change_nothing(server: Server, sampler: str) -> None:
    alone = generate(server, seed=1, steps=9, sampler=sampler).content
    many = zipfile.ZipFile(
        io.BytesIO(generate(server, "application/zip", seed=0, steps=9, n=7, sampler=sampler).content)
    )

    assert many.read(many.namelist()[1]) == alone


def test_models_describe_themselves_and_their_numerics(server: Server) -> None:
    (model,) = server.client.get("/models").json()["models"]
    whole = server.client.get("/models/tiny").json()

    assert (model["name"], model["T"], model["loaded"]) == ("tiny", 30, True)
    assert model["shape"] == {"channels": 1, "height": 8, "width": 8}
    assert model["runs"]["exact"] is True
    assert model["digest"].startswith("sha256:")
    assert whole.keys() - model.keys() == {"card"}


def test_a_handler_that_is_cancelled_ends_as_cancelled_though_its_client_leaves_meanwhile() -> None:
    async def scene() -> None:
        gone, left = asyncio.Event(), asyncio.Event()

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def leave(job: Any) -> None:
            gone.set()  # the client goes while its job is given up
            await asyncio.sleep(0.01)
            left.set()

        jobs = mock.Mock(result=lambda job: asyncio.Event().wait(), leave=leave)
        handler = asyncio.create_task(succeeds(Request({"type": "http"}, receive), jobs, mock.Mock()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        handler.cancel()
        await asyncio.wait([handler])
        assert (handler.cancelled(), left.is_set()) == (True, True)

    asyncio.run(scene())


def test_a_client_that_disconnects_frees_its_slots(server: Server) -> None:
    """Twenty callers ask for 64 pictures each and leave; the next one is served as if they had never been."""
    body = json.dumps({"steps": 30, "n": 64}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    alone = _seconds(lambda: generate(server, steps=30, seed=1))
    whole = _seconds(lambda: generate(server, steps=30, n=64, seed=1))
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as caller:
            caller.sendall(head.encode() + body)
            time.sleep(0.02)
    # Were their jobs still on their way, this one would wait for twenty times `whole`.
    assert _seconds(lambda: generate(server, steps=30, seed=1)) < alone + 2 * whole


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_the_openapi_document_describes_the_request(server: Server) -> None:
    spec = server.client.get("/openapi.json").json()

    body = spec["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = spec["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    assert {"seed", "steps", "n", "sampler", "model"} <= fields.keys()
    assert server.client.get("/docs").status_code == 200
