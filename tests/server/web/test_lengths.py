"""Declared sizes: what is too large is refused by what it says of itself, before it is read."""

import json
import struct

import pytest

from server.settings import Settings
from tests.server.conftest import Server
from tests.server.web.raw import HANDSHAKE, ask, close_codes, connected, frame, problem_in, rest, say, statuses
from tests.server.web.raw import upgraded as websocket

MOST = Settings.model_fields["max_body_bytes"].default
ROUTES = (
    "POST /generate",
    "POST /v1/images/generations",
    "DELETE /jobs/x",
    "GET /healthz",
    "GET /models",
    "PUT /nothing",
)


def head(route: str, *lines: str) -> bytes:
    """A request without its body."""
    return "\r\n".join([f"{route} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
def test_a_body_that_is_declared_too_large_is_refused_before_it_comes(
    server: Server, route: str, expect: tuple[str, ...]
) -> None:
    for size in (MOST + 1, 10**12, 2**64 - 1):
        with connected(server.port) as connection:
            connection.sendall(head(route, f"Content-Length: {size}", *expect) + b"x" * (not expect))
            answer = rest(connection)

        assert (statuses(answer), problem_in(answer)["code"]) == ([413], "too-large")
        assert problem_in(answer)["detail"] == f"the body must be at most {MOST} bytes"


def test_a_handshake_with_a_large_body_is_refused_too(server: Server) -> None:
    shake = HANDSHAKE.format(path="/generate/stream").replace("\r\n\r\n", f"\r\nContent-Length: {10**12}\r\n\r\n")

    assert statuses(ask(server.port, shake.encode())) == [413]


def test_a_client_that_sends_all_before_it_reads_still_learns_that_it_was_too_much(server: Server) -> None:
    with connected(server.port) as connection:
        connection.sendall(head("POST /generate", f"Content-Length: {8 * MOST}"))
        for _ in range(8):  # each is one that a closed connection would answer with a reset
            connection.sendall(b" " * MOST)
        assert statuses(rest(connection)) == [413]


@pytest.mark.parametrize("value", ["-1", "+1", "1.0", "0x10", "1, 1", "one", "", "1\r\nContent-Length: 1"])
def test_a_length_that_is_no_number_is_malformed(server: Server, value: str) -> None:
    assert statuses(ask(server.port, head("POST /generate", f"Content-Length: {value}") + b"x")) == [400]


def test_chunks_are_refused_once_they_are_too_many_though_no_end_is_in_sight(server: Server) -> None:
    with connected(server.port) as connection:
        connection.sendall(head("POST /generate", "Transfer-Encoding: chunked", "Connection: close"))
        say(connection, b"%x\r\n" % 10**12 + b" " * (MOST + 1))
        assert statuses(connection.recv(1 << 16)) == [413]


@pytest.mark.parametrize("opcode", [1, 2])
def test_a_message_is_refused_by_the_length_of_its_frame(server: Server, opcode: int) -> None:
    with websocket(server.port) as connection:
        connection.sendall(bytes([0x80 | opcode, 0x80 | 127]) + struct.pack(">Q", 10**12) + b"mask" + b"x")
        assert close_codes(rest(connection)) == [1009]


def test_a_message_in_pieces_is_refused_by_the_length_of_the_piece_that_is_too_much(server: Server) -> None:
    with websocket(server.port) as connection:
        connection.sendall(frame(1, b" " * 10, fin=False))
        connection.sendall(bytes([0x80, 0x80 | 127]) + struct.pack(">Q", MOST - 5) + b"mask" + b"x")
        assert close_codes(rest(connection)) == [1009]


LONG = {
    414: head("GET /models?" + "a" * 5000),
    431: head("GET /models", *(f"X-{i}: {'a' * 7000}" for i in range(6))),
}


@pytest.mark.parametrize("status", LONG)
def test_long_targets_and_heads_are_refused_before_they_end(server: Server, status: int) -> None:
    with connected(server.port) as connection:
        connection.sendall(LONG[status].removesuffix(b"\r\n\r\n"))
        answer = rest(connection)

    assert statuses(answer) == [status]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == status


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/generations?x=1"])
def test_a_refusal_of_the_protocol_has_the_form_of_the_path_and_the_id_that_was_sent(server: Server, path: str) -> None:
    def refused(path: str) -> tuple[dict[str, object], bool]:
        asked = head(f"POST {path}", "X-Request-Id: mine", f"Content-Length: {MOST + 1}")
        answer = ask(server.port, asked)
        return problem_in(answer), b"x-should-retry: false" in answer.lower()

    ours, theirs = refused("/generate"), refused(path)

    assert (ours[0]["request_id"], theirs[0]["request_id"]) == ("mine", "mine")
    assert (ours[0].get("error"), ours[1]) == (None, False)
    message = f"the body must be at most {MOST} bytes"
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "too-large"}
    assert theirs == (ours[0] | {"error": error}, True)
