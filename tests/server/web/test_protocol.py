"""Limits of connections: slow ones, too many, pipelines, and thousands that are aborted."""

import os
import random
import select
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.conftest import Server
from tests.server.web.raw import (
    HANDSHAKE,
    abort,
    ask,
    close_codes,
    connected,
    frame,
    open_files,
    problem_in,
    request,
    resident_bytes,
    rest,
    say,
    settles,
    statuses,
    upgraded,
)

pytestmark = pytest.mark.alone

MOST, SOCKETS, REQUEST_S = 40, 6, 0.6
PROBE = request("/healthz", method="GET")
ABORTS = int(os.environ.get("ABORTS", "2000"))  # 10,000 in `make soak`
MIB = 1 << 20


@pytest.fixture(scope="module")
def narrow(weights: Path) -> Iterator[Server]:
    """A server of few connections and little patience."""
    knobs = {"DDPM_MAX_CONNECTIONS": MOST, "DDPM_MAX_WEBSOCKETS": SOCKETS, "DDPM_REQUEST_S": REQUEST_S}
    with Server(weights, **{name: str(value) for name, value in knobs.items()}) as running:
        yield running


def eventually(condition: Callable[[], bool], patience_s: float = 20.0) -> bool:
    """Whether something comes true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


SLOW = {
    "half a request line": b"GET /heal",
    "half a header": b"GET /healthz HTTP/1.1\r\nHost: loc",
    "headers without an end": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n",
    "half a body": request(body=b" " * 100)[:-50],
    "no body": request(body=b" " * 100)[:-100],
    "half a chunk": b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
    "chunks without an end": b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\n{}\r\n",
    "a body that was announced": b"POST /generate HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    b"Content-Length: 2\r\n\r\n",
}


@pytest.fixture(scope="module")
def late(narrow: Server) -> dict[str, tuple[bytes, float]]:
    """What each of SLOW is answered, all of them sent at once, and after how many seconds."""

    def ask_for(data: bytes) -> tuple[bytes, float]:
        began = time.monotonic()
        return ask(narrow.port, data), time.monotonic() - began

    with ThreadPoolExecutor(len(SLOW)) as callers:
        return dict(zip(SLOW, callers.map(ask_for, SLOW.values()), strict=True))


@pytest.mark.parametrize("name", SLOW)
def test_a_request_that_does_not_arrive_in_time_is_answered_with_408(
    late: dict[str, tuple[bytes, float]], name: str
) -> None:
    answer, took_s = late[name]

    assert statuses(answer)[-1:] == [408]
    assert REQUEST_S * 0.9 < took_s < REQUEST_S + 3


def test_single_bytes_do_not_extend_the_time(narrow: Server) -> None:
    with connected(narrow.port) as connection:
        began = time.monotonic()
        for byte in request(body=b'{"steps": 1}'):
            say(connection, bytes([byte]))
            answered = select.select([connection], [], [], 0.02)[0]
            if answered or time.monotonic() - began > 3 * REQUEST_S:
                break
        assert statuses(rest(connection)) == [408]


def test_a_silent_connection_is_closed_without_an_answer(narrow: Server) -> None:
    assert ask(narrow.port, b"") == b""


def test_an_answer_has_no_time_limit(narrow: Server) -> None:
    with connected(narrow.port) as connection:
        connection.sendall(request(body=b'{"steps": 30, "n": 64}'))
        assert statuses(rest(connection)) == [200]


def test_connections_beyond_the_limit_may_only_ask_for_health(narrow: Server) -> None:
    with ExitStack() as held:
        for _ in range(MOST):
            connection = held.enter_context(connected(narrow.port))
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert statuses(connection.recv(1 << 16)) == [200]  # kept alive

        refused = ask(narrow.port, request("/models", method="GET"))
        assert statuses(refused) == [503]
        assert problem_in(refused)["code"] == "too-many-connections"
        assert b"retry-after: 2" in refused.lower()
        assert statuses(ask(narrow.port, PROBE)) == [200]
        assert statuses(ask(narrow.port, HANDSHAKE.format(path="/generate/stream").encode())) == [503]
    assert eventually(lambda: statuses(ask(narrow.port, request("/models", method="GET"))) == [200])


def test_health_is_answered_beside_any_number_of_silent_connections(narrow: Server) -> None:
    before = open_files(narrow.process.pid)
    with ExitStack() as held:
        for _ in range(MOST + 300):
            held.enter_context(connected(narrow.port))
        assert statuses(ask(narrow.port, PROBE)) == [200]
        assert open_files(narrow.process.pid) < before + MOST + 80
    assert settles(before, narrow.process.pid)


def test_websockets_have_their_own_limit(narrow: Server) -> None:
    shake = HANDSHAKE.format(path="/generate/stream").encode()
    with ExitStack() as held:
        for _ in range(SOCKETS):
            held.enter_context(upgraded(narrow.port))
        refused = ask(narrow.port, shake)
        assert (statuses(refused), problem_in(refused)["code"]) == ([503], "too-many-connections")
        assert statuses(ask(narrow.port, request("/models", method="GET"))) == [200]

    def opens() -> bool:
        with connected(narrow.port) as connection:
            connection.sendall(shake)
            return statuses(connection.recv(1 << 16)) == [101]

    assert eventually(opens)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    first = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    second = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"

    assert statuses(ask(server.port, first + second + first + PROBE)) == [200, 404, 200, 200]


def test_the_length_of_a_pipeline_is_limited(server: Server) -> None:
    before = resident_bytes(server.process.pid)
    answer = ask(server.port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000)

    assert len(statuses(answer)) <= 20
    assert resident_bytes(server.process.pid) - before < 8 * MIB


def test_bytes_after_a_broken_request_are_not_a_request(server: Server) -> None:
    smuggled = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    post = b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
    for data in (
        post + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
        post + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + smuggled,
        post + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + smuggled,
        post + b"Transfer-Encoding\t: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + smuggled,
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" + smuggled,
    ):
        assert 404 not in statuses(ask(server.port, data))


def test_a_trailer_changes_nothing_that_was_decided_before_it(server: Server) -> None:
    body = b"2\r\n{}\r\n0\r\nHost: evil.example\r\nAccept: text/html\r\n\r\n"
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"

    assert statuses(ask(server.port, head + body)) == [200]
    endless = b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 9000 + b"\r\n"
    assert statuses(ask(server.port, head + endless)) in ([431], [])


def running_jobs(server: Server) -> float:
    """How many jobs have not ended."""
    text = server.client.get("/metrics").text
    return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith(("ddpm_jobs_r", "ddpm_jobs_w")))


def test_a_disconnect_cancels_every_request_of_a_pipeline(server: Server) -> None:
    with connected(server.port) as connection:
        connection.sendall(request(body=b'{"steps": 30, "n": 64}').replace(b"Connection: close\r\n", b"") + PROBE)
        assert eventually(lambda: running_jobs(server) == 1)
        abort(connection)
        began = time.monotonic()
        assert eventually(lambda: running_jobs(server) == 0)

    cancelled = 'ddpm_jobs_total{outcome="cancelled"}'
    text = server.client.get("/metrics").text
    assert float(next(line for line in text.splitlines() if line.startswith(cancelled)).split()[1]) > 0
    assert time.monotonic() - began < 2


def test_data_after_a_close_is_not_read(server: Server) -> None:
    with upgraded(server.port) as connection:
        connection.sendall(frame(2, b"x"))
        heard = b""
        while not close_codes(heard):
            heard += connection.recv(1 << 16)
        flood = frame(1, b"x" * 100) * 1000
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 5:
                connection.sendall(flood)


@pytest.fixture(scope="module")
def busy(weights: Path) -> Iterator[Server]:
    """A server for crowds."""
    with Server(weights, DDPM_LOG_LEVEL="error") as running:
        yield running


def come_and_go(port: int, chance: random.Random) -> None:
    """One client who connects and aborts, somewhere on the way, before a job is made of it: jobs are kept."""
    whole = chance.choice([PROBE, request(body=b'{"steps": 0}'), HANDSHAKE.format(path="/generate/stream").encode()])
    with connected(port) as connection:
        say(connection, whole[: chance.choice([0, 1, len(whole) // 2, len(whole) - 1, len(whole)])])
        if chance.random() < 0.2:
            connection.settimeout(0.01)
            try:
                connection.recv(1 << 12)
            except OSError:
                pass
        if chance.random() < 0.8:
            abort(connection)


@pytest.mark.long
def test_thousands_of_aborted_connections_leak_nothing(busy: Server) -> None:
    chance, pid = random.Random(1), busy.process.pid
    idle = open_files(pid)
    for _ in range(1000):
        come_and_go(busy.port, chance)
    assert settles(idle, pid)
    warm = resident_bytes(pid)
    for _ in range(ABORTS):
        come_and_go(busy.port, chance)

    assert settles(idle, pid)
    assert busy.client.get("/healthz").status_code == 200
    assert eventually(lambda: running_jobs(busy) == 0)
    assert resident_bytes(pid) - warm <= MIB
