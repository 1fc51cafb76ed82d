"""Which server a command asks: the one at --url, or one of its own, here, for as long as the command lasts.

The private one is the whole server: the same engine, settings and bytes, on a port of the loopback interface, behind a
key that nobody else has, with a folder for its data that is gone afterwards. So there is one way to make a picture.
"""

import os
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm_client import Client

from server.cli.progress import Bar
from server.errors import EXIT_FAILED, EngineFailed, ServerError, SettingsError

LOADING_S, ENDING_S = 600.0, 30.0  # that an engine may take


def add_arguments(parser: ArgumentParser) -> None:
    """Where the server is."""
    where = parser.add_argument_group("server")
    where.add_argument("--url", help="of a running server (default: none; one is started here, from DDPM_* settings)")
    where.add_argument("--key-file", type=Path, metavar="FILE", help="holds the API key for it (default: no key)")
    where.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds without a word until it is given up (60)"
    )


@contextmanager
def server(given: Namespace, bar: Bar) -> Iterator[Client]:
    """A server that these arguments name. Raises SettingsError, ModelRefused, EngineFailed, ClientError."""
    if given.url is None:
        with _private_server(bar) as address, Client(*address, timeout_s=given.timeout) as client:
            yield client
        return
    try:
        key = given.key_file.read_text("latin-1") if given.key_file is not None else None  # which reads any bytes
        client = Client(given.url, key, given.timeout)
    except OSError as error:
        raise SettingsError(f"--key-file could not be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(str(error)) from None
    with client:
        yield client


@contextmanager
def _private_server(bar: Bar) -> Iterator[tuple[str, str]]:
    """Its URL and its key."""
    import uvicorn

    from server import logs
    from server.cli.serve import listen
    from server.settings import Settings
    from server.web import auth
    from server.web.app import create_app
    from server.web.protocol import Config, Limits

    key, line = auth.make_key("here")
    failures: list[ServerError] = []
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder, listen("127.0.0.1", 0) as listening:
        keys = Path(folder) / "keys"
        keys.write_text(line)
        ours = {"data_dir": Path(folder) / "data", "api_keys": str(keys), "log_level": "error", "drain_s": 0.0}
        settings = Settings.read(os.environ, {**ours, "metrics_key": "", "allowed_hosts": "", "allowed_origins": ""})
        logs.configure(settings.log_level)
        app = create_app(settings, on_failed=failures.append)
        limits = Limits(
            connections=64,
            body_bytes=settings.max_body_bytes,
            request_s=settings.request_s,
            refused=lambda code: None,
        )
        config = Config(app, limits, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        served = uvicorn.Server(config)
        thread = threading.Thread(target=served.run, args=([listening],), name="private server", daemon=True)
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            _await(url, key, thread, failures, bar)
            yield url, key
        finally:
            served.should_exit = True
            thread.join(ENDING_S)


def _await(url: str, key: str, thread: threading.Thread, failures: list[ServerError], bar: Bar) -> None:
    """Comes back when the server takes work. Raises what has failed."""
    began = time.monotonic()
    with Client(url, key) as client:
        while not client.ready():
            passed_s = time.monotonic() - began
            if failures:
                raise failures[0]
            if not thread.is_alive() or passed_s > LOADING_S:
                raise EngineFailed("the engine could not be started", EXIT_FAILED)
            bar.say(f"loading, {passed_s:.0f} s")
            time.sleep(0.05)
