"""OpenAI's images API, as OpenAI's own package speaks it."""

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse
from PIL import Image
from starlette.testclient import TestClient

from server.errors import SampleLost
from server.settings import Settings
from server.web.app import create_app
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.server.web.test_auth import ALICE, bearer, line
from tests.waiting import until

FIELDS: dict[str, Any] = {"seed": 7, "steps": 6, "sampler": "ddim"}


@pytest.fixture
def talk(server: Server) -> Iterator[OpenAI]:
    """The package, and a server with a real engine."""
    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def over(client: TestClient, key: str = "none", retries: int = 0) -> OpenAI:
    """The package over an application in this process."""
    return OpenAI(base_url="http://testserver/v1", api_key=key, http_client=client, max_retries=retries)


def backend_of(client: TestClient) -> FakeBackend:
    backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
    assert isinstance(backend, FakeBackend)
    return backend


def pngs(answer: ImagesResponse) -> list[bytes]:
    return [base64.b64decode(image.b64_json or "") for image in answer.data or ()]


def generated(server: Server, accept: str = "image/png", **body: Any) -> httpx.Response:
    answer = server.client.post("/generate", json=body, headers={"accept": accept})
    assert answer.status_code == 200, answer.text
    return answer


def test_the_picture_has_the_same_bytes_as_that_of_generate(server: Server, talk: OpenAI) -> None:
    answer = talk.images.generate(model="tiny", prompt="", size="8x8", extra_body=FIELDS)

    assert pngs(answer) == [generated(server, **FIELDS).content]
    assert (answer.size, answer.output_format, answer.background) == ("8x8", "png", "opaque")
    assert answer.usage is not None and answer.usage.total_tokens == 0


def test_n_pictures_have_consecutive_seeds(server: Server, talk: OpenAI) -> None:
    answer = talk.images.generate(prompt="", n=3, extra_body=FIELDS)

    archive = zipfile.ZipFile(io.BytesIO(generated(server, "application/zip", n=3, **FIELDS).content))
    assert pngs(answer) == [archive.read(name) for name in archive.namelist()]
    assert [image.model_extra for image in answer.data or ()] == [{"seed": 7}, {"seed": 8}, {"seed": 9}]


def test_a_prompt_has_no_effect_and_the_answer_says_so(talk: OpenAI) -> None:
    silent, wordy = (talk.images.generate(prompt=prompt, extra_body=FIELDS) for prompt in ("", "a cat, seed=8"))

    assert pngs(silent) == pngs(wordy)
    assert [image.revised_prompt for image in wordy.data or ()] == [""]


def test_partial_images_are_x0_evenly_spread_and_the_stream_ends_on_the_picture(server: Server, talk: OpenAI) -> None:
    stream = talk.images.generate(prompt="", stream=True, partial_images=3, extra_body=FIELDS | {"steps": 8})
    *partial, last = list(stream)

    told = generated(server, "text/event-stream", frames={"count": 5, "kind": "x0"}, **FIELDS | {"steps": 8}).text
    frames = [json.loads(words.split("data: ")[1]) for words in told.split("\n\n") if words.startswith("event: frame")]
    assert [frame["step"] for frame in frames] == [2, 4, 6, 8]
    assert [event.b64_json for event in partial] == [frame["b64_png"] for frame in frames[:3]]
    assert [event.partial_image_index for event in partial if isinstance(event, ImageGenPartialImageEvent)] == [0, 1, 2]
    assert isinstance(last, ImageGenCompletedEvent)
    assert base64.b64decode(last.b64_json) == generated(server, **FIELDS | {"steps": 8}).content
    assert (last.size, last.output_format, last.usage.total_tokens) == ("8x8", "png", 0)


def test_there_are_fewer_partial_images_than_steps(talk: OpenAI) -> None:
    def kinds(steps: int, partial: int, n: int = 1) -> list[str]:
        asked = FIELDS | {"steps": steps}
        stream = talk.images.generate(prompt="", n=n, stream=True, partial_images=partial, extra_body=asked)
        return [event.type.removeprefix("image_generation.") for event in stream]

    assert kinds(steps=2, partial=3) == ["partial_image", "completed"]
    assert kinds(steps=1, partial=3) == ["completed"]
    assert kinds(steps=9, partial=0) == ["completed"]
    assert sorted(kinds(steps=9, partial=2, n=2)) == ["completed"] * 2 + ["partial_image"] * 4


def test_closing_the_stream_cancels_the_job(server: Server, talk: OpenAI) -> None:
    body = {"seed": 1, "steps": 30}
    stream = talk.images.generate(prompt="", n=64, stream=True, partial_images=3, extra_body=body)
    next(iter(stream))
    job = stream.response.headers["x-job-id"]
    stream.close()

    def status() -> str:
        return str(server.client.get(f"/jobs/{job}").json()["status"])

    until(lambda: status() != "running")
    assert status() == "cancelled"


def test_a_url_leads_to_the_picture_of_the_job(server: Server, talk: OpenAI) -> None:
    answer = talk.images.generate(prompt="", n=2, response_format="url", extra_body=FIELDS)

    urls = [image.url or "" for image in answer.data or ()]
    assert all(url.startswith(f"http://127.0.0.1:{server.port}/jobs/") for url in urls)
    assert [server.client.get(url).content for url in urls] == [
        generated(server, **FIELDS | {"seed": seed}).content for seed in (7, 8)
    ]


def test_webp_is_lossless_and_jpeg_has_a_quality(server: Server, talk: OpenAI) -> None:
    def made(format: Literal["webp", "jpeg"], quality: int | None = None) -> bytes:
        asked = talk.images.generate(prompt="", output_format=format, output_compression=quality, extra_body=FIELDS)
        return pngs(asked)[0]

    webp, jpeg, coarse = made("webp"), made("jpeg", 100), made("jpeg", 0)

    png = Image.open(io.BytesIO(generated(server, **FIELDS).content)).convert("RGB")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(webp)).convert("RGB")), np.asarray(png))
    assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
    assert len(coarse) < len(jpeg)


def test_null_means_not_set_for_the_fields_of_openai(talk: OpenAI) -> None:
    answer = talk.images.generate(
        model=None, prompt="", n=None, size=None, quality=None, background=None, extra_body=FIELDS | {"prompt": None}
    )

    assert pngs(answer) == pngs(talk.images.generate(prompt="", user="me", moderation="low", extra_body=FIELDS))


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"size": "1024x1024"}, "size", "auto or 8x8"),
    ({"n": 0}, "n", "n must lie in 1..8, got 0"),
    ({"n": 9}, "n", "1..8"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"quality": "high"}, "quality", "standard"),
    ({"output_format": "gif"}, "output_format", "webp"),
    ({"output_compression": 50}, "output_compression", "webp and jpeg only"),
    ({"response_format": "url", "output_format": "webp"}, "response_format", "must be b64_json"),
    ({"response_format": "url", "stream": True}, "response_format", "must be b64_json"),
    ({"partial_images": 4, "stream": True}, "partial_images", "partial_images must lie in 0..3, got 4"),
    ({"partial_images": 1}, "partial_images", "stream"),
    ({"stream": True, "extra_body": {"frames": None}}, "frames", "partial_images"),
    ({"style": "vivid"}, "style", 'unknown field "style"; there are prompt, size, '),
    ({"extra_body": {"seed": -1}}, "seed", "seed must lie in 0..9007199254740991, got -1"),
    ({"extra_body": {"eta": 0.5}}, "eta", "ddim only"),
    ({"extra_body": {"steps": 31}}, "steps", "1..30"),
    ({"extra_body": {"prompt": ["a", "b"]}}, "prompt", "prompt must be a string of 0 to 32000 characters, got a list"),
]


@pytest.mark.parametrize(("asked", "field", "limit"), REFUSED)
def test_unsupported_fields_are_bad_requests_that_name_the_field(
    client: TestClient, asked: dict[str, Any], field: str | None, limit: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        over(client).images.generate(prompt="", **asked)

    assert (refusal.value.type, refusal.value.param, refusal.value.code) == (
        "invalid_request_error",
        field,
        "invalid-request",
    )
    assert limit in refusal.value.message
    assert backend_of(client).specs == []


def test_too_many_partial_images_are_refused_by_their_own_name(weights: Path, tmp_path: Path) -> None:
    settings = Settings(weights=str(weights), data_dir=tmp_path, max_frames=4)
    with TestClient(create_app(settings, FakeBackend())) as client, pytest.raises(openai.BadRequestError) as refusal:
        over(client).images.generate(prompt="", stream=True, partial_images=3)

    assert (refusal.value.param, "at most 4, got 5" in refusal.value.message) == ("partial_images", True)


def test_a_full_queue_is_a_rate_limit_and_the_package_waits_as_told(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity, waited = client.app.state.jobs.admission.capacity, []  # type: ignore[attr-defined]

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        capacity.steps = 0

    capacity.steps = 190
    asked = {"steps": 30, "seed": 1}
    with pytest.raises(openai.RateLimitError) as refusal:
        over(client).images.generate(prompt="", n=6, extra_body=asked)
    assert (refusal.value.type, refusal.value.code) == ("rate_limit_error", "queue-full")

    monkeypatch.setattr("openai._base_client.time.sleep", sleep)
    # 170 image-steps too many, at ten a second
    assert len(pngs(over(client, retries=1).images.generate(prompt="", n=6, extra_body=asked))) == 6
    assert waited == [17.0]


def test_a_permanent_failure_is_not_retried(client: TestClient) -> None:
    backend_of(client).failure = SampleLost("the picture was not finite after 7 steps")

    with pytest.raises(openai.InternalServerError, match="not finite") as refusal:
        over(client, retries=2).images.generate(prompt="")

    assert (refusal.value.type, refusal.value.code) == ("server_error", "sample-failed")
    assert len(backend_of(client).specs) == 1


def test_a_failure_in_the_middle_of_a_stream_is_raised_by_the_package(client: TestClient) -> None:
    backend_of(client).failure = SampleLost("the picture was not finite after 7 steps")
    stream = over(client).images.generate(prompt="", stream=True, partial_images=2)

    assert [next(stream).type for _ in range(2)] == ["image_generation.partial_image"] * 2
    with pytest.raises(openai.APIError, match="not finite") as failure:
        next(stream)
    assert failure.value.code == "sample-failed"


@pytest.fixture
def locked(weights: Path, tmp_path: Path) -> Iterator[TestClient]:
    """The application behind a key."""
    keys = tmp_path / "keys"
    keys.write_text(line("alice", ALICE))
    settings = Settings(weights=weights, data_dir=tmp_path / "data", api_keys=str(keys))
    with TestClient(create_app(settings, FakeBackend()), raise_server_exceptions=False) as made:
        yield made


def test_a_wrong_key_is_an_authentication_error(locked: TestClient) -> None:
    with pytest.raises(openai.AuthenticationError) as refusal:
        over(locked, key="wrong").models.list()

    assert (refusal.value.type, refusal.value.code) == ("invalid_request_error", "unauthenticated")
    assert [model.id for model in over(locked, key=ALICE).models.list()] == ["tiny"]


def test_a_url_needs_the_key_of_its_job(locked: TestClient) -> None:
    answer = over(locked, key=ALICE).images.generate(prompt="", response_format="url")

    url = (answer.data or [])[0].url or ""
    assert locked.get(url).status_code == 401
    assert locked.get(url, headers=bearer(ALICE)).headers["content-type"] == "image/png"


def test_a_request_repeated_with_its_idempotency_key_is_the_same_job(client: TestClient) -> None:
    def job(key: str, **asked: Any) -> str:
        answer = over(client).images.with_raw_response.generate(
            prompt="", extra_headers={"Idempotency-Key": key}, **asked
        )
        return str(answer.headers["x-job-id"])

    assert job("a", response_format="url") == job("a") != job("b")
    with pytest.raises(openai.BadRequestError) as refusal:
        job("a", n=2)
    assert refusal.value.code == "key-reused"


def test_models_are_listed_and_found_by_their_names(client: TestClient) -> None:
    found = over(client).models.retrieve("tiny")

    assert (found.id, found.object, found.owned_by) == ("tiny", "model", "ddpm-server")
    with pytest.raises(openai.NotFoundError, match="model must be one of tiny"):
        over(client).models.retrieve("gpt-image-2")


def test_errors_are_in_openais_form_under_its_paths_and_nowhere_else(client: TestClient) -> None:
    theirs, ours = client.get("/v1/nothing"), client.get("/nothing")

    assert (theirs.status_code, ours.status_code) == (404, 404)
    assert theirs.json()["error"] == {
        "message": "there is no such path",
        "type": "invalid_request_error",
        "param": None,
        "code": "not-found",
    }
    assert "error" not in ours.json()
    assert client.get("/v1/images/generations").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"prompt": NaN}', b'{"prompt": "a", "prompt": "b"}', b'{"seed": 1e400}']
)
def test_a_malformed_body_is_a_bad_request(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["status"]) == (400, 400)
    assert answer.json()["error"]["type"] == "invalid_request_error"
