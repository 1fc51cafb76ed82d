"""`AsyncClient`, and what its methods return."""

import asyncio  # threads: import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import cast
from urllib.parse import quote

import httpx
from typing_extensions import Self, Unpack
from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection

from ddpm_client import protocol, transport
from ddpm_client.errors import Cancelled, ClientError, Failed, Response
from ddpm_client.protocol import Animation, Close, Effect, Flow, Receive, Reply, Retry, Send, Sleep, Subscription, T
from ddpm_client.transport import TIMEOUT_S, URL, Address
from ddpm_client.types import ENDS, Document, Event, OnEvent, Picture, Pictures, Request, raise_for, to_html


class AsyncTransport:
    """Performs flows. It has at most one websocket."""

    def __init__(self, address: Address, http: httpx.AsyncClient) -> None:
        self._address, self._http = address, http
        self._socket: Connection | None = None

    async def run(self, flow: Flow[T]) -> T:
        """The result of a flow."""
        reply: Reply | ClientError = None
        while True:
            try:
                effect = flow.throw(reply) if isinstance(reply, ClientError) else flow.send(reply)
            except StopIteration as end:
                return cast(T, end.value)
            try:
                reply = await self._perform(effect)
            except transport.ERRORS as error:
                reply = transport.reply_for(error)

    async def _perform(self, effect: Effect) -> Reply:
        match effect:
            case Send():
                response = await self._http.request(**transport.request_options(effect))
                return Response(response.status_code, dict(response.headers), response.content)
            case Receive():
                if self._socket is None:
                    self._socket = await connect(**self._address.websocket_options(effect)).__aenter__()
                message = self._socket.recv()  # threads: return self._socket.recv(effect.timeout_s)
                return await transport.within(effect.timeout_s, message)  # threads: -
            case Close() if self._socket is not None:
                closing, self._socket = self._socket, None
                await closing.close()
            case Sleep():
                await asyncio.sleep(effect.seconds)  # threads: time.sleep(effect.seconds)
        return None


class AsyncStream(AbstractAsyncContextManager["AsyncStream"]):
    """The events of a job: `async for event in stream`. Leave it by `async with`: a job that `stream()` submitted is
    cancelled if it has not ended by then."""

    def __init__(self, transport: AsyncTransport, subscription: Subscription) -> None:
        self._transport, self._subscription = transport, subscription

    @property
    def job(self) -> str | None:
        """The job's id, once the server has given it one."""
        return self._subscription.job

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while (event := await self._transport.run(self._subscription.next())) is not None:
                yield event
        finally:
            await self.close()

    async def close(self) -> None:
        """Ends the stream, and the job if `stream()` submitted it."""
        await self._transport.run(self._subscription.leave())

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def pictures(self, on_event: OnEvent = lambda event: None) -> Pictures:
        """The job's result, once it has ended; `on_event` is called with each event. Raises Failed, Cancelled."""
        async with self:
            return await self._transport.run(self._subscription.result(on_event))


class AsyncJob:
    """A job on a server. `document` is its last known state, which a notebook displays."""

    def __init__(self, client: "AsyncClient", document: Document) -> None:
        self._client, self.document, self.id = client, document, str(document["id"])
        self._pictures: tuple[Picture, ...] = ()

    @property
    def status(self) -> str:
        """The last known status: queued, running, succeeded, failed or cancelled."""
        return str(self.document["status"])

    async def refresh(self) -> Self:
        """Fetches the job's state, unless it has ended."""
        if self.status not in ENDS:
            self.document = await self._client._run(protocol.fetch(self._client.timeout_s, protocol.job_path(self.id)))
        return self

    async def cancel(self) -> Self:
        """Cancels the job, unless it has ended."""
        self.document = await self._client._run(
            protocol.fetch(self._client.timeout_s, protocol.job_path(self.id), "DELETE")
        )
        return self

    def watch(self, after: int = 0) -> AsyncStream:
        """The job's events from message `after` + 1 on. Leaving the stream does not cancel the job."""
        return self._client.watch(self.id, after)

    async def wait(self) -> Pictures:
        """The job's pictures and frames, once it has ended. Raises Failed, Cancelled."""
        try:
            result = await self.watch().pictures()
        except (Failed, Cancelled):
            await self.refresh()
            raise
        self.document, self._pictures = result.job, result.pictures
        return result

    async def images(self) -> tuple[Picture, ...]:
        """The job's pictures if it has succeeded; none before it ends. Raises Failed, Cancelled."""
        raise_for((await self.refresh()).document)
        if not self._pictures:
            self._pictures = await self._client._run(protocol.images(self._client.timeout_s, self.document))
        return self._pictures

    async def trajectory(self, media: Animation = "gif") -> bytes:
        """The denoising as an animation: gif, apng or webp."""
        return await self._client._run(protocol.trajectory(self._client.timeout_s, self.id, media))

    def __repr__(self) -> str:
        return f"<AsyncJob {self.id}: {self.status}>"

    def _repr_html_(self) -> str:
        # threads: self.document, self._pictures = self._client._run(protocol.look(self.document, self._pictures))
        return to_html(self.document, self._pictures)


class AsyncClient(AbstractAsyncContextManager["AsyncClient"]):
    """A server. timeout_s: how long a call retries while the server is silent or busy. Close it, or use it in a
    `with`; tasks and threads may share it."""

    def __init__(self, url: str = URL, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self.timeout_s = Address(url, key), timeout_s
        self._http = httpx.AsyncClient(**self._address.http_options())

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def generate(self, **request: Unpack[Request]) -> Pictures:
        """Makes pictures; frames too if `frames` asks for them. Cancels the job if left by an exception.

        Raises Refused (Invalid, Busy, ...), Failed, Cancelled, TimedOut, Unreachable.
        """
        with_default: Request = {"frames": None, **request}
        return await self.stream(**with_default).pictures()

    def stream(self, **request: Unpack[Request]) -> AsyncStream:
        """Submits a job and gives its events. Leaving the stream before the end cancels the job."""
        return AsyncStream(AsyncTransport(self._address, self._http), Subscription(self.timeout_s, None, request))

    def watch(self, id: str, after: int = 0) -> AsyncStream:
        """The events of a job from message `after` + 1 on. Leaving the stream does not cancel the job."""
        return AsyncStream(AsyncTransport(self._address, self._http), Subscription(self.timeout_s, id, after=after))

    async def submit(self, **request: Unpack[Request]) -> AsyncJob:
        """Submits a job that runs whether or not it is watched."""
        return AsyncJob(self, await self._run(protocol.submit(Retry(self.timeout_s), request)))

    async def job(self, id: str) -> AsyncJob:
        """A job by its id. Raises NotFound."""
        return AsyncJob(self, await self._run(protocol.fetch(self.timeout_s, protocol.job_path(id))))

    async def jobs(
        self, status: str | None = None, limit: int | None = None, after: str | None = None
    ) -> list[AsyncJob]:
        """Jobs, newest first, from the one that follows the job `after` on."""
        found = await self._run(protocol.fetch(self.timeout_s, "/jobs", status=status, limit=limit, after=after))
        return [AsyncJob(self, document) for document in found["jobs"]]

    async def models(self) -> list[Document]:
        """The models that the server serves."""
        return list((await self._run(protocol.fetch(self.timeout_s, "/models")))["models"])

    async def refused_models(self) -> list[Document]:
        """The `name` and the `reason` of each model that the server was told to serve and refused."""
        return list((await self._run(protocol.fetch(self.timeout_s, "/models")))["refused"])

    async def model(self, name: str) -> Document:
        """One model and its card. Raises NotFound."""
        return await self._run(protocol.fetch(self.timeout_s, f"/models/{quote(name, safe='')}"))

    async def ready(self) -> bool:
        """Whether the server accepts jobs. Never retries."""
        return await self._run(protocol.ready())

    async def _run(self, flow: Flow[T]) -> T:
        return await AsyncTransport(self._address, self._http).run(flow)
