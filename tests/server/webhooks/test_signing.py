"""Signatures are those of the standard, and each tenant has a secret of its own."""

import time

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from server.webhooks.signing import secret_of, signed

MASTER = "a master secret of the server"
BODY = b'{"id": "5d8f", "status": "succeeded"}'


def test_a_signature_is_the_one_that_the_standard_gives_as_its_example() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = signed(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')

    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_library_of_the_standard_verifies_it_with_the_secret_of_that_tenant_alone() -> None:
    mine, theirs = secret_of(MASTER, "a"), secret_of(MASTER, "b")
    headers = signed(mine, "5d8f", int(time.time()), BODY)

    assert Webhook(mine).verify(BODY, headers) == {"id": "5d8f", "status": "succeeded"}
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(theirs).verify(BODY, headers)
