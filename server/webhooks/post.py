"""One POST to a webhook: to an address that was checked, without redirects, proxies, cookies and kept connections."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress

import h11

from server.troubles import shortage
from server.webhooks.target import Target, Undelivered, as_address, is_public

TOTAL_S, CONNECT_S = 10.0, 3.0
MAX_ADDRESSES = 4  # of a host that are tried
MAX_HEAD_BYTES = 16 << 10  # of an answer, with all interim answers before it


async def _addresses(target: Target) -> list[str]:
    """The addresses of a host. The lookup has a thread of its own, which nobody waits for at the end: it may take as
    long as the resolver likes. Raises OSError if the system has too little of something."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str] | Exception] = loop.create_future()

    def settle(found: list[str] | Exception) -> None:
        if not answer.done():
            answer.set_result(found)

    def look_up() -> None:
        found: list[str] | Exception = []
        try:
            infos = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(info[4][0]) for info in infos))
        except (OSError, UnicodeError) as error:
            found = error if shortage(error) is not None else []  # a shortage says nothing of the host
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, found)

    threading.Thread(target=look_up, name="webhook resolver", daemon=True).start()
    if isinstance(found := await answer, Exception):
        raise found
    return found


def _permitted(target: Target, addresses: list[str]) -> list[str]:
    """The addresses that may be connected to. Raises Undelivered, which does not tell whether the name exists."""
    parsed = [as_address(address) for address in addresses]
    if not addresses or not (target.trusted or all(each is not None and is_public(each) for each in parsed)):
        raise Undelivered("the host has no public address")
    return addresses[:MAX_ADDRESSES]


class Poster:
    """Sends webhooks."""

    def __init__(self) -> None:
        self._tls = ssl.create_default_context()  # the system's authorities, or those of SSL_CERT_FILE

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> int:
        """The status of the answer, whose body is not read. Raises Undelivered, or OSError or RuntimeError if the
        system has too little of something."""
        try:
            async with asyncio.timeout(TOTAL_S):
                addresses = _permitted(target, await _addresses(target))
                reader, writer = await self._connect(target, addresses)
                try:
                    return await _exchange(reader, writer, target, headers, body)
                finally:
                    writer.transport.abort()
        except TimeoutError:
            raise Undelivered(f"no answer within {TOTAL_S:g} s") from None
        except ssl.SSLError:
            raise Undelivered("no TLS connection with a valid certificate") from None
        except (OSError, h11.RemoteProtocolError) as error:
            if shortage(error) is not None:
                raise
            raise Undelivered("no connection, or one that broke") from None

    async def _connect(self, target: Target, addresses: list[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the first of these addresses that takes one. Raises OSError."""
        tls, name = (self._tls, target.host) if target.scheme == "https" else (None, None)
        for address in addresses[:-1]:
            with suppress(OSError):  # of which TimeoutError is one
                async with asyncio.timeout(CONNECT_S):
                    return await asyncio.open_connection(address, target.port, ssl=tls, server_hostname=name)
        return await asyncio.open_connection(addresses[-1], target.port, ssl=tls, server_hostname=name)


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target, headers: Mapping[str, str], body: bytes
) -> int:
    """Sends the request -> the status of the answer. Raises OSError, h11.RemoteProtocolError."""
    sent = {"Host": target.authority, "Connection": "close", "Content-Length": str(len(body)), **headers}
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method="POST", target=target.path, headers=list(sent.items()))
    for part in (request, h11.Data(body), h11.EndOfMessage()):
        writer.write(http.send(part) or b"")
    await writer.drain()
    left = MAX_HEAD_BYTES
    while not isinstance(event := http.next_event(), h11.Response):
        if event is h11.NEED_DATA and left > 0:
            http.receive_data(data := await reader.read(left))
            left -= len(data)
        elif not isinstance(event, h11.InformationalResponse):
            raise ConnectionError
    return event.status_code
