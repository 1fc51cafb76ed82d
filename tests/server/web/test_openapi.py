"""`/openapi.json` says what is answered: real answers of every operation are compared with it, field by field."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ddpm_client import types as client_types
from ddpm_client.wire import unpack
from starlette.testclient import TestClient

from server.engines.backend import Progress, Restarting, SampleEvent
from server.errors import (
    ANSWERS,
    BodyTooLarge,
    HeadTooLarge,
    Malformed,
    SampleLost,
    TargetTooLong,
    TooManyConnections,
    TooSlow,
)
from server.jobs.stream import Stream, Subscriber, TextMessage
from server.settings import Settings
from server.web.app import create_app
from server.web.http import HEADERS, PARAMETERS
from server.web.openapi import JOB_EVENTS, TAGS
from server.worker.messages import Spec
from tests.server.fakes import FakeBackend
from tests.server.web.described import Description
from tests.waiting import until

STREAMED = {"seed": 5, "steps": 4, "n": 2, "frames": {"count": 3, "kind": "both"}}
NOBODY = "http://127.0.0.1:9/"  # a receiver that is not there


class Halting(FakeBackend):
    """Jobs of seed 1 and 3 make a step and wait to be cancelled, the former after a restart; those of seed 2 fail."""

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """All pictures of `spec`."""
        async with aclosing(super().run(spec)) as events:
            async for event in events:
                yield event
                if spec.seeds[0] in (1, 3):
                    yield Progress({0: 1})
                    if spec.seeds[0] == 1:
                        yield Restarting(1.0)
                    await asyncio.Event().wait()
                if spec.seeds[0] == 2:
                    raise SampleLost("the picture was not finite after 3 steps")


@pytest.fixture(scope="module")
def site(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The application over a backend without an engine."""
    settings = Settings(
        weights=weights,
        data_dir=tmp_path_factory.mktemp("data"),
        max_queued_steps=500,
        webhook_secret="s" * 24,
        webhook_hosts="127.0.0.1",
    )
    with TestClient(create_app(settings, Halting()), raise_server_exceptions=False) as made:
        yield made


@pytest.fixture(scope="module")
def description(site: TestClient) -> Description:
    """What it says of itself."""
    return Description(site.get("/openapi.json").json())


def events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events: the name and the data of each."""
    return [
        (name, json.loads(data)) for name, data in re.findall(r"^event: (.*)\n(?:id: .*\n)?data: (.*)$", text, re.M)
    ]


def ask(site: TestClient, description: Description, operation: str, path: str = "", **request: Any) -> Any:
    """Sends a request, and compares the answer with the operation's description. -> the answer"""
    method, template = operation.split()
    answer = site.request(method, path or template, **request)
    is_json = answer.headers.get("content-type", "").partition(";")[0].endswith("json")
    body = answer.json() if is_json and answer.content else None
    description.check(method.lower(), template, answer.status_code, answer.headers, body)
    return answer


def test_every_answer_of_every_operation_is_as_described(site: TestClient, description: Description) -> None:
    def asked(operation: str, path: str = "", **request: Any) -> Any:
        return ask(site, description, operation, path, **request)

    ways = description.document["paths"]["/generate"]["post"]["responses"]["200"]["content"]
    for media in ways:
        asked("POST /generate", headers={"accept": media}, json={"steps": 2})
    later = asked("POST /generate", headers={"prefer": "respond-async"}, json={"seed": 1, "steps": 2})
    running = later.headers["location"]
    asked("POST /generate", json={"sampler": "ddim", "eta": 0.5, "steps": 2, "n": 2, "seed": 0, "priority": 1})
    asked("POST /generate", json={"sampler": "ddim", "eta": 0.5, "steps": 2, "n": 2, "seed": 0, "priority": 1})
    assert site.get(running).json()["status"] in ("queued", "running")
    asked("GET /jobs/{id}", running)
    asked("DELETE /jobs/{id}", running)
    assert asked("GET /jobs/{id}", running).json()["status"] == "cancelled"
    failed = site.post("/generate", headers={"prefer": "respond-async"}, json={"seed": 2, "steps": 2})
    assert asked("POST /generate", json={"seed": 2, "steps": 2}).status_code == 500
    assert asked("GET /jobs/{id}", failed.headers["location"]).json()["error"]["code"] == "sample-failed"
    done = site.post("/generate", json={"steps": 2, "frames": {"count": 2}}).headers["x-job-id"]
    image = asked("GET /jobs/{id}/images/{index}", f"/jobs/{done}/images/0")
    asked("GET /jobs/{id}/images/{index}", f"/jobs/{done}/images/0", headers={"if-none-match": image.headers["etag"]})
    events = asked("GET /jobs/{id}/events", f"/jobs/{done}/events", headers={"last-event-id": "0"}).text
    last = re.findall(r"^id: (\d+)$", events, re.MULTILINE)[-1]
    asked("GET /jobs/{id}/events", f"/jobs/{done}/events", headers={"last-event-id": last})
    for media in ("image/gif", "image/apng", "image/webp"):
        asked("GET /jobs/{id}/trajectory", f"/jobs/{done}/trajectory", headers={"accept": media})
    for path in ("/jobs", "/models", "/healthz", "/readyz", "/status", "/metrics", "/v1/models", "/webhooks/secret"):
        asked(f"GET {path}")
    told = asked("POST /generate", headers={"prefer": "respond-async"}, json={"seed": 4, "webhook": NOBODY})
    assert asked("GET /jobs/{id}", told.headers["location"]).json()["webhook"]["state"] == "pending"
    for path in ("/models/{name}", "/v1/models/{name}"):
        asked(f"GET {path}", path.format(name="tiny"))
    for body in ({"stream": True, "partial_images": 1}, {"response_format": "url"}, {"output_format": "webp", "n": 2}):
        asked("POST /v1/images/generations", json={"steps": 2, **body})

    for path, status in {"/jobs?limit=0": 422, "/jobs?after=x": 404}.items():
        assert asked("GET /jobs", path).status_code == status
    for operation in ("GET /jobs/{id}", "DELETE /jobs/{id}", "GET /jobs/{id}/trajectory", "GET /jobs/{id}/events"):
        assert asked(operation, operation.split()[1].format(id="x")).status_code == 404
    assert asked("GET /jobs/{id}/images/{index}", f"/jobs/{done}/images/9").status_code == 404
    for path in ("/models/{name}", "/v1/models/{name}"):
        assert asked(f"GET {path}", path.format(name="x")).status_code == 404
    for path in ("/generate/stream", "/jobs/{id}/stream"):
        assert asked(f"GET {path}", path.format(id=done)).status_code == 404
    for status, request in REFUSED.items():
        assert asked("POST /generate", **request).status_code == status
    for status, request in REFUSED.items():
        if status not in (406, 422):
            assert asked("POST /v1/images/generations", **request).status_code == status
    asked("POST /v1/images/generations", json={"size": "1x1"})
    for operation in ("POST /generate", "POST /v1/images/generations"):
        assert asked(operation, json={"model": "x"}).status_code == 404
    jobs = site.app.state.jobs  # type: ignore[attr-defined]
    jobs.admission.capacity.steps += 495
    for operation in ("POST /generate", "POST /v1/images/generations"):
        assert asked(operation, json={"steps": 30}).status_code == 429
    jobs.admission.capacity.steps -= 495
    jobs.backend.trouble = "the engine is loading"
    for operation in ("POST /generate", "POST /v1/images/generations", "GET /readyz"):
        assert asked(operation).status_code == 503
    jobs.backend.trouble = None

    promised = {
        (method, path, int(status), media)
        for path, method, operation in description.operations()
        for status, answer in operation["responses"].items()
        if 200 <= int(status) < 400
        for media in answer.get("content", {"": None})
    }
    assert promised - description.seen == set()


REFUSED: dict[int, dict[str, Any]] = {
    400: {"content": b"{"},
    406: {"headers": {"accept": "text/html"}},
    413: {"content": b"[" + b" " * 2**20},
    415: {"content": b"{}", "headers": {"content-type": "text/plain"}},
    417: {"headers": {"expect": "a miracle"}},
    422: {"json": {"steps": 31}},
}


def is_running(site: TestClient, job: str) -> bool:
    """Whether a job has started and not ended."""
    return bool(site.get(job).json()["status"] == "running")


def test_every_message_of_every_stream_is_as_described(site: TestClient, description: Description) -> None:
    heard = dict[str, str]()  # kind of message -> the schema that it was compared with

    def compare(kind: str, name: str, value: Any) -> None:
        heard[kind] = name
        assert description.wrong({"$ref": f"#/components/schemas/{name}"}, value) == []

    streams: dict[str, dict[str, Any]] = {
        "/generate": {},
        "/v1/images/generations": {"stream": True, "partial_images": 2},
    }
    for path, body in streams.items():
        said = description.document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        datas = {
            event: kind["properties"]["data"]["contentSchema"]["$ref"].rpartition("/")[2]
            for kind in said["schema"]["oneOf"]
            for event in kind["properties"]["event"]["enum"]
        }
        for seed in (5, 2):
            answer = site.post(path, json={"seed": seed, "steps": 4} | body, headers={"accept": "text/event-stream"})
            for event, data in events(answer.text):
                compare(event, datas[event], data)
    for seed, awaited in {1: "restarting", 3: "progress"}.items():
        job = site.post("/generate", json={"seed": seed}, headers={"prefer": "respond-async"}).headers["location"]
        until(partial(is_running, site, job))
        with site.websocket_connect(f"{job}/stream") as socket:
            for wanted, said in {awaited: "ping", "pong": "cancel", "cancelled": ""}.items():
                heard.pop(wanted, None)
                while wanted not in heard:
                    message = socket.receive_json()
                    compare(message["type"], "StreamMessage", message)
                if said:
                    socket.send_json({"type": said})
    with site.websocket_connect("/generate/stream") as socket:
        socket.send_json(STREAMED)
        while (message := socket.receive())["type"] != "websocket.close":
            if "bytes" in message:
                compare("binary", "PictureHeader", unpack(message["bytes"])[0])
    with site.websocket_connect("/generate/stream") as socket:
        socket.send_json({"seed": -1})
        compare("refused", "StreamMessage", socket.receive_json())
    for message in asyncio.run(gaps()):
        compare(message["type"], "StreamMessage", message)

    openai = {"image_generation.partial_image", "image_generation.completed"}
    assert heard.keys() - {"binary", "refused"} == JOB_EVENTS.keys() | openai | {"pong"}


async def gaps() -> list[Any]:
    """The messages that stand in for others."""
    stream = Stream("j")
    subscriber = Subscriber(stream)
    stream.skip_to(3)
    heard = list[Any]()
    async with aclosing(subscriber.messages()) as messages:
        async for message in messages:
            assert isinstance(message, TextMessage)
            heard.append(message.body)
            if message.body["type"] == "dropped":
                break
            for _ in range(3):
                stream.keep_picture({}, True, lambda: b"png")
            subscriber.fell_behind()
    return heard


def test_what_any_request_may_be_refused_for_is_said_of_every_operation(description: Description) -> None:
    of_the_protocol = (Malformed, TooSlow, BodyTooLarge, TargetTooLong, HeadTooLarge, TooManyConnections)
    statuses = {str(ANSWERS[kind][0]) for kind in of_the_protocol}
    said = {path: operation["responses"].keys() for path, _, operation in description.operations()}

    assert [path for path in said if statuses - said[path]] == []
    assert said["/generate"] - said["/v1/images/generations"] == {"202", "406", "422"}


def test_every_example_is_accepted(site: TestClient, description: Description) -> None:
    sent = 0
    values = {"name": "tiny", "index": 0}
    values["id"] = site.post("/generate", json={"steps": 2, "frames": {"count": 2}}).headers["x-job-id"]
    for path, method, operation in description.operations():
        bodies = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("examples", {})
        headers, query = dict[str, str](), dict[str, Any]()
        for parameter in map(description.follow, operation["parameters"]):
            examples = parameter["schema"].get("examples", [])
            example = parameter.get("example", *examples[:1] or [None])
            if parameter["in"] == "path":
                assert example is None or parameter["name"] in values
            elif example is not None:
                {"header": headers, "query": query}[parameter["in"]][parameter["name"]] = str(example)
        for body in [each["value"] for each in bodies.values()] or [None]:
            for given in [{}, headers]:
                answer = site.request(method, path.format(**values), json=body, headers=given, params=query)
                assert answer.status_code in ((404,) if "101" in operation["responses"] else (200, 202)), answer.text
                headers.pop("Idempotency-Key", None)
                sent += 1
    assert sent > 30


def test_operations_have_names_tags_and_headers_that_are_all_used(description: Description) -> None:
    operations = [operation for _, _, operation in description.operations()]
    names = [operation["operationId"] for operation in operations]

    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"[a-z]+(_[a-z]+)*", name)] == []
    assert {tag for operation in operations for tag in operation["tags"]} == TAGS.keys()
    assert [tag["name"] for tag in description.document["tags"]] == list(TAGS)
    answers = [description.follow(answer) for each in operations for answer in each["responses"].values()]
    assert {name for answer in answers for name in answer["headers"]} == HEADERS.keys()
    read = [description.follow(each)["name"] for operation in operations for each in operation["parameters"]]
    assert PARAMETERS.keys() - {*read} == set()


def test_no_reference_leads_nowhere_and_every_schema_is_used(description: Description) -> None:
    text = json.dumps(description.document)
    used = set(re.findall(r'"(#/components/[^"]+)"', text))

    there = {f"#/components/{kind}/{name}" for kind, all in description.document["components"].items() for name in all}
    assert used - there == set()
    assert {name for name in there - used if "/schemas/" in name} == set()


def test_websockets_are_described(description: Description) -> None:
    said = {
        path: operation["x-websocket"] for path, _, operation in description.operations() if "x-websocket" in operation
    }

    assert {path: each.get("sends_first", {}).get("$ref") for path, each in said.items()} == {
        "/jobs/{id}/stream": None,
        "/generate/stream": "#/components/schemas/GenerateRequest",
    }
    assert [each["receives"]["$ref"] for each in said.values()] == ["#/components/schemas/StreamMessage"] * 2


@pytest.mark.parametrize(("keys", "metrics_key"), [(True, ""), (True, "secret"), (False, "secret"), (False, "")])
def test_the_keys_that_an_operation_needs_are_described(
    weights: Path, tmp_path: Path, keys: bool, metrics_key: str
) -> None:
    (tmp_path / "keys").write_text(f"a:{'0' * 64}\n")
    settings = Settings(
        weights=weights,
        data_dir=tmp_path / "d",
        api_keys=str(tmp_path / "keys") if keys else "",
        metrics_key=metrics_key,
    )
    document = create_app(settings, FakeBackend()).openapi()

    usual: list[Any] = [{"key": []}] if keys else []
    assert document["security"] == usual
    needed = {path: document["paths"][path]["get"].get("security", usual) for path in ("/healthz", "/jobs", "/metrics")}
    assert needed == {"/healthz": [], "/jobs": usual, "/metrics": [{"metrics_key": []}] if metrics_key else usual}


def test_the_clients_types_have_every_field_of_requests_and_messages(description: Description) -> None:
    schemas = description.document["components"]["schemas"]

    assert client_types.Request.__annotations__.keys() == schemas["GenerateRequest"]["properties"].keys()
    assert client_types.Frames.__annotations__.keys() == schemas["Frames"]["properties"].keys()
    renamed = {"from": "first", "to": "last", "type": "status"}
    for kind, name in JOB_EVENTS.items():
        if kind == "error":
            continue  # the client raises it
        found = client_types.KINDS.get(kind, client_types.Frame)
        held = set(found.__dataclass_fields__)
        fields = {renamed.get(each, each) for each in schemas[name]["properties"]}
        assert fields - held <= {"status", "kind", "image_type", "b64_png"}, kind
