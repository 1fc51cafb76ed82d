"""One POST: to the address that was checked, with the name of the host, and to nowhere else."""

import asyncio
import errno
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from server.webhooks.post import Poster
from server.webhooks.target import Undelivered, parse_url
from tests.server.webhooks.receiver import Receiver, a_receiver, raw, status


@contextmanager
def resolving(*answers: list[str]) -> Iterator[list[str]]:
    """Names have these addresses, one list at each lookup; the names that were looked up."""
    left, asked = list(answers), list[str]()
    usual = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **options: Any) -> Any:
        asked.append(host)
        return [found for address in left.pop(0) for found in usual(address, port, type=socket.SOCK_STREAM)]

    with mock.patch.object(socket, "getaddrinfo", getaddrinfo):
        yield asked


def post(url: str, hosts: str = "") -> int | str:
    """The status of the answer, or why there is none."""
    try:
        return asyncio.run(Poster().post(parse_url(url, hosts), {"X-Test": "1"}, b"{}"))
    except Undelivered as failure:
        return str(failure)


@pytest.mark.parametrize(
    "addresses",
    [
        *(["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"]),
        *(["8.8.8.8", "127.0.0.1"], []),
    ],
)
def test_a_name_with_an_address_that_is_not_public_is_connected_to_nowhere(addresses: list[str]) -> None:
    with resolving(addresses), mock.patch("asyncio.open_connection", side_effect=AssertionError):
        assert post("https://a.example/") == "the host has no public address"


def test_the_name_is_looked_up_once_and_the_address_that_was_checked_is_connected_to() -> None:
    connected: list[object] = []

    async def connect(loop: object, make: object, host: object = None, port: object = None, **options: Any) -> None:
        connected.append((host, port, options.get("server_hostname")))
        raise ConnectionRefusedError

    with resolving(["8.8.8.8"], ["127.0.0.1"]) as asked:
        with mock.patch.object(asyncio.base_events.BaseEventLoop, "create_connection", connect):
            answer = post("https://a.example:8443/")

    assert (asked, connected) == (["a.example"], [("8.8.8.8", 8443, "a.example")])
    assert answer == "no connection, or one that broke"


@pytest.mark.parametrize("lack", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "")])
def test_a_name_that_cannot_be_looked_up_for_a_moment_is_no_failed_attempt(lack: OSError) -> None:
    with mock.patch.object(socket, "getaddrinfo", side_effect=lack), pytest.raises(OSError) as raised:
        post("https://a.example/")

    assert raised.value is lack  # which is waited for


def test_a_host_with_several_addresses_is_reached_at_one_that_works() -> None:
    with a_receiver() as receiver, resolving(["::1", "127.0.0.1"]):
        assert post(receiver.url, hosts="localhost") == 204
        assert receiver.next().headers["x-test"] == "1"


@pytest.mark.parametrize(
    "said",
    [
        *(b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 20", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"a" * 65536),
        *(b"HTTP/1.1 100 Continue\r\n\r\n" * 2, b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + b"HTTP/1.1 200 OK\r\n\r\n"),
    ],
    ids=["nothing", "no HTTP", "half a line", "HTTP/2", "a long head", "two interim answers", "many of them"],
)
def test_what_is_no_answer_is_a_failure(said: bytes) -> None:
    with a_receiver(raw(said)) as receiver:
        assert post(receiver.url, hosts="localhost") == "no connection, or one that broke"


def test_an_answer_may_follow_interim_ones() -> None:
    said = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
    with a_receiver(raw(said)) as receiver:
        assert post(receiver.url, hosts="localhost") == 202


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_receiver() as receiver, a_receiver() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)

        assert post(receiver.url, hosts="localhost") == 204
        assert (receiver.came.qsize(), proxy.came.qsize()) == (1, 0)


def test_cookies_of_one_receiver_are_not_sent_to_another() -> None:
    async def twice(receiver: Receiver) -> None:
        poster = Poster()
        for _ in range(2):
            await poster.post(parse_url(receiver.url, "localhost"), {}, b"{}")

    with a_receiver(status(200, Set_Cookie="a=b; Path=/")) as receiver:
        asyncio.run(twice(receiver))
        assert "cookie" not in receiver.next().headers | receiver.next().headers


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for the name `localhost` that no authority has signed, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    made: list[str | Path] = [
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-keyout",
        file,
        "-out",
        file.with_suffix(".crt"),
    ]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([openssl, "req", *made, *subject], check=True, capture_output=True)
    file.write_text(file.read_text() + file.with_suffix(".crt").read_text())
    return file


@pytest.mark.parametrize(
    ("trusted", "name", "answer"),
    [
        (False, "localhost", "no TLS connection with a valid certificate"),
        (True, "localhost", 204),
        (True, "a.example", "no TLS connection with a valid certificate"),
        (True, "127.0.0.1", "no TLS connection with a valid certificate"),
    ],
)
def test_a_certificate_must_be_valid_for_the_name_in_the_url(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool, name: str, answer: int | str
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with a_receiver(tls=tls) as receiver, resolving(["127.0.0.1"]):
        assert post(receiver.url.replace("localhost", name), hosts=name) == answer
        assert receiver.came.qsize() == (answer == 204)
