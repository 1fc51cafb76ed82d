"""The Python client of ddpm-server: `Client` for threads and notebooks, `AsyncClient` for asyncio.

    from ddpm_client import Client

    made = Client("http://127.0.0.1:8000").generate(label=7, seed=42, preset="fast")
    made.image.show()

A call retries until the server has been silent for `timeout_s`. Each job carries an idempotency key, so a retry starts
no second job. protocol.py decides what is sent and when it is retried; asyncio.py and threads.py do the I/O.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddpm_client.asyncio import AsyncClient as AsyncClient
    from ddpm_client.asyncio import AsyncJob as AsyncJob
    from ddpm_client.asyncio import AsyncStream as AsyncStream
    from ddpm_client.errors import Busy as Busy
    from ddpm_client.errors import Cancelled as Cancelled
    from ddpm_client.errors import ClientError as ClientError
    from ddpm_client.errors import Denied as Denied
    from ddpm_client.errors import Failed as Failed
    from ddpm_client.errors import Invalid as Invalid
    from ddpm_client.errors import NotFound as NotFound
    from ddpm_client.errors import Refused as Refused
    from ddpm_client.errors import TimedOut as TimedOut
    from ddpm_client.errors import Unreachable as Unreachable
    from ddpm_client.threads import Client as Client
    from ddpm_client.threads import Job as Job
    from ddpm_client.threads import Stream as Stream
    from ddpm_client.types import Document as Document
    from ddpm_client.types import Dropped as Dropped
    from ddpm_client.types import Ended as Ended
    from ddpm_client.types import Event as Event
    from ddpm_client.types import Frame as Frame
    from ddpm_client.types import Frames as Frames
    from ddpm_client.types import Picture as Picture
    from ddpm_client.types import Pictures as Pictures
    from ddpm_client.types import Progress as Progress
    from ddpm_client.types import Queued as Queued
    from ddpm_client.types import Request as Request
    from ddpm_client.types import Restarting as Restarting
    from ddpm_client.types import Resync as Resync
    from ddpm_client.types import Started as Started
else:

    def __getattr__(name):
        """Imports a public name when it is first used, so that errors.py and wire.py can be used without httpx."""
        for module in ("errors", "types", "threads", "asyncio") if name[0].isupper() else ():
            if hasattr(found := import_module(f"ddpm_client.{module}"), name):
                return getattr(found, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
