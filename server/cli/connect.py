"""The server that a command talks to: the one at --url, or a private one for as long as the command runs.

The private one is the whole server, with the same engine, settings and bytes. It listens on the loopback interface,
accepts one key that only this command has, and stores its data in a temporary folder.
"""

import os
import tempfile
import threading
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddpm_client import Client
from tqdm import tqdm

from server.errors import EXIT_FAILED, EngineFailed, ServerError, SettingsError

MOST_S = 1e9  # to wait: sockets take a little more
MOST_KEY = 4096  # characters that are read of the file of a key
CONNECTIONS = 64  # of the one command that a private server is for
STARTUP_S, SHUTDOWN_S = 600.0, 30.0  # for a private server with its engine


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags that choose the server."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", help="a running server (default: start one here, from the DDPM_* settings)")
    group.add_argument("--key-file", type=Path, metavar="FILE", help="file with the API key (default: no key)")
    group.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="seconds to wait in silence (60)")


def _seconds(text: str) -> float:
    """A time that can be waited for. Raises ArgumentTypeError."""
    with suppress(ValueError):
        if 0 < (seconds := float(text)) <= MOST_S:
            return seconds
    raise ArgumentTypeError(f"must be a positive number of seconds, at most {MOST_S:g}")


def _read_key(path: Path) -> str:
    """The key in a file. Raises OSError."""
    with path.open(encoding="latin-1") as file:  # never a decoding error
        return file.read(MOST_KEY)


@contextmanager
def server(given: Namespace, bar: "tqdm[None]") -> Iterator[Client]:
    """A client of the server that the flags name. Raises SettingsError, ModelRefused, EngineFailed, ClientError."""
    if given.url is None:
        with _private_server(given.timeout, bar) as client:
            yield client
        return
    try:
        key = _read_key(given.key_file) if given.key_file is not None else None
        client = Client(given.url, key, given.timeout)
    except OSError as error:
        raise SettingsError(f"--key-file could not be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(str(error)) from None
    with client:
        yield client


@contextmanager
def _private_server(timeout_s: float, bar: "tqdm[None]") -> Iterator[Client]:
    import uvicorn

    from server import logs
    from server.cli.serve import configure, listen
    from server.settings import Settings
    from server.web import auth
    from server.web.app import create_app

    key, line = auth.make_key("here")
    failures: list[ServerError] = []
    with tempfile.TemporaryDirectory(prefix="ddpm-") as folder, listen("127.0.0.1", 0) as listening:
        keys = Path(folder) / "keys"
        keys.write_text(line)
        ours = {"data_dir": Path(folder) / "data", "api_keys": str(keys), "log_level": "error", "drain_s": 0.0}
        settings = Settings.read(os.environ, {**ours, "metrics_key": "", "allowed_hosts": "", "allowed_origins": ""})
        logs.configure(settings.log_level)
        app = create_app(settings, on_failed=failures.append)
        private = uvicorn.Server(configure(app, settings, CONNECTIONS))
        thread = threading.Thread(target=private.run, args=([listening],), name="private server", daemon=True)
        thread.start()
        try:
            with Client(f"http://127.0.0.1:{listening.getsockname()[1]}", key, timeout_s) as client:
                _wait_until_ready(client, thread, failures, bar)
                yield client
        finally:
            private.should_exit = True
            thread.join(SHUTDOWN_S)


def _wait_until_ready(client: Client, thread: threading.Thread, failures: list[ServerError], bar: "tqdm[None]") -> None:
    """Returns when the server accepts jobs. Raises the failure of its engine."""
    began = time.monotonic()
    while not client.ready():
        passed_s = time.monotonic() - began
        if failures:
            raise failures[0]
        if not thread.is_alive() or passed_s > STARTUP_S:
            raise EngineFailed("the engine could not be started", EXIT_FAILED)
        bar.set_description_str(f"loading, {passed_s:.0f} s")
        time.sleep(0.05)
