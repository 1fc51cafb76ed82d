"""SHA-256 of bytes and files, as hexadecimal digits."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def short_digest(*parts: bytes) -> str:
    """The first 8 digits of the SHA-256 of these bytes, one after another."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


def text_digest(text: str) -> str:
    """The 64 digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The 64 digits of a file's SHA-256. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_digest(digests: Iterable[str]) -> str:
    """The content address of several files, given the SHA-256 of each, in order."""
    return f"sha256:{hashlib.sha256(b''.join(map(bytes.fromhex, digests))).hexdigest()}"
