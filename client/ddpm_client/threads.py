# Generated from asyncio.py by client/unasync.py. Edit asyncio.py and run `python client/unasync.py`.
"""`Client`, and what its methods return."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import cast
from urllib.parse import quote

import httpx
from typing_extensions import Self, Unpack
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from ddpm_client import protocol, transport
from ddpm_client.errors import Cancelled, ClientError, Failed, Response
from ddpm_client.protocol import Animation, Close, Effect, Flow, Receive, Reply, Retry, Send, Sleep, Subscription, T
from ddpm_client.transport import TIMEOUT_S, URL, Address
from ddpm_client.types import ENDS, Document, Event, OnEvent, Picture, Pictures, Request, raise_for, to_html


class Transport:
    """Performs flows. It has at most one websocket."""

    def __init__(self, address: Address, http: httpx.Client) -> None:
        self._address, self._http = address, http
        self._socket: Connection | None = None

    def run(self, flow: Flow[T]) -> T:
        """The result of a flow."""
        reply: Reply | ClientError = None
        while True:
            try:
                effect = flow.throw(reply) if isinstance(reply, ClientError) else flow.send(reply)
            except StopIteration as end:
                return cast(T, end.value)
            try:
                reply = self._perform(effect)
            except transport.ERRORS as error:
                reply = transport.reply_for(error)

    def _perform(self, effect: Effect) -> Reply:
        match effect:
            case Send():
                response = self._http.request(**transport.request_options(effect))
                return Response(response.status_code, dict(response.headers), response.content)
            case Receive():
                if self._socket is None:
                    self._socket = connect(**self._address.websocket_options(effect)).__enter__()
                return self._socket.recv(effect.timeout_s)
            case Close() if self._socket is not None:
                closing, self._socket = self._socket, None
                closing.close()
            case Sleep():
                time.sleep(effect.seconds)
        return None


class Stream(AbstractContextManager["Stream"]):
    """The events of a job: `for event in stream`. Leave it by `with`: a job that `stream()` submitted is
    cancelled if it has not ended by then."""

    def __init__(self, transport: Transport, subscription: Subscription) -> None:
        self._transport, self._subscription = transport, subscription

    @property
    def job(self) -> str | None:
        """The job's id, once the server has given it one."""
        return self._subscription.job

    def __iter__(self) -> Iterator[Event]:
        try:
            while (event := self._transport.run(self._subscription.next())) is not None:
                yield event
        finally:
            self.close()

    def close(self) -> None:
        """Ends the stream, and the job if `stream()` submitted it."""
        self._transport.run(self._subscription.leave())

    def __exit__(self, *error: object) -> None:
        self.close()

    def pictures(self, on_event: OnEvent = lambda event: None) -> Pictures:
        """The job's result, once it has ended; `on_event` is called with each event. Raises Failed, Cancelled."""
        with self:
            return self._transport.run(self._subscription.result(on_event))


class Job:
    """A job on a server. `document` is its last known state, which a notebook displays."""

    def __init__(self, client: "Client", document: Document) -> None:
        self._client, self.document, self.id = client, document, str(document["id"])
        self._pictures: tuple[Picture, ...] = ()

    @property
    def status(self) -> str:
        """The last known status: queued, running, succeeded, failed or cancelled."""
        return str(self.document["status"])

    def refresh(self) -> Self:
        """Fetches the job's state, unless it has ended."""
        if self.status not in ENDS:
            self.document = self._client._run(protocol.fetch(self._client.timeout_s, protocol.job_path(self.id)))
        return self

    def cancel(self) -> Self:
        """Cancels the job, unless it has ended."""
        self.document = self._client._run(protocol.fetch(self._client.timeout_s, protocol.job_path(self.id), "DELETE"))
        return self

    def watch(self, after: int = 0) -> Stream:
        """The job's events from message `after` + 1 on. Leaving the stream does not cancel the job."""
        return self._client.watch(self.id, after)

    def wait(self) -> Pictures:
        """The job's pictures and frames, once it has ended. Raises Failed, Cancelled."""
        try:
            result = self.watch().pictures()
        except (Failed, Cancelled):
            self.refresh()
            raise
        self.document, self._pictures = result.job, result.pictures
        return result

    def images(self) -> tuple[Picture, ...]:
        """The job's pictures if it has succeeded; none before it ends. Raises Failed, Cancelled."""
        raise_for(self.refresh().document)
        if not self._pictures:
            self._pictures = self._client._run(protocol.images(self._client.timeout_s, self.document))
        return self._pictures

    def trajectory(self, media: Animation = "gif") -> bytes:
        """The denoising as an animation: gif, apng or webp."""
        return self._client._run(protocol.trajectory(self._client.timeout_s, self.id, media))

    def __repr__(self) -> str:
        return f"<Job {self.id}: {self.status}>"

    def _repr_html_(self) -> str:
        self.document, self._pictures = self._client._run(protocol.look(self.document, self._pictures))
        return to_html(self.document, self._pictures)


class Client(AbstractContextManager["Client"]):
    """A server. timeout_s: how long a call retries while the server is silent or busy. Close it, or use it in a
    `with`; tasks and threads may share it."""

    def __init__(self, url: str = URL, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self.timeout_s = Address(url, key), timeout_s
        self._http = httpx.Client(**self._address.http_options())

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(self, **request: Unpack[Request]) -> Pictures:
        """Makes pictures; frames too if `frames` asks for them. Cancels the job if left by an exception.

        Raises Refused (Invalid, Busy, ...), Failed, Cancelled, TimedOut, Unreachable.
        """
        with_default: Request = {"frames": None, **request}
        return self.stream(**with_default).pictures()

    def stream(self, **request: Unpack[Request]) -> Stream:
        """Submits a job and gives its events. Leaving the stream before the end cancels the job."""
        return Stream(Transport(self._address, self._http), Subscription(self.timeout_s, None, request))

    def watch(self, id: str, after: int = 0) -> Stream:
        """The events of a job from message `after` + 1 on. Leaving the stream does not cancel the job."""
        return Stream(Transport(self._address, self._http), Subscription(self.timeout_s, id, after=after))

    def submit(self, **request: Unpack[Request]) -> Job:
        """Submits a job that runs whether or not it is watched."""
        return Job(self, self._run(protocol.submit(Retry(self.timeout_s), request)))

    def job(self, id: str) -> Job:
        """A job by its id. Raises NotFound."""
        return Job(self, self._run(protocol.fetch(self.timeout_s, protocol.job_path(id))))

    def jobs(self, status: str | None = None, limit: int | None = None, after: str | None = None) -> list[Job]:
        """Jobs, newest first, from the one that follows the job `after` on."""
        found = self._run(protocol.fetch(self.timeout_s, "/jobs", status=status, limit=limit, after=after))
        return [Job(self, document) for document in found["jobs"]]

    def models(self) -> list[Document]:
        """The models that the server serves."""
        return list(self._run(protocol.fetch(self.timeout_s, "/models"))["models"])

    def refused_models(self) -> list[Document]:
        """The `name` and the `reason` of each model that the server was told to serve and refused."""
        return list(self._run(protocol.fetch(self.timeout_s, "/models"))["refused"])

    def model(self, name: str) -> Document:
        """One model and its card. Raises NotFound."""
        return self._run(protocol.fetch(self.timeout_s, f"/models/{quote(name, safe='')}"))

    def ready(self) -> bool:
        """Whether the server accepts jobs. Never retries."""
        return self._run(protocol.ready())

    def _run(self, flow: Flow[T]) -> T:
        return Transport(self._address, self._http).run(flow)
