"""A server process under hostile requests: it answers as documented, and goes on answering."""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.conftest import Server
from tests.server.web import hostile
from tests.server.web.raw import ask, close_codes, connected, frame, problem_in, request, say, statuses, upgraded

ECHO = "zq7unlikely"


@pytest.fixture(autouse=True)
def _alive(server: Server) -> Iterator[None]:
    """Whatever a test has sent, the server is alive after it and has had no error that it did not foresee."""
    yield
    assert server.client.get("/healthz").status_code == 200
    assert server.process.poll() is None
    counted = re.findall(r'ddpm_rejected_total\{reason="internal"\} (\S+)', server.client.get("/metrics").text)
    assert counted in ([], ["0.0"])


def answers(server: Server, requests: Sequence[bytes]) -> list[list[int]]:
    """The statuses that each of these is answered with, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        return [statuses(answer) for answer in pool.map(lambda data: ask(server.port, data), requests)]


def wrong(server: Server, requests: Sequence[bytes], allowed: Sequence[int]) -> list[tuple[bytes, list[int]]]:
    """Those of these requests that are not answered once, with a status that is allowed."""
    found = zip(requests, answers(server, requests), strict=True)
    return [(data[:200], given) for data, given in found if len(given) != 1 or given[0] not in allowed]


def test_bodies_that_are_not_strict_json_are_malformed(server: Server) -> None:
    assert wrong(server, [request(body=body) for body in hostile.NOT_JSON], [400]) == []


def test_bodies_out_of_bounds_are_refused(server: Server) -> None:
    assert wrong(server, [request(body=body) for body in hostile.NOT_A_REQUEST], [422]) == []


def test_names_of_no_model_are_not_found(server: Server) -> None:
    for path in ("/generate", "/v1/images/generations"):
        assert wrong(server, [request(path, body) for body in hostile.NOT_A_MODEL], [404]) == []


def test_the_same_bodies_are_refused_under_openais_paths(server: Server) -> None:
    bodies = hostile.NOT_JSON + hostile.NOT_A_REQUEST

    assert wrong(server, [request("/v1/images/generations", body) for body in bodies], [400]) == []


def test_no_path_leads_out_of_the_static_folder_and_the_routes(server: Server) -> None:
    targets = hostile.NOT_THERE + hostile.LOST_IN_LISTS

    assert wrong(server, [request(target, method="GET") for target in targets], [404]) == []


def test_bad_query_parameters_are_refused(server: Server) -> None:
    assert wrong(server, [request(target, method="GET") for target in hostile.BAD_QUERIES], [422]) == []


@pytest.mark.parametrize("path", ["/generate", "/jobs", "/jobs/x", "/models", "/healthz", "/metrics", "/nothing", "/"])
def test_other_methods_are_not_allowed(server: Server, path: str) -> None:
    assert wrong(server, [request(path, method=method) for method in hostile.METHODS], [404, 405]) == []


def test_bad_headers_are_refused_and_harmless_ones_ignored(server: Server) -> None:
    def head(headers: dict[str, str]) -> bytes:
        lines = {"Host": "localhost", "Connection": "close", "Content-Type": "application/json"} | headers
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"POST /generate HTTP/1.1\r\n{text}Content-Length: 2\r\n\r\n{{}}".encode("latin-1")

    given = answers(server, [head(headers) for headers, _ in hostile.BAD_HEADERS])
    assert [
        (str(headers)[:80], status, found)
        for (headers, status), found in zip(hostile.BAD_HEADERS, given, strict=True)
        if found != [status]
    ] == []
    assert wrong(server, [head(headers) for headers in hostile.HARMLESS_HEADERS], [200]) == []


def test_malformed_http_is_refused_and_the_connection_closed(server: Server) -> None:
    assert wrong(server, hostile.NOT_HTTP, [400]) == []


def test_a_request_must_name_exactly_one_host(server: Server) -> None:
    assert wrong(server, hostile.HEADLESS, [400]) == []


def test_too_large_requests_are_refused_while_they_arrive(server: Server) -> None:
    given = answers(server, [data for data, _ in hostile.TOO_LARGE])

    assert [
        (data[:60], status, found)
        for (data, status), found in zip(hostile.TOO_LARGE, given, strict=True)
        if found not in ([status], [])  # a reset may overtake the answer to somebody who goes on sending
    ] == []
    assert sum(found == [] for found in given) <= len(given) // 2


def test_every_refusal_is_a_problem_that_echoes_nothing(server: Server) -> None:
    requests = [
        request(f"/{ECHO}", method="GET"),
        request(f"/models/{ECHO}", method="GET"),
        request(f"/jobs/{ECHO}", method="GET"),
        request(f"/jobs?status={ECHO}", method="GET"),
        request(body=json.dumps({ECHO: 1}).encode()),
        request(body=json.dumps({"model": ECHO}).encode()),
        request(body=f'{{"{ECHO}"'.encode()),
        request(host=f"{ECHO}.example"),
        request(Origin=f"https://{ECHO}.example"),
        request(Accept=f"text/{ECHO}"),
        request(X_A=ECHO * 1000),
        f"GET {ECHO} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
        f"{ECHO}\r\n\r\n".encode(),
        f"GET /{ECHO * 1000} HTTP/1.1\r\n\r\n".encode(),
        handshake("Sec-WebSocket-Key", ECHO),
        handshake("Sec-WebSocket-Version", ECHO),
        handshake("Origin", f"https://{ECHO}.example"),
    ]
    for data in requests:
        answer = ask(server.port, data)
        assert b"content-type: application/problem+json" in answer, answer
        assert {"type", "title", "status", "detail", "code", "request_id"} <= problem_in(answer).keys()
        assert ECHO.encode() not in answer


def test_an_ill_formed_request_id_is_replaced(server: Server) -> None:
    for given in ("a b", "x" * 65, "<script>", "\u00ff"):
        answer = ask(server.port, request("/healthz", method="GET", X_Request_Id=given))
        assert re.search(rb"x-request-id: [0-9a-f]{16}\r\n", answer)


def handshake(name: str = "", value: str = "", path: str = "/generate/stream") -> bytes:
    """A websocket handshake with one header changed, or left out if it has no value."""
    headers = {
        "Host": "localhost",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    headers |= {name: value} if name else {}
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")


HANDSHAKES: list[tuple[bytes, int]] = [
    (handshake("Sec-WebSocket-Version", "12"), 400),
    (handshake("Sec-WebSocket-Version", "x"), 400),
    (handshake("Sec-WebSocket-Version", ""), 400),
    (handshake("Sec-WebSocket-Version", "13, 13"), 400),
    (handshake("Sec-WebSocket-Key", "short"), 400),
    (handshake("Sec-WebSocket-Key", ""), 400),
    (handshake("Sec-WebSocket-Key", "!" * 24), 400),
    (handshake("Sec-WebSocket-Key", "A" * 4000), 400),
    (handshake("Sec-WebSocket-Extensions", ";;;"), 101),
    (handshake("Sec-WebSocket-Extensions", "permessage-deflate; x=" + "y" * 4000), 101),
    (handshake("Sec-WebSocket-Protocol", "\x7f"), 400),
    (handshake("Sec-WebSocket-Protocol", ",".join(["a"] * 1000)), 101),
    (handshake("Host", "evil.example"), 400),
    (handshake("Host", ""), 400),
    (handshake("Origin", "https://evil.example"), 403),
    (handshake("Origin", "null"), 403),
    (handshake("X-A", "a" * 8100), 431),
    (handshake("X-A", "a\x01"), 400),
    (handshake(path="/nothing"), 404),
    (handshake(path="/"), 404),
    (handshake(path="/healthz"), 404),
    (handshake(path="/generate"), 404),
    (handshake(path="/jobs/x"), 404),
    (handshake(path="/jobs//stream"), 404),
    (handshake(path="/jobs/%2e%2e/%2e%2e/stream"), 404),
    (handshake(path="/static/app.js"), 404),
    (handshake(path="/generate/stream/"), 404),
    (handshake(path="/" + "a" * 5000), 414),
    (handshake(path="/caf\u00e9"), 400),
    (handshake(path="generate/stream"), 400),
    (handshake().replace(b"GET", b"POST"), 405),
    (handshake().replace(b"HTTP/1.1", b"HTTP/1.0"), 101),
    (handshake().replace(b"\r\n\r\n", b"\r\n" + b"X: a\r\n" * 110 + b"\r\n"), 431),
]


@pytest.mark.parametrize(("data", "expected"), HANDSHAKES, ids=range(len(HANDSHAKES)))
def test_a_bad_handshake_is_refused_with_an_http_status(server: Server, data: bytes, expected: int) -> None:
    with connected(server.port) as connection:
        say(connection, data)
        assert statuses(connection.recv(1 << 16)) == [expected]


TEXT, BINARY, CONTINUED, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
GOOD = b'{"steps": 1}'
FRAMES: list[tuple[str, bytes, list[int]]] = [
    ("a body that is not JSON", frame(TEXT, b"{"), [4400]),
    ("an empty message", frame(TEXT, b""), [4400]),
    ("NaN", frame(TEXT, b'{"seed": NaN}'), [4400]),
    ("a surrogate", frame(TEXT, b'{"model": "\\ud800"}'), [4400]),
    ("a number of many digits", frame(TEXT, b'{"seed": ' + b"9" * 5000 + b"}"), [4400]),
    ("a deep body", frame(TEXT, b"[" * 5000), [4400]),
    ("duplicate keys", frame(TEXT, b'{"n": 1, "n": 2}'), [4400]),
    ("an unknown field", frame(TEXT, b'{"x": 1}'), [4400]),
    ("a list", frame(TEXT, b"[]"), [4400]),
    ("null", frame(TEXT, b"null"), [4400]),
    ("too many pictures", frame(TEXT, b'{"n": 1000000000}'), [4400]),
    ("a message too large", frame(TEXT, b" " * 70_000), [1009]),
    ("a message that says it is huge", b"\x81\xff" + b"\x7f" * 8 + b"\x00" * 4, [1009]),
    ("a length with its sign set", b"\x81\xff" + b"\xff" * 8 + b"\x00" * 4, [1002, 1009]),
    ("fragments too large together", frame(TEXT, b" " * 40_000, fin=False) + frame(CONTINUED, b" " * 40_000), [1009]),
    ("bytes that are not UTF-8", frame(TEXT, b"\xff\xfe"), [1007]),
    ("half a character", frame(TEXT, b"\xc3"), [1007]),
    ("UTF-8 too long", frame(TEXT, b"\xc0\xaf"), [1007]),
    ("an encoded surrogate", frame(TEXT, b"\xed\xa0\x80"), [1007]),
    ("a binary message", frame(BINARY, GOOD), [1003]),
    ("an empty binary message", frame(BINARY), [1003]),
    ("a frame without a mask", frame(TEXT, GOOD, masked=False), [1002]),
    ("a reserved bit", frame(TEXT, GOOD, reserved=4), [1002]),
    ("all reserved bits", frame(TEXT, GOOD, reserved=7), [1002]),
    ("an unknown kind of frame", frame(3, GOOD), [1002]),
    ("an unknown kind of control frame", frame(15), [1002]),
    ("a continuation of nothing", frame(CONTINUED, GOOD), [1002]),
    ("a message inside another", frame(TEXT, b"{", fin=False) + frame(TEXT, GOOD), [1002]),
    ("a ping in pieces", frame(PING, b"x", fin=False), [1002]),
    ("a ping too long", frame(PING, b"x" * 126), [1002]),
    ("a close with half a code", frame(CLOSE, b"\x03"), [1002]),
    ("a close with a code that is none", frame(CLOSE, b"\x00\x01"), [1002]),
    ("a close with a reserved code", frame(CLOSE, b"\x03\xed"), [1002]),
    ("a close whose reason is not UTF-8", frame(CLOSE, b"\x03\xe8\xff"), [1002, 1007]),
    ("a second request that is none", frame(TEXT, b'{"steps": 30, "n": 64}') + frame(TEXT, GOOD), [1008]),
    ("an order that is not understood", frame(TEXT, b'{"steps": 30, "n": 64}') + frame(TEXT, b'{"type": "x"}'), [1008]),
    (
        "an order with more in it",
        frame(TEXT, b'{"steps": 30, "n": 64}') + frame(TEXT, b'{"type": "ping", "a": 1}'),
        [1008],
    ),
    ("an order in bytes", frame(TEXT, b'{"steps": 30, "n": 64}') + frame(BINARY, b'{"type": "cancel"}'), [1003]),
    ("an order that is not JSON", frame(TEXT, b'{"steps": 30, "n": 64}') + frame(TEXT, b"{"), [1008]),
    ("orders without end", frame(TEXT, b'{"steps": 30, "n": 64}') + frame(TEXT, b'{"type": "ping"}') * 5000, [1008]),
    ("pings without end", frame(PING, b"x" * 125) * 5000, [1008]),
    ("pongs that nobody asked for, without end", frame(PONG, b"x" * 125) * 5000, [1008]),
    ("empty fragments without end", frame(TEXT, fin=False) + frame(CONTINUED, fin=False) * 60_000, [1008]),
    ("a flood after a close", frame(BINARY) + frame(TEXT, b"x" * 125) * 5000, [1003]),
]


@pytest.mark.parametrize(("said", "codes"), [case[1:] for case in FRAMES], ids=[case[0] for case in FRAMES])
def test_a_websocket_that_misbehaves_is_closed_with_the_right_code(
    server: Server, said: bytes, codes: list[int]
) -> None:
    with upgraded(server.port) as connection:
        say(connection, said)
        heard = b""
        while not (found := close_codes(heard)) and (data := connection.recv(1 << 16)):
            heard += data

    assert found and found[0] in codes


def test_there_are_at_least_300_hostile_requests() -> None:
    tables: list[Sequence[object]] = [
        hostile.NOT_JSON,
        hostile.NOT_A_REQUEST,
        hostile.NOT_A_MODEL,
        hostile.NOT_THERE,
        hostile.LOST_IN_LISTS,
        hostile.BAD_QUERIES,
        hostile.BAD_HEADERS,
        hostile.HARMLESS_HEADERS,
        hostile.NOT_HTTP,
        hostile.HEADLESS,
        hostile.TOO_LARGE,
        HANDSHAKES,
        FRAMES,
    ]
    assert sum(map(len, tables)) >= 300
