"""Checks of the headers Host and Origin: they keep web pages of other sites from using this server.

A page in a browser can reach a server that only the browser's machine or network can, in two ways. It can send
requests across origins, which shows in the Origin header; or it can point its own domain name to the server's address
(DNS rebinding), which shows in the Host header.
"""

import ipaddress
import re
from dataclasses import dataclass

from server.errors import BadHost, Forbidden, SettingsError

HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\.?(?::([0-9]{1,5}))?")
PATTERN = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\]")
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,]+")
PRIVATE = (".localhost", ".local", ".internal")  # domains under which nobody can register a name
MAX_HOST = 255


def _words(text: str) -> list[str]:
    return [word.strip().lower() for word in text.split(",") if word.strip()]


def targets(target: bytes, hosts: list[bytes]) -> bool:
    """Whether the target of a request is a path, or a whole URL with the host of its Host header (RFC 9112, 3.2.2)."""
    host = target.lower().partition(b"://")[2].partition(b"/")[0]
    return target.isascii() and (target.startswith(b"/") or [host] == [given.lower() for given in hosts])


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Rules:
    """The hosts that the server answers for (None: all), and the origins of other sites that may use it."""

    hosts: tuple[str, ...] | None
    origins: tuple[str, ...]

    @classmethod
    def read(cls, hosts: str, origins: str, keys_needed: bool) -> "Rules":
        """The rules of the settings. Raises SettingsError.

        Without named hosts and keys, it answers for hosts that an attacker cannot register: addresses, names without
        a dot, and names under .localhost, .local and .internal.
        """
        named, sites = _words(hosts), _words(origins)
        if not all(PATTERN.fullmatch(word) for word in named):
            raise SettingsError("DDPM_ALLOWED_HOSTS must be names like a.example, *.a.example or *, without ports")
        if not all(ORIGIN.fullmatch(word) for word in sites):
            raise SettingsError("DDPM_ALLOWED_ORIGINS must be origins like https://a.example or *")
        anything = "*" in named or (not named and keys_needed)
        return cls(None if anything else tuple(named), tuple(sites))

    def check_host(self, given: list[bytes]) -> None:
        """Raises BadHost unless there is one Host header, of a host that this server answers for."""
        text = given[0].decode("latin-1") if len(given) == 1 and len(given[0]) <= MAX_HOST else ""
        match = HOST.fullmatch(text)
        if match is None or int(match[2] or 0) > 65535:
            raise BadHost("a request needs one Host header that is a name or an address, and perhaps a port")
        if not self._answers_for(match[1].lower()):
            raise BadHost("this server does not answer for that host; DDPM_ALLOWED_HOSTS can name it")

    def _answers_for(self, name: str) -> bool:
        if self.hosts is None:
            return True
        if self.hosts:
            return any(name == host or (host[0] == "*" and name.endswith(host[1:])) for host in self.hosts)
        return "." not in name or _is_address(name) or name.endswith(PRIVATE)

    def check_origin(self, origins: list[bytes], host: bytes) -> None:
        """Raises Forbidden if a page of another site sent the request. Requests without Origin come from no page."""
        if not origins or "*" in self.origins:
            return
        origin = origins[0].decode("latin-1").lower() if len(origins) == 1 else ""
        if origin not in self.origins and origin.partition("://")[2] != host.decode("latin-1").lower():
            raise Forbidden("pages of that origin may not use this server; DDPM_ALLOWED_ORIGINS can name it")
