"""Which hosts and which pages: checks of the headers Host and Origin, CORS, and frames.

The checks keep web pages of other sites from using this server.

A page in a browser can reach a server that only the browser's machine or network can, in two ways. It can send
requests across origins, which shows in the Origin header; or it can point its own domain name to the server's address
(DNS rebinding), which shows in the Host header.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import TypeAlias

from server.errors import BadHost, Forbidden, SettingsError

HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\.?(?::([0-9]{1,5}))?")
PATTERN = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\]")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,;'*?#@]+")
TOKEN = re.compile(rb"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # of which the name of a header consists
PRIVATE = (".localhost", ".local", ".internal")  # domains under which nobody can register a name
MAX_HOST = 255
Headers: TypeAlias = list[tuple[bytes, bytes]]
# All that answers may have, besides what every page may read
EXPOSED = (
    b"X-Job-Id, X-Seed, X-Request-Id, X-Cache, Location, ETag, Preference-Applied, Retry-After, RateLimit, "
    b"RateLimit-Policy, X-Should-Retry, WWW-Authenticate, Allow"
)
METHODS = b"GET, HEAD, POST, DELETE"
MAX_AGE_S = b"7200"  # as long as Chromium keeps the answer to a preflight
ANY = "*"


def _words(text: str) -> list[str]:
    return [word.strip().lower() for word in text.split(",") if word.strip()]


def _origins(setting: str, text: str, *others: str) -> list[str]:
    """The origins in a setting, as browsers write them, and the other words that it may have. Raises SettingsError."""
    words = _words(text)
    if not all(word in others or (ORIGIN.fullmatch(word) and word.isascii()) for word in words):
        form = "origins like https://a.example, other letters as browsers send them (xn--…)"
        raise SettingsError(f"{setting} must be {form}, or {', '.join(others)}")
    default_ports = {"http": ":80", "https": ":443"}  # browsers leave them out
    return [word.removesuffix(default_ports.get(word.partition("://")[0], "/")) for word in words]


def frame_policy(text: str) -> tuple[str, dict[str, str]]:
    """What lets only the pages of DDPM_FRAME_ANCESTORS show one of ours in a frame: a directive of a content security
    policy, and the header for browsers that do not know it. Raises SettingsError."""
    words = _origins("DDPM_FRAME_ANCESTORS", text, "none", "self", ANY) or ["none"]
    if "none" in words and len(words) > 1:
        raise SettingsError("DDPM_FRAME_ANCESTORS: none must stand alone")
    older = {"none": "DENY", "self": "SAMEORIGIN"}.get(" ".join(words))  # it cannot name origins
    sources = " ".join(f"'{word}'" if word in ("none", "self") else word for word in words)
    return f"frame-ancestors {sources}", {"X-Frame-Options": older} if older else {}


def targets(target: bytes, hosts: list[bytes]) -> bool:
    """Whether the target of a request is a path, or a whole URL with the host of its Host header (RFC 9112, 3.2.2); a
    fragment is no part of one."""
    host = target.lower().partition(b"://")[2].partition(b"/")[0]
    return (
        target.isascii()
        and b"#" not in target
        and (target.startswith(b"/") or [host] == [given.lower() for given in hosts])
    )


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
        named = _words(hosts)
        if not all(PATTERN.fullmatch(word) for word in named):
            raise SettingsError("DDPM_ALLOWED_HOSTS must be names like a.example, *.a.example or *, without ports")
        anything = "*" in named or (not named and keys_needed)
        return cls(None if anything else tuple(named), tuple(_origins("DDPM_ALLOWED_ORIGINS", origins, ANY)))

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
        origin = origins[0].decode("latin-1").lower() if len(origins) == 1 else ""
        is_ours = origin.partition("://")[2] == host.decode("latin-1").lower()
        if origins and not is_ours and not self.allows(origins):
            raise Forbidden("pages of that origin may not use this server; DDPM_ALLOWED_ORIGINS can name it")

    def allows(self, origins: list[bytes]) -> bool:
        """Whether these Origin headers are those of a page that may use the server from another site."""
        return ANY in self.origins or (len(origins) == 1 and origins[0].decode("latin-1").lower() in self.origins)

    def cors(self, headers: Headers) -> Headers:
        """What the answer to a request has, so that pages of allowed origins, and no others, may read it."""
        if not self.origins:
            return []
        origins = [value for name, value in headers if name == b"origin"]
        exposed = (b"access-control-expose-headers", EXPOSED)
        if ANY in self.origins:
            return [(b"access-control-allow-origin", b"*"), exposed]
        readable = [(b"access-control-allow-origin", origins[0]), exposed] if self.allows(origins) else []
        return [(b"vary", b"Origin"), *readable]  # also without Origin: a cache must not give that answer to a page

    def preflight(self, headers: Headers) -> Headers | None:
        """What answers the question of a browser whether a page may send a request; None if this is no such question.
        The origin alone decides, so every header may be sent."""
        given = dict(headers)
        if b"access-control-request-method" not in given or not self.allows([v for k, v in headers if k == b"origin"]):
            return None
        wanted = TOKEN.findall(given.get(b"access-control-request-headers", b""))
        network = [(b"access-control-allow-private-network", b"true")]
        return [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-allow-headers", b", ".join(wanted) or b"*"),
            (b"access-control-max-age", MAX_AGE_S),
            (b"vary", b"Access-Control-Request-Headers, Access-Control-Request-Private-Network"),
            *(network if b"access-control-request-private-network" in given else []),
        ]
