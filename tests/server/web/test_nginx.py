"""deploy/nginx/nginx.conf, with other addresses, in front of servers: what it passes on and what it refuses."""

import io
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from server.errors import Problem
from server.settings import Settings
from server.web.app import create_app
from server.web.openai_schema import error_object
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.server.web.lines import threaded
from tests.server.web.raw import ask, connected, request, rest, say, statuses
from tests.waiting import until

CONFIGURATION = Path(__file__).parents[3] / "deploy" / "nginx" / "nginx.conf"
ORDER = {"seed": 5, "steps": 30}
MUCH = {"seed": 5, "steps": 1000, "n": 64}  # it does not end by itself within a test
pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def before(upstream: int, folder: Path, **others: str) -> Iterator[int]:
    """nginx in front of a port of this machine; its own port. `others` are words of the configuration, and theirs."""
    port = free_port()
    words = {"listen 8080": f"listen 127.0.0.1:{port}", "ddpm:8000": f"127.0.0.1:{upstream}"}
    words |= {"/tmp/": f"{folder}/", "/dev/stdout": f"{folder}/access.log", "/dev/stderr": f"{folder}/error.log"}
    text = CONFIGURATION.read_text()
    for word, other in (words | others).items():
        assert word in text
        text = text.replace(word, other)
    (folder / "nginx.conf").write_text(text)
    command = ["nginx", "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    subprocess.run([*command, "-t", "-q"], check=True)
    running = subprocess.Popen([*command, "-g", "daemon off;"])
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        yield port
    finally:
        running.terminate()
        running.wait(10)


@pytest.fixture(scope="module")
def hasty(long_weights: Path) -> Iterator[Server]:
    """A server that gives a request's body a second and a half to arrive."""
    with Server(long_weights, DDPM_REQUEST_S="1.5") as running:
        yield running


@pytest.fixture(scope="module")
def front(hasty: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of nginx in front of it. A head may take one second, not ten."""
    shorter = {"client_header_timeout 10s": "client_header_timeout 1s"}
    with before(hasty.port, tmp_path_factory.mktemp("nginx"), **shorter) as port:
        yield port


@pytest.fixture
def client(front: int) -> Iterator[httpx.Client]:
    """A client of nginx."""
    with httpx.Client(base_url=f"http://127.0.0.1:{front}", timeout=30) as made:
        yield made


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a problem, which has the form that all have."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:ddpm:problem:{problem['code']}"
    assert problem.keys() >= {"title", "status", "detail", "request_id"}
    assert problem["status"] == answer.status_code
    return answer.status_code, problem["code"]


def parsed(answer: bytes) -> httpx.Response:
    """An answer of which all bytes are there."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def head(path: str, length: int) -> bytes:
    """The head of a POST."""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


@contextmanager
def deaf() -> Iterator[tuple[int, list[bytes]]]:
    """A server that reads one piece of each request and hangs up: its port, and what it has read."""
    heard: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                heard.append(connection.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield listening.getsockname()[1], heard
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_pictures_pass_unchanged(hasty: Server, client: httpx.Client) -> None:
    direct, proxied = (c.post("/generate", json=ORDER) for c in (hasty.client, client))

    assert (proxied.status_code, proxied.content) == (200, direct.content)
    assert proxied.headers["x-seed"] == "5"


def test_refusals_of_the_server_pass_unchanged(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"steps": 0}, headers={"x-request-id": "mine"})

    assert code_of(answer) == (422, "invalid-request")
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"


def test_a_websocket_is_watched_to_its_end(front: int) -> None:
    with connect(f"ws://127.0.0.1:{front}/generate/stream") as socket:
        socket.send(json.dumps(ORDER))
        messages = list(socket)

    assert json.loads([m for m in messages if isinstance(m, str)][-1])["type"] == "succeeded"
    assert len([m for m in messages if isinstance(m, bytes)]) > 20


def test_events_are_not_buffered(client: httpx.Client, hasty: Server) -> None:
    with client.stream("POST", "/generate", json=MUCH, headers={"accept": "text/event-stream"}) as answer:
        chunks = answer.iter_raw()  # kept: who lets it go has closed the connection
        next(chunks)
        status = hasty.client.get(f"/jobs/{answer.headers['x-job-id']}").json()["status"]

    assert status in ("queued", "running")


def test_a_client_that_disconnects_cancels_its_job(client: httpx.Client, hasty: Server) -> None:
    with client.stream("POST", "/generate", json=MUCH, headers={"accept": "text/event-stream"}) as answer:
        job = answer.headers["x-job-id"]
    until(lambda: hasty.client.get(f"/jobs/{job}").json()["status"] not in ("queued", "running"))

    assert hasty.client.get(f"/jobs/{job}").json()["status"] == "cancelled"


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics?", "/metrics%0A", "/%6Detrics", "//metrics", "/x/../metrics", "/x%2f../metrics"]
)
def test_metrics_are_not_public(front: int, path: str) -> None:
    assert code_of(parsed(ask(front, request(path, method="GET")))) == (404, "not-found")


@pytest.mark.parametrize("taken_off", [False, True])
def test_the_server_can_be_offered_under_a_path(tmp_path: Path, weights: Path, taken_off: bool) -> None:
    """The words are those of docs/operations.md; the second way is that of proxies which take the path off."""
    words = {"location / {": "location /ddpm/ {", "location = /metrics": "location = /ddpm/metrics"}
    if taken_off:
        words["proxy_pass http://$ddpm;"] = "rewrite ^/ddpm(/.*)$ $1 break; proxy_pass http://$ddpm;"
    app = create_app(Settings(weights=str(weights), data_dir=tmp_path / "data", path_prefix="/ddpm"), FakeBackend())
    with threaded(app) as made, before(made.port, tmp_path, **words) as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            later = client.post("/ddpm/generate", json={"seed": 5}, headers={"prefer": "respond-async"})
            events = client.get(f"{later.headers['location']}/events").text
            images = client.get(later.headers["location"]).json()["images"]
            page, status = client.get("/ddpm/"), client.get("/ddpm/status").json()

            assert later.headers["location"] == f"/ddpm/jobs/{later.json()['id']}"
            assert events.rstrip().splitlines()[-3] == "event: succeeded"
            assert client.get(images[0]["url"]).headers["content-type"] == "image/png"
            assert (page.status_code, client.get("/ddpm/static/app.js").status_code) == (200, 200)
            assert client.get("/ddpm").headers["location"].endswith("/ddpm/")
            assert status["ready"]
            assert code_of(client.get("/ddpm/metrics")) == (404, "not-found")
            assert code_of(client.get("/generate")) == (404, "not-found")
        with connect(f"ws://127.0.0.1:{port}/ddpm/generate/stream") as socket:
            socket.send(json.dumps({"seed": 5}))
            assert json.loads([m for m in socket if isinstance(m, str)][-1])["type"] == "succeeded"


@pytest.mark.parametrize("size", [65_537, 2_000_000])
def test_a_large_body_is_refused(client: httpx.Client, size: int) -> None:
    answers = [code_of(client.post("/generate", content=b" " * size)) for _ in range(20)]

    assert set(answers) == {(413, "too-large")}


REFUSED_BY_NGINX = {
    b"\x16\x03\x01\x00\r\n\r\n": (400, "malformed"),
    request("/v1/models", method="GET", Host="twice"): (400, "malformed"),
    request("/v1/../..", method="GET"): (400, "malformed"),
    request("/v1/models", method="TRACE"): (405, "method-not-allowed"),
    request("/" + 9000 * "a", method="GET"): (414, "target-too-long"),
    request("/v1/models", method="GET", X=9000 * "a"): (431, "head-too-large"),
    request("/metrics", method="GET"): (404, "not-found"),
    request("/generate", Content_Length="65537"): (413, "too-large"),
}


@pytest.mark.parametrize("sent", REFUSED_BY_NGINX)
def test_what_nginx_refuses_itself_has_the_form_of_all_errors(front: int, sent: bytes) -> None:
    answer = parsed(ask(front, sent))
    problem = answer.json()

    assert code_of(answer) == REFUSED_BY_NGINX[sent]
    assert answer.headers["x-request-id"] == problem["request_id"]
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["cache-control"] == "no-store"
    if b" /v1/models " in sent:
        assert answer.headers["x-should-retry"] == "false"
        assert problem["error"] == error_object(Problem(answer.status_code, problem["code"], problem["detail"]))


@pytest.mark.parametrize("path", ["/ddpm/v1/models", "/jobs?of=/v1/models"])
def test_a_server_that_cannot_be_reached_is_told_of_in_the_form_of_all_errors(tmp_path: Path, path: str) -> None:
    with before(free_port(), tmp_path) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}{path}")
    problem = answer.json()

    assert code_of(answer) == (503, "not-ready")
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    expected = error_object(Problem(503, problem["code"], problem["detail"])) if "?" not in path else None
    assert (problem.get("error"), answer.headers.get("x-should-retry")) == (expected, "true" if expected else None)


def test_a_slow_head_is_cut_off(front: int) -> None:
    began = time.monotonic()
    with connected(front) as connection:
        say(connection, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        received = rest(connection)

    assert statuses(received) in ([], [408])
    assert time.monotonic() - began < 5


def test_a_slow_body_is_refused(front: int) -> None:
    with connected(front) as connection:
        say(connection, head("/generate", 1000))
        for _ in range(60):
            say(connection, b" ")
            connection.settimeout(0.1)
            try:
                received = connection.recv(1 << 16)
                break
            except TimeoutError:
                pass
        else:
            pytest.fail("it was listened to for six seconds")

    assert statuses(received) == [408]
    assert b"request-timeout" in received


def test_malformed_http_is_not_passed_on(front: int) -> None:
    smuggled = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET "

    assert statuses(ask(front, b"\x16\x03\x01\x00\r\n\r\n")) in ([], [400])
    assert statuses(ask(front, smuggled)) == [400]


def test_a_failed_request_is_not_retried(tmp_path: Path) -> None:
    with deaf() as (upstream, heard), before(upstream, tmp_path) as port:
        answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=ORDER)

    assert code_of(answer) == (503, "not-ready")
    assert int(answer.headers["retry-after"]) > 0
    assert len(heard) == 1


@contextmanager
def busy(folder: Path, addresses: Sequence[str], **words: str) -> Iterator[int]:
    """nginx that allows three connections for an address, and has one for each of these, as a proxy tells them."""
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        fewer = {"limit_conn address 256": "limit_conn address 3", **words}
        port = stack.enter_context(before(silent.getsockname()[1], folder, **fewer))
        for address in addresses:
            sent = f"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: {address}\r\n\r\n"
            say(stack.enter_context(connected(port)), sent.encode())
            silent.settimeout(10)
            stack.enter_context(silent.accept()[0])  # it was let through
        yield port


def test_one_address_cannot_use_all_connections(tmp_path: Path) -> None:
    with busy(tmp_path, ["9.9.9.9", "8.8.8.8", "7.7.7.7"]) as port:  # nobody was named who may say so
        answer = httpx.get(f"http://127.0.0.1:{port}/healthz")

    assert code_of(answer) == (503, "not-ready")


def test_a_private_address_may_use_more_connections(tmp_path: Path) -> None:
    with busy(tmp_path, ["9.9.9.9"] * 5, **{"172.16.0.0/12 1;": "127.0.0.0/8 1;"}):
        pass


def test_a_trusted_proxy_names_the_address_of_its_client(tmp_path: Path) -> None:
    believed = {"# set_real_ip_from 172.16.0.0/12;": "set_real_ip_from 127.0.0.0/8;", "# real_ip": "real_ip"}
    with busy(tmp_path, ["8.8.8.8", "9.9.9.9", "9.9.9.9", "9.9.9.9"], **believed) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/healthz", headers={"x-forwarded-for": "9.9.9.9"})

    assert code_of(answer) == (503, "not-ready")


@contextmanager
def names() -> Iterator[tuple[int, set[bytes]]]:
    """A DNS server: its port, and the names that it knows, which are this machine."""
    known: set[bytes] = set()

    def answer() -> None:
        while (asked := server.recvfrom(512))[0]:
            query, asker = asked
            name = query[13 : 13 + query[12]]
            flags, answers = (b"\x81\x80", 1) if name in known else (b"\x81\x83", 0)  # no error, no such name
            head = query[:2] + flags + b"\0\1" + bytes([0, answers]) + b"\0\0\0\0"
            address = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + socket.inet_aton("127.0.0.1")
            server.sendto(head + query[12:] + address * answers, asker)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield server.getsockname()[1], known
        finally:
            server.sendto(b"", server.getsockname())
            thread.join()


def test_nginx_starts_before_the_server_and_finds_it_later(hasty: Server, tmp_path: Path) -> None:
    with names() as (dns, known):
        resolver = {"127.0.0.11 valid=5s": f"127.0.0.1:{dns} valid=1s", "ddpm:8000": f"ddpm:{hasty.port}"}
        with before(hasty.port, tmp_path, **resolver) as port:
            alone = httpx.get(f"http://127.0.0.1:{port}/healthz")
            known.add(b"ddpm")
            hasty.until(lambda: httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200, 10)

    assert code_of(alone) == (503, "not-ready")


def test_logs_are_json_without_query_strings(client: httpx.Client, tmp_path: Path) -> None:
    with deaf() as (upstream, _), before(upstream, tmp_path) as port:
        httpx.post(f"http://127.0.0.1:{port}/jobs?secret=1", headers={"user-agent": '"\n'.strip()})
    lines = [json.loads(line) for line in io.StringIO((tmp_path / "access.log").read_text())]

    assert [(line["method"], line["path"], line["status"]) for line in lines] == [("POST", "/jobs", 503)]
