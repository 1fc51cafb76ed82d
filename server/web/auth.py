"""API keys, of which the server has only hashes, and the tenants they belong to.

A file of keys has one line `name:sha256[:quota]` per key: the tenant's name, the SHA-256 of the key in hex, and the
image-steps that the tenant may request per minute. A name may have two lines while its key is being changed. The file
is read again when it has changed.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.errors import reason
from server.errors import SettingsError, Unauthenticated
from server.jobs.tenants import Quota, Tenant
from server.settings import MAX_KEY_BYTES

logger = logging.getLogger(__name__)
LOOK_S = 1.0  # between two looks at whether the file of keys has changed
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LINE = re.compile(rf"({NAME.pattern}):([0-9a-f]{{64}})(?::([1-9][0-9]{{0,14}}))?")
MAX_FILE_BYTES = 1 << 20
SUBPROTOCOL = "ddpm.key."  # prefix of the subprotocol in which a browser's websocket sends its key
SAME_FOR_ALL = "a valid key is needed, as Authorization: Bearer KEY"  # for a missing, an ill-formed and a wrong key


def hash_of_key(key: bytes) -> bytes:
    """The hash of a key. Keys are random, so a fast hash is enough."""
    return hashlib.sha256(key).digest()


def make_key(name: str, quota: int | None = None) -> tuple[str, str]:
    """A new key and its line for the file of keys. Raises SettingsError."""
    key = f"ddpm_{secrets.token_urlsafe(32)}"
    line = f"{name}:{hash_of_key(key.encode()).hex()}" + (f":{quota}" if quota is not None else "")
    if not LINE.fullmatch(line):
        raise SettingsError(f"a key's name must be {NAME.pattern}, its quota a positive number of image-steps")
    return key, line


def _open(path: str, flags: int) -> int:
    """Opens a file without a wait for what may never come, such as the other end of a named pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


class Keyring:
    """The keys that are accepted."""

    def __init__(self, owners: Iterable[tuple[bytes, Tenant]]) -> None:
        self._owners = tuple(owners)

    def owner(self, key: bytes | None) -> Tenant:
        """The tenant of a key. Raises Unauthenticated. It compares with every key, so that its time reveals nothing."""
        given, found = hash_of_key((key or b"")[:MAX_KEY_BYTES]), None
        for digest, owner in self._owners:
            if hmac.compare_digest(given, digest):
                found = owner
        if found is None or key is None:
            raise Unauthenticated(SAME_FOR_ALL)
        return found

    @classmethod
    def read(cls, path: Path) -> "Keyring":
        """The keys of a file. Raises SettingsError, with a message that repeats nothing of the file."""
        try:
            with open(path, "rb", opener=_open) as file:
                text = file.read(MAX_FILE_BYTES + 1) or b""
        except OSError as error:
            raise SettingsError(f"DDPM_API_KEYS: the file could not be read: {reason(error)}") from None
        if len(text) > MAX_FILE_BYTES:
            raise SettingsError(f"DDPM_API_KEYS: the file must have at most {MAX_FILE_BYTES} bytes")
        owners: dict[str, Tenant] = {}
        keys: dict[bytes, Tenant] = {}
        for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            if (match := LINE.fullmatch(line.strip())) is None:
                raise SettingsError(f"DDPM_API_KEYS: line {number} must be name:sha256 or name:sha256:quota")
            name, digest, quota = match.groups()
            if bytes.fromhex(digest) == hash_of_key(b""):
                raise SettingsError(f"DDPM_API_KEYS: line {number} has the hash of an empty key")
            owner = owners.setdefault(name, Tenant(name, Quota(int(quota)) if quota else None))
            if (owner.quota.capacity if owner.quota else None) != (int(quota) if quota else None):
                raise SettingsError(f"DDPM_API_KEYS: line {number} gives its owner another quota than before")
            if keys.setdefault(bytes.fromhex(digest), owner) is not owner:
                raise SettingsError(f"DDPM_API_KEYS: line {number} has the key of another owner")
        if not keys:
            raise SettingsError("DDPM_API_KEYS: the file holds no key, so nobody could come in")
        return cls(keys.items())

    def continue_from(self, before: "Keyring") -> None:
        """Owners who are in both keep what they have used of their quotas."""
        quotas = {owner.name: owner.quota for _, owner in before._owners}
        for owner in {owner for _, owner in self._owners}:
            if owner.quota is not None and (used := quotas.get(owner.name)) is not None:
                owner.quota.continue_from(used)

    @classmethod
    def of_one(cls, key: str) -> "Keyring":
        """A keyring of a single key."""
        return cls([(hash_of_key(key.encode()), Tenant("metrics"))])


class KeyFile:
    """The keys of a file that may change while the server runs."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises SettingsError."""
        self._path, self._version = path, _version(path)
        self._keyring = Keyring.read(path)
        self._told: object = None  # the last mistake that was logged, and the version of the file that has it

    def owner(self, key: bytes | None) -> Tenant:
        """The tenant of a key. Raises Unauthenticated."""
        return self._keyring.owner(key)

    async def follow(self) -> None:
        """Reads the file whenever it has changed, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Reads the file if it has changed: all of its keys are valid from then on and no others, or, if there is a
        mistake in it or it cannot be read, the keys from before, and the next look reads it again."""
        version = await asyncio.to_thread(_version, self._path)
        if version == self._version:
            return
        try:
            keyring = await asyncio.to_thread(Keyring.read, self._path)
        except SettingsError as error:
            told, self._told = self._told, (version, str(error))
            if told != self._told:
                logger.error("the API keys stay as they were", extra={"reason": str(error)})
            return
        keyring.continue_from(self._keyring)
        self._version = version  # of before it was read: a change meanwhile is seen at the next look
        self._keyring = keyring
        logger.info("the API keys were read again")


def _version(path: Path) -> tuple[int, ...] | None:
    """What differs when a file was written or replaced, also behind a symbolic link; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def offered(headers: Sequence[tuple[bytes, bytes]], subprotocols: Sequence[str] = ()) -> bytes | None:
    """The key of a request: from its Authorization header, or from a subprotocol of its websocket."""
    given = [value for name, value in headers if name == b"authorization"]
    if given:
        scheme, _, key = given[0].strip().partition(b" ")
        return key.strip() if len(given) == 1 and scheme.lower() == b"bearer" else None
    for word in subprotocols:
        if word.startswith(SUBPROTOCOL):
            return _decoded(word.removeprefix(SUBPROTOCOL))
    return None


def _decoded(word: str) -> bytes | None:
    try:
        return base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
