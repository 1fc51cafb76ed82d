"""The Python client: `Client` for threads and notebooks, `AsyncClient` for asyncio. It imports no torch.

    from ddpm_client import Client

    made = Client("http://127.0.0.1:8000").generate(seed=207, steps=100)
    made.image.show()

What is decided (when to try again, from which message to go on) is in `client_flows`, once for both; how it is done in
`client_lines`. A call that is answered with "later", or not at all, is made again until nothing was heard for
`timeout_s`; since every job is asked for with a key of its own, it is made once all the same.
"""

from ddpm_client.asyncio import AsyncClient, AsyncJob, AsyncStream
from ddpm_client.errors import (
    Busy,
    Cancelled,
    ClientError,
    Denied,
    Failed,
    Invalid,
    NotFound,
    Refused,
    TimedOut,
    Unreachable,
)
from ddpm_client.threads import Client, Job, Stream
from ddpm_client.types import (
    Document,
    Dropped,
    Ended,
    Event,
    Frame,
    Frames,
    Picture,
    Pictures,
    Progress,
    Queued,
    Request,
    Restarting,
    Resync,
    Started,
)

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncStream",
    "Busy",
    "Cancelled",
    "Client",
    "ClientError",
    "Denied",
    "Document",
    "Dropped",
    "Ended",
    "Event",
    "Failed",
    "Frame",
    "Frames",
    "Invalid",
    "Job",
    "NotFound",
    "Picture",
    "Pictures",
    "Progress",
    "Queued",
    "Refused",
    "Request",
    "Restarting",
    "Resync",
    "Started",
    "Stream",
    "TimedOut",
    "Unreachable",
]
