"""Which Host and Origin headers are answered: what stands between this server and other people's web pages.

A browser shows every page to whoever its name leads to, and sends along where a request comes from. So a page of a
stranger may reach a server that only its own machine or network can, in two ways: by sending requests across origins,
which the Origin header tells, or by changing what its own name leads to (DNS rebinding), which the Host header tells.
"""

import ipaddress
import re
from dataclasses import dataclass

from server.errors import BadHost, Forbidden, SettingsError

HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\.?(?::([0-9]{1,5}))?")
PATTERN = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\]")
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,]+")
NOBODYS = (".localhost", ".local", ".internal")  # names under which no stranger can have one
LONGEST = 255


def _words(text: str) -> list[str]:
    return [word.strip().lower() for word in text.split(",") if word.strip()]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Rules:
    """Whom this server answers for, and to whose pages. None: every host."""

    hosts: tuple[str, ...] | None
    origins: tuple[str, ...]

    @classmethod
    def read(cls, hosts: str, origins: str, keys_needed: bool) -> "Rules":
        """The rules that settings spell out. Raises SettingsError.

        If no host is named, and no key is needed, those are answered for which no stranger can make a name lead to:
        addresses, names without a dot, and names under .localhost, .local and .internal.
        """
        named, pages = _words(hosts), _words(origins)
        if not all(PATTERN.fullmatch(word) for word in named):
            raise SettingsError("DDPM_ALLOWED_HOSTS must be names like a.example, *.a.example or *, without ports")
        if not all(ORIGIN.fullmatch(word) for word in pages):
            raise SettingsError("DDPM_ALLOWED_ORIGINS must be origins like https://a.example or *")
        anything = "*" in named or (not named and keys_needed)
        return cls(None if anything else tuple(named), tuple(pages))

    def check_host(self, given: list[bytes]) -> None:
        """Raises BadHost unless there is one Host header and this server answers for it."""
        text = given[0].decode("latin-1") if len(given) == 1 and len(given[0]) <= LONGEST else ""
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
        return "." not in name or _is_address(name) or name.endswith(NOBODYS)

    def check_origin(self, origins: list[bytes], host: bytes) -> None:
        """Raises Forbidden if the page of a stranger sent this. Without an Origin header no page did."""
        if not origins or "*" in self.origins:
            return
        origin = origins[0].decode("latin-1").lower() if len(origins) == 1 else ""
        if origin not in self.origins and origin.partition("://")[2] != host.decode("latin-1").lower():
            raise Forbidden("pages of that origin may not use this server; DDPM_ALLOWED_ORIGINS can name it")
