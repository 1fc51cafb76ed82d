"""Webhooks: the job's document is posted once the job has ended, signed, until the receiver has taken it."""

import asyncio
import base64
import errno
import hashlib
import hmac
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from starlette.testclient import TestClient

from server import troubles
from server.jobs import deliveries
from server.jobs.deliveries import MOST, MOST_OF_A_KEY, PAUSES_S, after_attempt
from server.settings import Settings
from server.store import retention, rows
from server.store.records import Delivery
from server.store.salvage import salvage
from server.web.app import create_app
from server.web.auth import make_key
from server.webhooks import post
from server.webhooks.post import Poster
from server.webhooks.target import Target
from tests.server.fakes import FakeBackend
from tests.server.jobs.records import without_room
from tests.server.jobs.test_durability import backend_of, call, ended, jobs_of, later
from tests.server.webhooks import one_job
from tests.server.webhooks.one_job import SECRET
from tests.server.webhooks.receiver import Received, a_receiver, nothing, status
from tests.waiting import until

ROOT = Path(__file__).parents[3]
PENDING = {"state": "pending", "attempts": 0, "last_status": None, "last_error": None, "delivered_at": None}
Sending = Callable[..., AbstractContextManager[TestClient]]


@pytest.fixture
def sending(weights: Path, tmp_path: Path) -> Sending:
    """Starts a server that sends webhooks to this machine, on the same store as the one before."""

    @contextmanager
    def started(**other: Any) -> Iterator[TestClient]:
        usual = {"webhook_secret": SECRET, "webhook_hosts": "localhost", "data_dir": tmp_path / "data"}
        settings = Settings(weights=weights, **usual | other)
        with TestClient(create_app(settings, FakeBackend()), raise_server_exceptions=False) as client:
            yield client

    return started


@pytest.fixture
def hurried() -> Iterator[None]:
    """Attempts follow each other at once."""
    with mock.patch.object(deliveries, "PAUSES_S", (0.0,) * len(PAUSES_S)):
        yield


def is_signed(received: Received, secret: str) -> bool:
    """Whether the signature is right, computed as Standard Webhooks 1.0.0 describes it."""
    headers = received.headers
    key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + received.body
    digest = hmac.new(key, content, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}" == headers["webhook-signature"]


def told(client: TestClient, id: str, state: str, attempts: int) -> dict[str, Any]:
    """What the job says of its webhook, once that is in this state after so many attempts."""

    def found() -> dict[str, Any] | None:
        webhook: dict[str, Any] = client.get(f"/jobs/{id}").json()["webhook"]
        return webhook if (webhook["state"], webhook["attempts"]) == (state, attempts) else None

    return until(found)


def test_the_receiver_gets_the_document_and_can_verify_it(sending: Sending) -> None:
    began = time.time()
    with a_receiver() as receiver, sending() as client:
        url = f"{receiver.url}/hook/a%20b?token=1&x=a/../b"
        job = later(client, seed=3, steps=4, n=2, webhook=url)
        received = receiver.next()
        secret = client.get("/webhooks/secret").json()["secret"]
        webhook = told(client, job["id"], "delivered", 1)
        after = client.get(f"/jobs/{job['id']}").json()

    assert job["webhook"] == PENDING
    assert received.document == after | {"webhook": PENDING}
    assert (received.document["status"], received.document["request"]["webhook"]) == ("succeeded", url)
    assert (received.method, received.target) == ("POST", "/hook/a%20b?token=1&x=a/../b")
    assert received.headers["host"] == receiver.url.removeprefix("http://")
    assert received.headers["content-type"] == "application/json"
    assert received.headers["webhook-id"] == job["id"]
    assert is_signed(received, secret)
    assert int(began) <= int(received.headers["webhook-timestamp"]) <= webhook.pop("delivered_at") <= time.time()
    assert webhook == {"state": "delivered", "attempts": 1, "last_status": 204, "last_error": None}


def listens(port: int) -> bool:
    """Whether somebody listens on this port of this machine."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def test_the_receiver_in_the_documentation_verifies_it(sending: Sending) -> None:
    (source,) = re.findall(r"```python\n(.*?verify.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    with sending(webhook_hosts="127.0.0.1") as client, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        environ = os.environ | {"WEBHOOK_SECRET": client.get("/webhooks/secret").json()["secret"]}
        code = [sys.executable, "-c", source.replace("9000", str(port))]
        with subprocess.Popen(
            code, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as example:
            until(lambda: listens(port))
            job = later(client, webhook=f"http://127.0.0.1:{port}/")
            webhook = told(client, job["id"], "delivered", 1)
            example.kill()
            said = example.stdout and example.stdout.read()

    assert webhook["last_status"] == 204
    assert said == f"{job['id']} succeeded ['/jobs/{job['id']}/images/0']\n"


def test_every_kind_of_job_and_of_end_has_its_webhook(sending: Sending) -> None:
    with a_receiver() as receiver, sending() as client:
        url = receiver.url
        client.post("/generate", json={"seed": 1, "webhook": url})
        client.post("/generate", json={"seed": 1, "webhook": url})  # answered from the cache
        for _ in range(2):  # the same job, with one webhook
            client.post("/generate", json={"seed": 2, "webhook": url}, headers={"idempotency-key": "k"})
        client.post("/v1/images/generations", json={"prompt": "", "seed": 3, "webhook": url})
        with client.websocket_connect("/generate/stream") as socket:
            socket.send_json({"seed": 4, "webhook": url, "frames": None})
            while '"succeeded"' not in (socket.receive().get("text") or ""):
                pass
        backend_of(client).gate.clear()
        cancelled = later(client, seed=5, webhook=url)
        client.delete(f"/jobs/{cancelled['id']}")
        late = later(client, seed=6, webhook=url, deadline_s=0.01)
        ended(client, late["id"])
        came = {received.headers["webhook-id"]: received.document for received in (receiver.next() for _ in range(7))}
        jobs = client.get("/jobs").json()["jobs"]

        assert receiver.came.empty()
    assert {job["id"]: job["status"] for job in jobs} == {id: document["status"] for id, document in came.items()}
    assert sorted((d["status"], d["request"]["seed"]) for d in came.values()) == [
        *[("cancelled", 5), ("failed", 6)],
        *[("succeeded", seed) for seed in (1, 1, 2, 3, 4)],
    ]
    assert came[late["id"]]["error"]["code"] == "deadline-passed"


def test_a_failed_attempt_is_repeated_with_the_same_id_and_body(sending: Sending, hurried: None) -> None:
    answers = [status(500), nothing, status(302, Location="/elsewhere"), status(404), status(200)]
    with a_receiver(*answers) as receiver, sending() as client:
        job = later(client, webhook=f"{receiver.url}/hook")
        came = [receiver.next() for _ in range(5)]
        webhook = told(client, job["id"], "delivered", 5)
        metrics = client.get("/metrics").text

    assert {(each.method, each.target, each.headers["webhook-id"]) for each in came} == {("POST", "/hook", job["id"])}
    assert len({each.body for each in came}) == 1
    assert webhook["last_status"] == 200
    assert 'ddpm_webhooks_total{outcome="delivered"} 1.0' in metrics
    assert 'ddpm_webhooks_total{outcome="retried"} 4.0' in metrics


def test_410_and_the_last_failure_end_it(sending: Sending, hurried: None) -> None:
    with a_receiver(status(410)) as gone, a_receiver(status(503)) as down, sending() as client:
        first, second = later(client, webhook=gone.url), later(client, webhook=down.url)
        told(client, first["id"], "gone", 1)
        webhook = told(client, second["id"], "failed", 8)
        assert (gone.came.qsize(), down.came.qsize()) == (1, 8)

    assert webhook["last_status"] == 503


def test_the_pauses_grow_to_a_day_with_jitter() -> None:
    before, pauses = Delivery(host="a.example"), []
    while before.due is not None:
        after = after_attempt(before, 500, None, now=1000.0)
        pauses.append(after.due - 1000.0 if after.due is not None else None)
        before = after

    assert [pause and 1 <= pause / least <= 1.2 for pause, least in zip(pauses, (*PAUSES_S, 1), strict=True)] == [
        *[True] * 7,
        None,
    ]
    assert (before.state, before.attempts) == ("failed", 8)


def test_a_webhook_that_a_dead_server_owes_is_sent_by_the_next(sending: Sending) -> None:
    with a_receiver() as receiver:
        with sending(webhook_secret=SECRET) as client, mock.patch.object(deliveries.Deliveries, "wake"):
            job = later(client, seed=7, webhook=receiver.url)
            before = ended(client, job["id"])
        with sending(webhook_secret="") as client:  # one that sends none leaves it
            assert client.get(f"/jobs/{job['id']}").json() == before
        assert receiver.came.empty()
        with sending() as client:
            received = receiver.next()
            told(client, job["id"], "delivered", 1)
        with sending() as client:
            assert client.get(f"/jobs/{job['id']}").json()["webhook"]["state"] == "delivered"

    assert received.document == before
    assert receiver.came.empty()


def test_a_job_that_salvage_lets_run_again_is_not_posted_again(sending: Sending, tmp_path: Path) -> None:
    with a_receiver() as receiver:
        with sending() as client:
            first = later(client, seed=1, webhook=receiver.url)
            receiver.next()
            webhook = told(client, first["id"], "delivered", 1)
        next((tmp_path / "data" / "pictures").iterdir()).unlink()
        salvage(tmp_path / "data", tmp_path / "out")
        with sending(data_dir=tmp_path / "out") as client:
            again = ended(client, first["id"])
            later(client, seed=2, webhook=receiver.url)
            after = receiver.next()
            assert client.get(again["images"][0]["url"]).status_code == 200

    assert (again["status"], again["webhook"]) == ("succeeded", webhook)
    assert after.document["id"] != first["id"]


def test_each_host_and_each_key_has_so_many_at_once_and_first_attempts_go_first(sending: Sending) -> None:
    asked: list[str] = []
    released = asyncio.Event()

    async def post(poster: object, target: Target, headers: dict[str, str], body: bytes) -> int:
        asked.append(target.host)
        if target.host.startswith("slow"):
            await released.wait()
        return 500 if target.host == "down" else 204

    hosts = [f"slow{i}" for i in range(9)] + ["down", "swift"]
    with mock.patch.object(Poster, "post", post), sending(webhook_hosts=",".join(hosts)) as client:
        jobs = {
            host: [later(client, webhook=f"http://{host}/") for _ in range(3)] for host in ("slow0", "down", "swift")
        }
        for job in jobs["swift"]:
            told(client, job["id"], "delivered", 1)
        for job in jobs["down"]:
            told(client, job["id"], "pending", 1)
        first = list(asked)
        for host in hosts[1:8]:
            later(client, webhook=f"http://{host}/"), later(client, webhook=f"http://{host}/")
        until(lambda: len(jobs_of(client)._deliveries._sending) == MOST)
        last = later(client, webhook="http://swift/")
        ended(client, last["id"])
        waiting = client.get(f"/jobs/{last['id']}").json()["webhook"]
        call(client, released.set)
        told(client, last["id"], "delivered", 1)

    assert Counter(first) == {"slow0": 2, "down": 3, "swift": 3}
    assert waiting == PENDING


def test_the_receivers_of_one_key_leave_room_for_those_of_another(sending: Sending, tmp_path: Path) -> None:
    released = asyncio.Event()

    async def post(poster: object, target: Target, headers: dict[str, str], body: bytes) -> int:
        if target.host != "swift":
            await released.wait()
        return 204

    hosts = [f"slow{i}" for i in range(10)]
    lines, keys = zip(*((line, key) for key, line in map(make_key, ("alice", "bob"))), strict=True)
    (tmp_path / "keys").write_text("\n".join(lines))
    alice, bob = ({"authorization": f"Bearer {key}"} for key in keys)
    settings = {"webhook_hosts": ",".join([*hosts, "swift"]), "api_keys": str(tmp_path / "keys")}
    with mock.patch.object(Poster, "post", post), sending(**settings) as client:
        for host in hosts * 2:
            client.post("/generate", json={"webhook": f"http://{host}/"}, headers=alice)
        id = client.post("/generate", json={"webhook": "http://swift/"}, headers=bob).headers["x-job-id"]
        until(lambda: client.get(f"/jobs/{id}", headers=bob).json()["webhook"]["state"] == "delivered")
        under_way = len(jobs_of(client)._deliveries._sending)
        call(client, released.set)

    assert under_way == MOST_OF_A_KEY


def test_a_slow_receiver_is_left_alone_after_a_while_and_a_long_answer_is_not_read(sending: Sending) -> None:
    read, over = threading.Event(), threading.Event()

    def long(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while True:
                handler.wfile.write(b"x" * 65536)
        read.set()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        with suppress(OSError):
            for letter in b"HTTP/1.1 200 OK\r\n" + b"x" * 1000:
                handler.wfile.write(bytes([letter]))
                if letter == ord("x"):
                    over.wait(0.1)

    with a_receiver(long) as endless, a_receiver(slow) as dripping, mock.patch.object(post, "TOTAL_S", 0.5):
        with sending() as client:
            first, second = later(client, webhook=endless.url), later(client, webhook=dripping.url)
            delivered, tired = told(client, first["id"], "delivered", 1), told(client, second["id"], "pending", 1)
            assert read.wait(30)

    assert delivered["last_status"] == 200
    assert (tired["last_status"], tired["last_error"]) == (None, "no answer within 0.5 s")


def test_a_webhook_on_its_way_when_the_server_is_killed_is_sent_again(
    sending: Sending, weights: Path, tmp_path: Path
) -> None:
    over = threading.Event()
    with a_receiver(lambda handler: (over.wait(30), None)[1], status(204)) as receiver:
        command = [sys.executable, "-m", one_job.__name__, str(weights), str(tmp_path / "data"), receiver.url]
        server = subprocess.Popen(command)
        first = receiver.next()
        server.kill()
        server.wait()
        over.set()
        with sending() as client:
            again = receiver.next()
            told(client, first.document["id"], "delivered", 1)

    assert (again.body, again.headers["webhook-id"]) == (first.body, first.document["id"])


def test_what_is_on_its_way_does_not_delay_the_end(sending: Sending) -> None:
    ended_first = threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        ended_first.wait(60)

    with a_receiver(hang, status(204)) as receiver, mock.patch.object(post, "TOTAL_S", 600):
        with sending() as client:
            job = later(client, webhook=receiver.url)
            first = receiver.next()
        ended_first.set()  # were the end to wait for the answer, it would wait until nobody hangs any more
        with sending() as client:
            again = receiver.next()
            told(client, job["id"], "delivered", 1)

    assert (again.body, again.headers["webhook-id"]) == (first.body, first.headers["webhook-id"])


def test_a_job_whose_webhook_is_pending_is_kept_while_there_is_room(sending: Sending) -> None:
    with a_receiver(status(500)) as receiver, sending(retention_days=0) as client:
        plain, owed = later(client, seed=1), later(client, seed=2, webhook=receiver.url)
        ended(client, plain["id"])
        told(client, owed["id"], "pending", 1)
        call(client, jobs_of(client).repository.sweep)
        kept = [client.get(f"/jobs/{job['id']}").status_code for job in (plain, owed)]
        with mock.patch.object(retention, "size_bytes", lambda db: 1 << 60):
            call(client, jobs_of(client).repository.sweep)

        assert kept == [410, 200]
        assert client.get(f"/jobs/{owed['id']}").status_code == 410


def test_a_job_that_is_deleted_during_an_attempt_is_not_delivered_again(sending: Sending, hurried: None) -> None:
    deleted = threading.Event()
    with a_receiver(lambda handler: (deleted.wait(30), status(500)(handler))[1]) as receiver, sending() as client:
        job, other = later(client, webhook=receiver.url), later(client, seed=1)
        ended(client, other["id"])
        receiver.next()
        with mock.patch.object(retention, "size_bytes", lambda db: 1 << 60):
            call(client, jobs_of(client).repository.sweep)
        deleted.set()
        until(lambda: not jobs_of(client)._deliveries._sending)

        assert client.get(f"/jobs/{job['id']}").status_code == 410
        assert receiver.came.empty()


@pytest.mark.parametrize(
    "short", [RuntimeError("can't start new thread"), OSError(errno.EMFILE, "Too many open files")]
)
def test_a_passing_lack_is_no_attempt(sending: Sending, monkeypatch: pytest.MonkeyPatch, short: Exception) -> None:
    monkeypatch.setattr(troubles, "RETRY_S", 0.02)
    usual, attempts = asyncio.open_connection, list[int]()

    async def connect(*arguments: Any, **options: Any) -> Any:
        attempts.append(len(attempts))
        if len(attempts) <= 3:
            raise short
        return await usual(*arguments, **options)

    monkeypatch.setattr(asyncio, "open_connection", connect)
    with a_receiver() as receiver, sending() as client:
        job = later(client, webhook=receiver.url)
        webhook = told(client, job["id"], "delivered", 1)

    assert (len(attempts) > 3, webhook["last_error"]) == (True, None)


def test_a_passing_lack_of_the_journal_does_not_end_deliveries(
    sending: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "FULL_S", 0.02)
    with a_receiver() as receiver, sending() as client:
        with mock.patch.object(rows, "next_delivery", side_effect=MemoryError) as lacking:
            job = later(client, webhook=receiver.url)
            until(lambda: lacking.called)
        told(client, job["id"], "delivered", 1)


def test_while_the_disk_is_full_a_delivery_that_cannot_be_noted_is_not_repeated(sending: Sending) -> None:
    full: list[Callable[[], None]] = []

    async def post(poster: object, *args: object) -> int:
        full.append(without_room(jobs_of(client).repository.store))
        return 204

    with sending() as client, mock.patch.object(Poster, "post", post):
        job = later(client, webhook="http://localhost/")
        until(lambda: full)
        before = client.get(f"/jobs/{job['id']}").json()["webhook"]
        full[0]()
        told(client, job["id"], "delivered", 1)

    assert before == PENDING
    assert len(full) == 1


def test_the_log_has_one_line_per_attempt_and_nothing_of_the_url_but_its_host(
    sending: Sending, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), a_receiver() as receiver, sending() as client:
        job = later(client, webhook=f"{receiver.url}/path-of-mine?token=mine")
        told(client, job["id"], "delivered", 1)
    (line,) = [record for record in caplog.records if record.getMessage() == "webhook attempted"]

    assert (vars(line)["job"], vars(line)["outcome"], vars(line)["host"]) == (job["id"], "delivered", "localhost")
    ours = [record for record in caplog.records if record.levelno >= logging.INFO or record.name.startswith("server")]
    assert not [record for record in ours if "mine" in str(vars(record))]


def test_the_secret_differs_from_key_to_key(sending: Sending, tmp_path: Path) -> None:
    lines, keys = zip(*((line, key) for key, line in map(make_key, ("alice", "bob"))), strict=True)
    (tmp_path / "keys").write_text("\n".join(lines))
    with a_receiver() as receiver, sending(api_keys=str(tmp_path / "keys")) as client:
        alice, bob = ({"authorization": f"Bearer {key}"} for key in keys)
        secrets = [client.get("/webhooks/secret", headers=who).json()["secret"] for who in (alice, bob)]
        client.post("/generate", json={"webhook": receiver.url}, headers=bob)
        received = receiver.next()

        assert client.get("/webhooks/secret").status_code == 401
    assert [is_signed(received, secret) for secret in secrets] == [False, True]
    assert all(len(base64.b64decode(secret.removeprefix("whsec_"))) == 32 for secret in secrets)


@pytest.mark.parametrize(
    ("settings", "url", "said"),
    [
        ({"webhook_secret": ""}, "https://a.example/", "this server sends none, DDPM_WEBHOOK_SECRET is not set"),
        ({}, "http://a.example/", "must begin with https://"),
        ({}, "https://10.0.0.1/", "a host with a public address"),
        ({}, "https://user@a.example/", "without user, password and fragment"),
    ],
)
def test_a_url_that_is_not_allowed_is_refused_before_any_work(
    sending: Sending, settings: dict[str, str], url: str, said: str
) -> None:
    with sending(**settings) as client:
        answer = client.post("/generate", json={"webhook": url}).json()
        jobs = client.get("/jobs").json()["jobs"]

        assert (answer["status"], answer["errors"][0]["pointer"], jobs) == (422, "/webhook", [])
        assert said in answer["detail"]
        assert (client.get("/webhooks/secret").status_code == 200) == ("webhook_secret" not in settings)
