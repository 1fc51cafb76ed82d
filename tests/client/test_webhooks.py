"""Who receives webhooks believes those alone that the server has sent just now."""

import time

import pytest
from ddpm_client.webhooks import sign, verify

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"id": "5d8f", "status": "succeeded"}'


def headers(**other: str) -> dict[str, str]:
    """Those of a webhook that came just now."""
    now = int(time.time())
    usual = {"Webhook-Id": "5d8f", "Webhook-Timestamp": str(now), "Webhook-Signature": sign(SECRET, "5d8f", now, BODY)}
    return usual | {name.replace("_", "-"): value for name, value in other.items()}


def test_a_signature_is_the_one_that_the_standard_gives_as_its_example() -> None:
    signature = sign(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')

    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_was_signed_just_now_is_believed() -> None:
    rotated = f"v1,AAAA {headers()['Webhook-Signature']} v1a,x"

    assert verify(BODY, headers(), SECRET) == {"id": "5d8f", "status": "succeeded"}
    assert verify(BODY, headers(Webhook_Signature=rotated), SECRET) == {"id": "5d8f", "status": "succeeded"}


@pytest.mark.parametrize(
    ("body", "changed", "secret"),
    [
        (BODY + b" ", {}, SECRET),
        (BODY, {"Webhook_Id": "other"}, SECRET),
        (BODY, {"Webhook_Signature": ""}, SECRET),
        (BODY, {"Webhook_Signature": "v1,ä"}, SECRET),
        (BODY, {}, "whsec_AAAA"),
    ],
)
def test_anything_else_is_not(body: bytes, changed: dict[str, str], secret: str) -> None:
    with pytest.raises(ValueError, match="a wrong one"):
        verify(body, headers(**changed), secret)


@pytest.mark.parametrize("timestamp", ["", "now", "1614265330", "99999999999", "²"])
def test_nor_what_is_old_or_from_the_future(timestamp: str) -> None:
    with pytest.raises(ValueError, match="timestamp"):
        verify(BODY, headers(Webhook_Timestamp=timestamp), SECRET)
