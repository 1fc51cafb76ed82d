"""Where a webhook may go: the URLs that are accepted, and the addresses that are connected to.

A caller chooses the URL, and the server's network may reach what the caller cannot (server-side request forgery). So a
URL is https, and each address of its host is public, unless DDPM_WEBHOOK_HOSTS names the host.
"""

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache

from server.errors import Invalid
from server.settings import Settings

MAX_CHARACTERS = 2048
LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
URL = re.compile(
    rf"((?i:https?))://({LABEL}(?:\.{LABEL})*|\[[0-9A-Fa-f:.]{{2,45}}\])(?::([0-9]{{1,5}}))?"
    r"([/?](?:[A-Za-z0-9._~:/?@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)?"
)
NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label that resolvers read as a part of an IPv4 address
PRIVATE = (".localhost", ".local", ".internal")  # domains under which nobody can register a name
PORTS = {"https": 443, "http": 80}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # the last 32 bits are an IPv4 address
UNICAST = ipaddress.IPv6Network("2000::/3")
SPECIAL: list[
    ipaddress.IPv4Network | ipaddress.IPv6Network
] = [  # what `is_global` lets pass in some Python: protocols, 6to4, documentation, Teredo
    *map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")),
    *map(ipaddress.IPv6Network, ("2001::/23", "2002::/16", "3fff::/20")),
]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
ILL_FORMED = (
    f"webhook must be a URL like https://host.example/path of at most {MAX_CHARACTERS} characters, without user, "
    "password and fragment, other characters percent-encoded"
)
NOT_PUBLIC = "webhook must name a host with a public address, in the usual notation; DDPM_WEBHOOK_HOSTS can name others"


class Undelivered(Exception):
    """A webhook has had no answer. The message, one of few, says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """An accepted URL in its parts. host: in lower case; an IPv6 address without brackets"""

    scheme: str
    host: str
    port: int
    path: str  # with the query
    trusted: bool  # DDPM_WEBHOOK_HOSTS names the host: any address will do

    @property
    def authority(self) -> str:
        """What the header Host says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, for unicast, and leads to no other address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in UNICAST:
            return False
    special = any(address in network for network in SPECIAL if network.version == address.version)
    return address.is_global and not address.is_multicast and not special


def as_address(host: str) -> Address | None:
    """The address that a host is, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _normal(host: str) -> str:
    """A host in the one form in which hosts are compared."""
    host = host.lower().strip("[]")
    return str(as_address(host) or host)


@lru_cache(8)
def _trusted(hosts: str) -> frozenset[str]:
    return frozenset(_normal(host.strip()) for host in hosts.split(",") if host.strip())


def parse_url(url: str, hosts: str) -> Target:
    """The parts of a webhook's URL. hosts: DDPM_WEBHOOK_HOSTS. Raises Invalid."""
    match = URL.fullmatch(url) if len(url) <= MAX_CHARACTERS else None
    if match is None or len(match[2]) > 253 or not 1 <= int(match[3] or 1) <= 65535:
        raise Invalid(("webhook", ILL_FORMED))
    scheme, host = match[1].lower(), _normal(match[2])
    address, last = as_address(host), host.rpartition(".")[2]
    if address is None and (":" in host or NUMERIC.fullmatch(last)):
        raise Invalid(("webhook", NOT_PUBLIC))
    trusted = host in _trusted(hosts)
    if scheme != "https" and not trusted:
        raise Invalid(("webhook", "webhook must begin with https://; DDPM_WEBHOOK_HOSTS can name hosts for http"))
    if address is None:
        public = "." in host and not host.endswith(PRIVATE)
    else:
        public = is_public(address)
    if not public and not trusted:
        raise Invalid(("webhook", NOT_PUBLIC))
    path = match[4] or "/"
    return Target(scheme, host, int(match[3] or PORTS[scheme]), path if path[0] == "/" else f"/{path}", trusted)


def accepted(url: str | None, settings: Settings) -> str | None:
    """The URL of a request's webhook, if it is accepted. Raises Invalid."""
    if url is None:
        return None
    if not settings.webhook_secret.get_secret_value():
        raise Invalid(("webhook", "webhook must be left out: this server sends none, DDPM_WEBHOOK_SECRET is not set"))
    parse_url(url, settings.webhook_hosts)
    return url
