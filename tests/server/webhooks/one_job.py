"""A server in a process of its own, with one job that has a webhook: `python -m … WEIGHTS DATA URL`. It never ends."""

import sys
import threading
from pathlib import Path

from pydantic import SecretStr
from starlette.testclient import TestClient

from server.settings import Settings
from server.web.app import create_app
from tests.server.fakes import FakeBackend

SECRET = "a secret of more than 24 characters"


def main(weights: str, data: str, url: str) -> None:
    """Waits until it is killed."""
    secret = SecretStr(SECRET)
    settings = Settings(weights=weights, data_dir=Path(data), webhook_secret=secret, webhook_hosts="localhost")
    with TestClient(create_app(settings, FakeBackend())) as client:
        client.post("/generate", json={"webhook": url}, headers={"prefer": "respond-async"})
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
