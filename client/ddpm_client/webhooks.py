"""Signatures of webhooks (Standard Webhooks 1.0.0), for those who receive them and for the server, which sends them.

document = verify(body, headers, secret)      # secret: from GET /webhooks/secret
"""

import base64
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

PREFIX = "whsec_"


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """The signature of a body."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    digest = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


def verify(body: bytes, headers: Mapping[str, str], secret: str, tolerance_s: float = 300.0) -> dict[str, Any]:
    """The job document in a webhook. body: the bytes as they came. tolerance_s: between the sender's clock and this
    one. Raises ValueError unless the server that has the secret sent it just now."""
    lower = {name.lower(): value for name, value in headers.items()}
    id, timestamp, signatures = (lower.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature"))
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > tolerance_s:
        raise ValueError("the webhook has no timestamp, or one that is too far from now")
    expected = sign(secret, id, int(timestamp), body).encode()
    if not any(hmac.compare_digest(expected, given.encode()) for given in signatures.split(" ")):
        raise ValueError("the webhook has no signature, or a wrong one")
    document: dict[str, Any] = json.loads(body)
    return document
