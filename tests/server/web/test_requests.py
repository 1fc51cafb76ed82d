"""Refusals: each names the field and its bounds."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from model.checkpoint.scheduler import MAX_T
from server.errors import Invalid, SampleLost
from server.jobs.schemas import MAX_DEPTH, GenerateRequest, validate
from server.settings import Settings
from server.web.app import create_app
from tests.model.convert.directories import write_model
from tests.server.fakes import FakeBackend, read_texts

INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"seed": -1}, "/seed", "seed must lie in 0..9007199254740991, got -1"),
    ({"seed": 2**53}, "/seed", "seed must lie in 0..9007199254740991, got 9007199254740992"),
    ({"seed": 2**53 - 1, "n": 2}, "/seed", "seed must lie in 0..9007199254740990, got 9007199254740991"),
    ({"seed": True}, "/seed", "seed must be an integer in 0..9007199254740991, got true"),
    ({"seed": "7"}, "/seed", "seed must be an integer in 0..9007199254740991, got a string"),
    ({"seed": 3.0}, "/seed", "seed must be an integer in 0..9007199254740991, got 3.0"),
    ({"seed": 10**400}, "/seed", "seed must lie in 0..9007199254740991, got a number of 401 digits"),
    ({"steps": 0}, "/steps", "steps must lie in 1..30, got 0"),
    ({"steps": 31}, "/steps", "steps must lie in 1..30, got 31"),
    ({"steps": 10**9}, "/steps", "steps must lie in 1..30, got 1000000000"),
    ({"steps": []}, "/steps", "steps must be an integer in 1..30, got a list"),
    ({"n": 0}, "/n", "n must lie in 1..8, got 0"),
    ({"n": 9}, "/n", "n must lie in 1..8, got 9"),
    ({"n": 10**400}, "/n", "n must lie in 1..8, got a number of 401 digits"),
    ({"frames": {"every": 1, "count": 3}}, "/frames", "frames must have either every or count"),
    ({"frames": {}}, "/frames", "frames must have either every or count"),
    ({"frames": {"count": 1}}, "/frames/count", "frames.count must lie in 2..9007199254740991, got 1"),
    ({"frames": {"count": 2, "kind": "y"}}, "/frames/kind", "frames.kind must be one of x_t, x0, both"),
    (
        {"frames": {"count": 2, "often": 1}},
        "/frames/often",
        'frames: unknown field "often"; there are every, count, kind',
    ),
    ({"frames": 3}, "/frames", "frames must be an object of every, count, kind, got 3"),
    ({"sampler": "euler"}, "/sampler", "ddpm, greedy, ddim, dpmpp, unipc, deis, ipndm, dpmpp_sde, dpmpp_2m"),
    ({"sampler": "e" * 33}, "/sampler", "sampler must be a string of 0 to 32 characters, got 33"),
    ({"eta": 0.5}, "/eta", "ddim only"),
    ({"sampler": "ddim", "eta": 1.5}, "/eta", "eta must lie in 0..1, got 1.5"),
    ({"sampler": "ddim", "variance": "small"}, "/variance", "ddpm only"),
    ({"variance": "learned"}, "/variance", "small or large"),
    ({"variance": "huge"}, "/variance", "variance must be one of small, large, learned"),
    ({"spacing": "quad"}, "/spacing", "spacing must be one of leading, linspace, trailing"),
    ({"order": 2}, "/order", "order applies to dpmpp, "),
    ({"sampler": "unipc", "order": 0}, "/order", "order must lie in 1..3, got 0"),
    ({"sampler": "unipc", "order": 4}, "/order", "order must lie in 1..3, got 4"),
    ({"sampler": "dpmpp_2m", "order": 3}, "/order", "order must be 2 for dpmpp_2m, got 3"),
    ({"sampler": "ipndm", "order": 5}, "/order", "order must lie in 1..4, got 5"),
    ({"sampler": "unipc", "order": 2.0}, "/order", "order must be an integer in 1..3, got 2.0"),
    ({"sampler": "unipc", "order": 10**400}, "/order", "order must lie in 1..3, got a number of 401 digits"),
    ({"timesteps": []}, "/timesteps", "timesteps must be a list of 1 to 30 integers, got 0"),
    ({"timesteps": "30,20"}, "/timesteps", "timesteps must be a list of 1 to 30 integers, got a string"),
    ({"timesteps": {"0": 1}}, "/timesteps", "timesteps must be a list of 1 to 30 integers, got an object"),
    ({"timesteps": [9, 8, "7"]}, "/timesteps/2", "timesteps.2 must be an integer in 1..30, got a string"),
    ({"timesteps": [9, True]}, "/timesteps/1", "timesteps.1 must be an integer in 1..30, got true"),
    ({"timesteps": [9, None]}, "/timesteps/1", "timesteps.1 must be an integer in 1..30, got null"),
    ({"timesteps": [9, 8.5]}, "/timesteps/1", "timesteps.1 must be an integer in 1..30, got 8.5"),
    ({"timesteps": [9, [8]]}, "/timesteps/1", "timesteps.1 must be an integer in 1..30, got a list"),
    ({"timesteps": [9, 0]}, "/timesteps/1", "timesteps.1 must lie in 1..30, got 0"),
    ({"timesteps": [10**400]}, "/timesteps/0", "timesteps.0 must lie in 1..30, got a number of 401 digits"),
    ({"timesteps": [31, 9]}, "/timesteps", "timesteps must lie in 1..30, got 31"),
    ({"timesteps": [9, 10]}, "/timesteps", "timesteps must descend without repeats, got 10 behind 9"),
    ({"timesteps": [9, 9]}, "/timesteps", "timesteps must descend without repeats, got 9 behind 9"),
    ({"timesteps": [*range(31, 0, -1)]}, "/timesteps", "timesteps must be 1..30 levels, got 31"),
    ({"timesteps": [9], "steps": 1}, "/steps", "steps must be left out beside timesteps"),
    ({"timesteps": [9], "spacing": "leading"}, "/spacing", "spacing must be left out beside timesteps"),
    ({"plan": "slow"}, "/plan", "plan must be one of fast"),
    ({"plan": ""}, "/plan", "plan must be a string of 1 to 64 characters, got 0"),
    ({"plan": "p" * 65}, "/plan", "plan must be a string of 1 to 64 characters, got 65"),
    ({"plan": "fast", "steps": 5}, "/steps", "steps must be left out beside plan"),
    ({"plan": "fast", "sampler": "ddpm"}, "/sampler", "sampler must be left out beside plan"),
    ({"preset": "turbo"}, "/preset", "preset must be one of fast, balanced, full"),
    ({"preset": 1}, "/preset", "preset must be one of fast, balanced, full, got 1"),
    *(
        ({"preset": "fast", name: value}, f"/{name}", f"{name} must be left out beside preset")
        for name, value in {
            "sampler": "ddpm",
            "steps": 5,
            "order": 2,
            "timesteps": [9],
            "plan": "fast",
            "spacing": "leading",
            "eta": 0,
            "variance": "small",
            "clip": True,
        }.items()
    ),
    ({"clip": 1}, "/clip", "clip must be true or false, got 1"),
    ({"noise": "numpy"}, "/noise", "noise must be one of philox, torch"),
    ({"priority": 11}, "/priority", "priority must lie in -10..10, got 11"),
    ({"priority": -11}, "/priority", "priority must lie in -10..10, got -11"),
    ({"deadline_s": 0}, "/deadline_s", "deadline_s must be more than 0, at most 1000000, got 0"),
    ({"deadline_s": "1"}, "/deadline_s", "deadline_s must be a number more than 0, at most 1000000, got a string"),
    ({"model": ["tiny"]}, "/model", "model must be a string of 1 to 64 characters, got a list"),
    ({"prompt": "a digit"}, "/prompt", 'unknown field "prompt"; there are model, seed, '),
    ({"a/b~c": 1}, "", "unknown field; there are model, seed, "),
    ({"x\n\u202e<b>": 1}, "", "unknown field; there are"),
    ({"": 1}, "", "unknown field; there are"),
    ({"ddpm_9f86d081884c7d659a2feaa0": 1}, "", "unknown field; there are"),
    ({"y" * 41: 1}, "", "unknown field; there are"),
    ({"frames": {"count": 2, "z" * 41: 1}}, "/frames", "frames: unknown field; there are every, count, kind"),
    ({"n": 8, "steps": 30}, "/n", "at most 200"),
]


@pytest.mark.parametrize(("body", "pointer", "limit"), INVALID)
def test_a_field_out_of_bounds_is_named_with_its_bounds(
    client: TestClient, body: dict[str, Any], pointer: str, limit: str
) -> None:
    answer = client.post("/generate", json=body)

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert limit in answer.json()["errors"][0]["message"]


def test_more_levels_than_any_model_has_are_refused_before_they_are_looked_at(weights: Path) -> None:
    for level, pointer in (("x", "timesteps/0"), (1, "timesteps")):
        with pytest.raises(Invalid) as caught:
            validate({"timesteps": [level] * (MAX_T + 1)}, GenerateRequest)
        assert [name for name, _ in caught.value.fields] == [pointer]


def test_a_preset_is_what_it_stands_for(client: TestClient) -> None:
    def document(**request: Any) -> Any:
        made = client.post("/generate", json={"seed": 7} | request, headers={"accept": "application/json"})
        return made.raise_for_status().json()["request"]

    presets = client.get("/models/tiny").json()["presets"]
    for name, fields in presets.items():
        asked = document(preset=name)
        assert asked | fields == asked == document(**{field: v for field, v in fields.items() if v is not None})
    assert document(preset="full", noise="torch") == document(noise="torch")
    assert presets["fast"]["steps"] == 10


def test_levels_that_are_given_are_the_steps_of_a_job(client: TestClient) -> None:
    asked = {"seed": 7, "sampler": "unipc", "order": 3, "timesteps": [30, 11, 2], "frames": {"every": 1}}
    job = client.post("/generate", json=asked, headers={"accept": "application/json"}).raise_for_status().json()
    png = client.get(job["images"][0]["url"]).content

    stands = {name: value for name, value in asked.items() if name != "frames"} | {"steps": 3}
    assert {name: job["request"][name] for name in stands} == stands
    assert (job["request"]["spacing"], job["request"]["plan"]) == (None, None)
    assert job["progress"]["steps"] == 3
    texts = read_texts(png)
    assert (texts["timesteps"], texts["order"], texts["steps"]) == ("[30, 11, 2]", "3", "3")
    assert "spacing" not in texts and "plan" not in texts


def test_all_fields_out_of_bounds_are_named_at_once(client: TestClient) -> None:
    answer = client.post("/generate", json={"steps": 31, "eta": 2, "n": 9, "frames": {"count": 1}, "foo": 1}).json()

    assert {error["pointer"] for error in answer["errors"]} == {"/steps", "/eta", "/n", "/frames/count", "/foo"}


@pytest.mark.parametrize(
    ("limit", "got"), [("201", ", got 201"), ("0", ", got 0"), ("-1", ", got -1"), ("1e9", ""), ("", "")]
)
def test_a_number_in_a_url_is_refused_like_one_in_a_body(client: TestClient, limit: str, got: str) -> None:
    answer = client.get("/jobs", params={"limit": limit})

    assert (answer.status_code, answer.json()["errors"]) == (
        422,
        [{"pointer": "/limit", "message": f"limit must be an integer in 1..200{got}"}],
    )


@pytest.mark.parametrize("field", sorted(GenerateRequest.model_fields.keys() - {"frames"}))
def test_null_means_not_set(client: TestClient, field: str) -> None:
    request = {"seed": 1, "steps": 2} | {field: None}
    spelled, left_out = (
        client.post("/generate", json=body, headers={"accept": "application/json"}).json()["request"]
        for body in (request, {name: value for name, value in request.items() if value is not None})
    )

    assert spelled | {"seed": 0} == left_out | {"seed": 0}  # which is drawn if it is not given


def test_null_means_no_frames_and_inside_frames_it_means_not_set(client: TestClient) -> None:
    def frames(given: object) -> Any:
        return client.post("/generate", json={"frames": given}, headers={"prefer": "respond-async"}).json()

    assert frames(None)["request"]["frames"] is None
    assert frames({"count": 3, "every": None, "kind": None})["request"]["frames"] == {"count": 3, "kind": "x_t"}


@pytest.mark.parametrize(
    ("n", "limits", "frames"),
    [
        (64, {}, {"count": 30, "kind": "x_t"}),
        (137, {}, {"count": 29, "kind": "x_t"}),  # 4,096 frames in all
        (200, {}, {"count": 20, "kind": "x_t"}),
        (200, {"max_frames": 399}, None),
        (200, {"max_live_bytes": 2 << 20}, {"count": 3, "kind": "x_t"}),
        (200, {"max_live_bytes": 1 << 20}, None),
    ],
)
def test_frames_that_nobody_asked_for_are_as_many_as_fit(
    weights: Path, tmp_path: Path, n: int, limits: dict[str, int], frames: object
) -> None:
    settings = Settings(weights=str(weights), data_dir=tmp_path, max_n=256, **limits)
    with TestClient(create_app(settings, FakeBackend())) as client:
        animated = client.post("/generate", json={"n": n}, headers={"accept": "image/gif"})
        later = client.post("/generate", json={"n": n}, headers={"prefer": "respond-async"}).json()
        asked = client.post("/generate", json={"n": n, "frames": {"count": 31}}, headers={"prefer": "respond-async"})

    assert later["request"]["frames"] == frames
    assert animated.status_code == (200 if frames else 422)
    if frames is None:
        most = f"{settings.max_frames} frames and {settings.max_live_bytes} bytes"
        message = f"n: an animation of so many pictures exceeds {most}, got {n}"
        assert animated.json()["errors"] == [{"pointer": "/n", "message": message}]
    assert asked.status_code == (202 if n == 64 else 422)


MALFORMED = [
    b"{",
    b"[1",
    b"nul",
    b'{"seed": NaN}',
    b'{"seed": Infinity}',
    b'{"seed": 1, "seed": 2}',
    b"\xff\xfe",
    b"[" * 100 + b"]" * 100,
    b'{"seed": ' + b"9" * 400 + b"e999999}",
]


@pytest.mark.parametrize("body", MALFORMED)
def test_a_body_that_is_not_strict_json_is_malformed(client: TestClient, body: bytes) -> None:
    answer = client.post("/generate", content=body, headers={"content-type": "application/json"})

    assert answer.status_code in (400, 422)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_brackets_may_nest_as_deep_as_the_limit_and_no_deeper(client: TestClient) -> None:
    def code(depth: int) -> str:
        body = b'{"seed": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
        return str(client.post("/generate", content=body).json()["code"])

    assert [code(MAX_DEPTH), code(MAX_DEPTH + 1)] == ["invalid-request", "malformed"]


def test_input_is_never_echoed(client: TestClient) -> None:
    secret = "gx7-unlikely"
    for body in (
        {secret: 1},
        {"frames": secret},
        {"sampler": secret},
        {"model": secret},
        {"variance": secret},
        {"seed": secret},
    ):
        assert secret not in client.post("/generate", json=body).text
    assert secret not in client.get(f"/models/{secret}").text
    assert secret not in client.get(f"/jobs/{secret}").text


def test_an_unpaired_surrogate_is_malformed_in_values_and_names(client: TestClient) -> None:
    for body in (rb'{"sampler": "\ud800"}', rb'{"\ud800": 1}', rb'{"frames": {"\udfff": 1}}'):
        answer = client.post("/generate", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed")
    paired = client.post("/generate", content=rb'{"sampler": "\ud83d\ude00"}')
    assert paired.status_code == 422


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "text/plain"}, b"{}", 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b'{"seed": 1}', 415),
        ({"content-type": "application/json"}, b" " * 513, 413),
        ({"accept": "text/html"}, b"", 406),
        ({"accept": "image/png;q=0"}, b"", 406),
    ],
)
def test_unsupported_media_types_and_sizes_are_refused(
    client: TestClient, headers: dict[str, str], body: bytes, status: int
) -> None:
    assert client.post("/generate", content=body, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("names", "chosen", "usual"),
    [
        (["a"], "", "a"),
        (["a", "b"], "", None),
        (["a", "b"], "b", "b"),
        (["a", "digits"], "", "digits"),
        (["a", "digits"], "a", "a"),
    ],
)
def test_models_are_listed_with_the_default_model(
    tmp_path: Path, names: list[str], chosen: str, usual: str | None
) -> None:
    for name in names:
        write_model(tmp_path / "weights" / name)
    settings = Settings(weights=tmp_path / "weights", data_dir=tmp_path / "data", default_model=chosen, max_n=5)
    with TestClient(create_app(settings, FakeBackend())) as client:
        listed = client.get("/models").json()

    assert [model["name"] for model in listed["models"]] == names
    assert (listed["default"], listed["max_n"]) == (usual, 5)


def test_unknown_routes_and_methods_are_problems_too(client: TestClient) -> None:
    missing, wrong = client.get("/nothing"), client.get("/generate")

    assert (missing.status_code, missing.json()["code"]) == (404, "not-found")
    assert (wrong.status_code, wrong.json()["code"], wrong.headers["allow"]) == (405, "method-not-allowed", "POST")


def test_a_forbidden_method_is_answered_with_the_allowed_ones(client: TestClient) -> None:
    assert client.put("/jobs/x").headers["allow"] == "DELETE, GET, HEAD"
    assert client.put("/jobs/x").json()["detail"] == "this path has DELETE, GET, HEAD"
    assert client.get("/static/x").json()["detail"] == client.get("/x").json()["detail"] == "there is no such path"
    assert client.post("/static/app.js").headers["allow"] == "GET, HEAD"
    assert client.head("/generate").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/healthz", "/models", "/jobs", "/openapi.json", "/static/app.js", "/x"]
)
def test_head_is_answered_like_get_without_the_body(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)

    assert (head.status_code, head.content) == (get.status_code, b"")
    assert {**head.headers, "x-request-id": ""} == {**get.headers, "x-request-id": ""}


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (["TAG"], 304),
        (["W/TAG"], 304),
        (['"x", TAG'], 304),
        (['"x"', "TAG"], 304),
        (["*"], 304),
        (['"x"'], 200),
        ([], 200),
    ],
)
def test_a_current_etag_is_answered_with_304(client: TestClient, given: list[str], status: int) -> None:
    job = client.post("/generate").headers["x-job-id"]
    for path in (f"/jobs/{job}/images/0", "/", "/docs"):
        tag = client.get(path).headers["etag"]
        lines = [("if-none-match", line.replace("TAG", tag)) for line in given]
        answer = client.get(path, headers=lines)
        assert (answer.status_code, answer.headers["etag"], bool(answer.content)) == (status, tag, status == 200)


@pytest.mark.parametrize(
    ("lines", "status", "media"),
    [
        ([("accept", "text/html"), ("accept", "application/zip")], 200, "application/zip"),
        ([("prefer", "wait=5"), ("prefer", "respond-async")], 202, "application/json"),
        ([("prefer", "respond-async; wait=5")], 202, "application/json"),
        ([("prefer", "respond-async-not")], 200, "image/png"),
        ([("idempotency-key", "a"), ("idempotency-key", "b")], 400, "application/problem+json"),
    ],
)
def test_all_lines_of_a_header_count(client: TestClient, lines: list[tuple[str, str]], status: int, media: str) -> None:
    answer = client.post("/generate", headers=lines)

    assert (answer.status_code, answer.headers["content-type"]) == (status, media)


def test_a_request_id_is_kept_if_it_is_well_formed(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "my-id_1"}).headers["x-request-id"] == "my-id_1"
    assert client.get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def backend_of(client: TestClient) -> FakeBackend:
    backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
    assert isinstance(backend, FakeBackend)
    return backend


def test_no_job_is_accepted_while_the_engine_is_down(client: TestClient) -> None:
    backend_of(client).trouble = "the engine is loading"

    for answer in (client.post("/generate"), client.get("/readyz")):
        assert (answer.status_code, answer.json()["detail"]) == (503, "the engine is loading")
        assert int(answer.headers["retry-after"]) > 0
    assert client.get("/healthz").status_code == 200


def test_a_full_queue_says_when_to_retry(client: TestClient) -> None:
    client.app.state.jobs.admission.capacity.steps = 190  # type: ignore[attr-defined]

    answer = client.post("/generate", json={"steps": 30, "n": 6})

    # 170 image-steps too many, at ten a second
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (429, "queue-full", "17")
    assert client.post("/generate", json={"steps": 10}).status_code == 200


def test_a_job_that_misses_its_deadline_is_cancelled(client: TestClient) -> None:
    backend = backend_of(client)
    backend.gate.clear()

    answer = client.post("/generate", json={"deadline_s": 0.05})

    assert (answer.status_code, answer.json()["code"]) == (504, "deadline-passed")
    assert backend.given_up == backend.specs
    assert client.app.state.jobs.admission.capacity.steps == 0  # type: ignore[attr-defined]


def test_a_lost_sample_fails_the_job_with_the_reason(client: TestClient) -> None:
    backend_of(client).failure = SampleLost("the picture was not finite after 7 steps")

    answer = client.post("/generate")

    assert (answer.status_code, answer.json()["code"]) == (500, "sample-failed")
    assert "not finite" in answer.json()["detail"]


def test_an_unforeseen_error_reveals_nothing(client: TestClient) -> None:
    backend_of(client).failure = RuntimeError("the secret path")

    answer = client.post("/generate")

    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
