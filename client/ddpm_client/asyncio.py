"""`AsyncClient`: the same as `Client`, for asyncio."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, TypeVar, Unpack
from urllib.parse import quote

import httpx

from ddpm_client import protocol as flows
from ddpm_client.errors import Cancelled, Failed, Unreachable
from ddpm_client.protocol import Flow, Watching
from ddpm_client.transport import TIMEOUT_S, URL, Address, AsyncLine
from ddpm_client.types import ENDS, Document, Event, Gathering, Picture, Pictures, Request, check, shown

T = TypeVar("T")


class AsyncStream:
    """The events of a job: `async for event in stream`. A job that was asked for by `stream()` is given up when the
    `async with` around it is left before its end."""

    def __init__(self, line: AsyncLine, watching: Watching) -> None:
        self._line, self._watching = line, watching

    @property
    def job(self) -> str | None:
        """The job's id, as soon as it has one."""
        return self._watching.job

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while (event := await self._line.run(self._watching.next())) is not None:
                yield event
        finally:
            await self.close()

    async def close(self) -> None:
        """Watches no longer."""
        await self._line.run(self._watching.leave())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def pictures(self) -> Pictures:
        """All that comes of it, once it has ended. Raises Failed, Cancelled."""
        gathering = Gathering()
        async with self:
            async for event in self:
                if (made := gathering.take(event)) is not None:
                    return made
        raise Unreachable("the stream ended before the job did")


class AsyncJob:
    """A job on a server: where it stands, what has come of it. In a notebook it shows what was last heard of it."""

    def __init__(self, client: "AsyncClient", document: Document) -> None:
        self._client, self.document = client, document
        self._pictures: tuple[Picture, ...] = ()

    @property
    def id(self) -> str:
        """Its name on the server."""
        return str(self.document["id"])

    @property
    def status(self) -> str:
        """queued, running, succeeded, failed or cancelled, when it was last looked at."""
        return str(self.document["status"])

    async def refresh(self) -> Self:
        """Looks at it again, unless it has ended."""
        if self.status not in ENDS:
            self.document = await self._client.ask(flows.job_path(self.id))
        return self

    async def cancel(self) -> Self:
        """Gives it up, if it has not ended."""
        self.document = await self._client.ask(flows.job_path(self.id), "DELETE")
        return self

    def watch(self, after: int = 0) -> AsyncStream:
        """Its events, from its first or from message `after` + 1 on. Leaving cancels nothing."""
        return self._client.watch(self.id, after)

    async def wait(self) -> Pictures:
        """Its pictures and frames, once it has ended. Raises Failed, Cancelled."""
        try:
            made = await self.watch().pictures()
        except (Failed, Cancelled):
            await self.refresh()
            raise
        self.document, self._pictures = made.job, made.pictures
        return made

    async def images(self) -> tuple[Picture, ...]:
        """Its pictures, if it has succeeded; none while it runs. Raises Failed, Cancelled."""
        check((await self.refresh()).document)
        if not self._pictures:
            self._pictures = await self._client.run(flows.images(self._client.timeout_s, self.document))
        return self._pictures

    async def trajectory(self, media: str = "gif") -> bytes:
        """The denoising as an animation: gif, apng or webp."""
        return await self._client.run(flows.trajectory(self._client.timeout_s, self.id, media))

    def __repr__(self) -> str:
        return f"<AsyncJob {self.id}: {self.status}>"

    def _repr_html_(self) -> str:
        return shown(self.document, self._pictures)


class AsyncClient:
    """A server, from an event loop. timeout_s: for how long a call goes on while nothing is heard."""

    def __init__(self, url: str = URL, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self.timeout_s = Address(url, key), timeout_s
        address = self._address
        self._http = httpx.AsyncClient(
            base_url=address.url,
            headers=address.headers,
            limits=address.limits,
            trust_env=address.through_proxies,
        )

    async def close(self) -> None:
        """Lets go of its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def run(self, flow: Flow[T]) -> T:
        """What comes of a flow."""
        return await AsyncLine(self._address, self._http).run(flow)

    async def generate(self, **request: Unpack[Request]) -> Pictures:
        """Pictures; with frames if `frames` says which. Whoever leaves this by an exception gives the job up.

        Raises Refused (Invalid, Busy, ...), Failed, Cancelled, TimedOut, Unreachable.
        """
        asked: Request = {"frames": None, **request}
        return await self.stream(**asked).pictures()

    def stream(self, **request: Unpack[Request]) -> AsyncStream:
        """All that happens while pictures are made. Leaving it before the end gives the job up."""
        return AsyncStream(AsyncLine(self._address, self._http), Watching(self.timeout_s, None, request))

    def watch(self, id: str, after: int = 0) -> AsyncStream:
        """All that happens to a job, from message `after` + 1 on."""
        return AsyncStream(AsyncLine(self._address, self._http), Watching(self.timeout_s, id, after=after))

    async def submit(self, **request: Unpack[Request]) -> AsyncJob:
        """A job that goes on by itself."""
        flow = flows.submit(flows.Patience(self.timeout_s), request, flows.new_key())
        return AsyncJob(self, await self.run(flow))

    async def job(self, id: str) -> AsyncJob:
        """A job that was asked for before. Raises NotFound."""
        return AsyncJob(self, await self.ask(flows.job_path(id)))

    async def jobs(
        self, status: str | None = None, limit: int | None = None, after: str | None = None
    ) -> list[AsyncJob]:
        """Jobs, newest first, older than the one with id `after`."""
        found = await self.run(flows.fetch(self.timeout_s, "GET", "/jobs", status=status, limit=limit, after=after))
        return [AsyncJob(self, document) for document in found["jobs"]]

    async def models(self) -> list[Document]:
        """The models that are served."""
        return list((await self.ask("/models"))["models"])

    async def model(self, name: str) -> Document:
        """One model and its card. Raises NotFound."""
        return await self.ask(f"/models/{quote(name, safe='')}")

    async def ready(self) -> bool:
        """Whether work is taken, asked once."""
        return await self.run(flows.is_ready())

    async def ask(self, path: str, method: str = "GET") -> Document:
        """The document that is answered at a path."""
        document: Document = await self.run(flows.fetch(self.timeout_s, method, path))
        return document
