"""One POST to a webhook: to an address that was checked, without redirects, proxies and cookies, in bounded time."""

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress

import httpx

from server.webhooks.target import Target, Undelivered, as_address, is_public

TOTAL_S, CONNECT_S = 10.0, 3.0
MAX_ADDRESSES = 4  # of a host that are tried


async def _addresses(target: Target) -> list[str]:
    """The addresses of a host. The lookup has a thread of its own, which nobody waits for at the end: it may take as
    long as the resolver likes."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def settle(found: list[str]) -> None:
        if not answer.done():
            answer.set_result(found)

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, list(dict.fromkeys(str(each[4][0]) for each in found)))

    threading.Thread(target=look_up, name="webhook resolver", daemon=True).start()
    return await answer


def _permitted(target: Target, addresses: list[str]) -> list[str]:
    """The addresses that may be connected to. Raises Undelivered, which does not tell whether the name exists."""
    parsed = [as_address(address) for address in addresses]
    if not addresses or not (target.trusted or all(each is not None and is_public(each) for each in parsed)):
        raise Undelivered("the host has no public address")
    return addresses[:MAX_ADDRESSES]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Poster:
    """Sends webhooks."""

    def __init__(self) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs URLs, with what is secret in them
        self._tls = httpx.create_ssl_context()  # certifi's authorities, or those of SSL_CERT_FILE
        httpx.AsyncHTTPTransport(verify=self._tls)  # imports all that a delivery needs

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> int:
        """The status of the answer, whose body is not read. Raises Undelivered."""
        try:
            async with asyncio.timeout(TOTAL_S):
                addresses = _permitted(target, await _addresses(target))
                for address in addresses[:-1]:
                    with suppress(httpx.ConnectError, httpx.ConnectTimeout):
                        return await self._post_to(address, target, headers, body)
                return await self._post_to(addresses[-1], target, headers, body)
        except (TimeoutError, httpx.TimeoutException):
            raise Undelivered(f"no answer within {TOTAL_S:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            if any(isinstance(cause, ssl.SSLError) for cause in _causes(error)):
                raise Undelivered("no TLS connection with a valid certificate") from None
            raise Undelivered("no connection, or one that broke") from None

    async def _post_to(self, address: str, target: Target, headers: Mapping[str, str], body: bytes) -> int:
        """Connects to this address and to no other. A new client each time has no connection and no cookie of another
        host that has the same address."""
        place = f"[{address}]" if ":" in address else address
        async with (
            httpx.AsyncClient(
                verify=self._tls, trust_env=False, timeout=httpx.Timeout(None, connect=CONNECT_S)
            ) as http,
            http.stream(
                "POST",
                f"{target.scheme}://{place}:{target.port}/",
                content=body,
                headers={"Host": target.authority, "Connection": "close", **headers},
                follow_redirects=False,
                extensions={"sni_hostname": target.host, "target": target.path.encode()},
            ) as answer,
        ):
            return answer.status_code
