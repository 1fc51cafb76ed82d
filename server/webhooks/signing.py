"""What signs a webhook."""

import base64
import hmac

from ddpm_client.webhooks import PREFIX, sign


def secret_of(master: str, owner: str | None) -> str:
    """The secret of a tenant, derived from DDPM_WEBHOOK_SECRET: no tenant can sign for another."""
    derived = hmac.digest(master.encode(), f"ddpm webhooks {owner or ''}".encode(), "sha256")
    return PREFIX + base64.b64encode(derived).decode()


def signed(secret: str, id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that sign a body. secret: of the tenant. id: the same in every attempt"""
    signature = sign(secret, id, timestamp, body)
    return {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}
