"""`Client`: a server, for threads, scripts and notebooks."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeVar, Unpack
from urllib.parse import quote

import httpx

from ddpm_client import protocol as flows
from ddpm_client.errors import Cancelled, ClientError, Failed, Unreachable
from ddpm_client.protocol import Flow, Watching
from ddpm_client.transport import TIMEOUT_S, URL, Address, Line
from ddpm_client.types import ENDS, Document, Event, Gathering, Picture, Pictures, Request, check, shown

T = TypeVar("T")
LOOK_S = 2.0  # that a job may take to show itself in a notebook


class Stream:
    """The events of a job: `for event in stream`. A job that was asked for by `stream()` is given up when the loop, or
    the `with` around it, is left before its end."""

    def __init__(self, line: Line, watching: Watching) -> None:
        self._line, self._watching = line, watching

    @property
    def job(self) -> str | None:
        """The job's id, as soon as it has one."""
        return self._watching.job

    def __iter__(self) -> Iterator[Event]:
        try:
            while (event := self._line.run(self._watching.next())) is not None:
                yield event
        finally:
            self.close()

    def close(self) -> None:
        """Watches no longer."""
        self._line.run(self._watching.leave())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def pictures(self) -> Pictures:
        """All that comes of it, once it has ended. Raises Failed, Cancelled."""
        gathering = Gathering()
        with self:
            for event in self:
                if (made := gathering.take(event)) is not None:
                    return made
        raise Unreachable("the stream ended before the job did")


class Job:
    """A job on a server: where it stands, what has come of it. In a notebook it shows itself."""

    def __init__(self, client: "Client", document: Document) -> None:
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

    def refresh(self) -> Self:
        """Looks at it again, unless it has ended."""
        if self.status not in ENDS:
            self.document = self._client.ask(flows.job_path(self.id))
        return self

    def cancel(self) -> Self:
        """Gives it up, if it has not ended."""
        self.document = self._client.ask(flows.job_path(self.id), "DELETE")
        return self

    def watch(self, after: int = 0) -> Stream:
        """Its events, from its first or from message `after` + 1 on. Leaving cancels nothing."""
        return self._client.watch(self.id, after)

    def wait(self) -> Pictures:
        """Its pictures and frames, once it has ended. Raises Failed, Cancelled."""
        try:
            made = self.watch().pictures()
        except (Failed, Cancelled):
            self.refresh()
            raise
        self.document, self._pictures = made.job, made.pictures
        return made

    def images(self) -> tuple[Picture, ...]:
        """Its pictures, if it has succeeded; none while it runs. Raises Failed, Cancelled."""
        check(self.refresh().document)
        if not self._pictures:
            self._pictures = self._client.run(flows.images(self._client.timeout_s, self.document))
        return self._pictures

    def trajectory(self, media: str = "gif") -> bytes:
        """The denoising as an animation: gif, apng or webp."""
        return self._client.run(flows.trajectory(self._client.timeout_s, self.id, media))

    def __repr__(self) -> str:
        return f"<Job {self.id}: {self.status}>"

    def _repr_html_(self) -> str:
        try:
            if self.status not in ENDS:
                self.document = self._client.run(flows.fetch(LOOK_S, "GET", flows.job_path(self.id)))
            if self.status == "succeeded" and not self._pictures:
                self._pictures = self._client.run(flows.images(LOOK_S, self.document))
        except ClientError:  # a notebook shows what was last heard, and does not wait for more
            pass
        return shown(self.document, self._pictures)


class Client:
    """A server, from here. Threads may share it.

    timeout_s: for how long a call goes on while nothing is heard: no answer, no event, nothing but "later".
    """

    def __init__(self, url: str = URL, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._address, self.timeout_s = Address(url, key), timeout_s
        address = self._address
        self._http = httpx.Client(
            base_url=address.url,
            headers=address.headers,
            limits=address.limits,
            trust_env=address.through_proxies,
        )

    def close(self) -> None:
        """Lets go of its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, flow: Flow[T]) -> T:
        """What comes of a flow."""
        return Line(self._address, self._http).run(flow)

    def generate(self, **request: Unpack[Request]) -> Pictures:
        """Pictures; with frames if `frames` says which. Whoever leaves this by an exception gives the job up.

        Raises Refused (Invalid, Busy, ...), Failed, Cancelled, TimedOut, Unreachable.
        """
        asked: Request = {"frames": None, **request}
        return self.stream(**asked).pictures()

    def stream(self, **request: Unpack[Request]) -> Stream:
        """All that happens while pictures are made. Leaving it before the end gives the job up."""
        return Stream(Line(self._address, self._http), Watching(self.timeout_s, None, request))

    def watch(self, id: str, after: int = 0) -> Stream:
        """All that happens to a job, from message `after` + 1 on."""
        return Stream(Line(self._address, self._http), Watching(self.timeout_s, id, after=after))

    def submit(self, **request: Unpack[Request]) -> Job:
        """A job that goes on by itself."""
        return Job(self, self.run(flows.submit(flows.Patience(self.timeout_s), request, flows.new_key())))

    def job(self, id: str) -> Job:
        """A job that was asked for before. Raises NotFound."""
        return Job(self, self.ask(flows.job_path(id)))

    def jobs(self, status: str | None = None, limit: int | None = None, after: str | None = None) -> list[Job]:
        """Jobs, newest first, older than the one with id `after`."""
        found = self.run(flows.fetch(self.timeout_s, "GET", "/jobs", status=status, limit=limit, after=after))
        return [Job(self, document) for document in found["jobs"]]

    def models(self) -> list[Document]:
        """The models that are served."""
        return list(self.ask("/models")["models"])

    def model(self, name: str) -> Document:
        """One model and its card. Raises NotFound."""
        return self.ask(f"/models/{quote(name, safe='')}")

    def ready(self) -> bool:
        """Whether work is taken, asked once."""
        return self.run(flows.is_ready())

    def ask(self, path: str, method: str = "GET") -> Document:
        """The document that is answered at a path."""
        document: Document = self.run(flows.fetch(self.timeout_s, method, path))
        return document
