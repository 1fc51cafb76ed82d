"""What signs a webhook, as Standard Webhooks 1.0.0 has it (https://www.standardwebhooks.com/)."""

import base64
import hmac

PREFIX = "whsec_"


def secret_of(master: str, owner: str | None) -> str:
    """The secret of a tenant, derived from DDPM_WEBHOOK_SECRET: no tenant can sign for another."""
    derived = hmac.digest(master.encode(), f"ddpm webhooks {owner or ''}".encode(), "sha256")
    return PREFIX + base64.b64encode(derived).decode()


def signed(secret: str, id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that sign a body. secret: of the tenant. id: the same in every attempt"""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    digest = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, "sha256")
    signature = f"v1,{base64.b64encode(digest).decode()}"
    return {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}
