"""Many subscribers, slow subscribers, idle subscribers, and clients who leave: a real server, and what it costs it."""

import asyncio
import json
import os
import random
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ddpm_client.wire import unpack
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as connect_sync

from tests.model.convert.directories import write_model
from tests.server.conftest import Server
from tests.server.jobs.test_metrics import balance, read
from tests.waiting import until

DIGITS = Path(__file__).parents[3] / "weights" / "digits"
LATER = {"prefer": "respond-async"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def long(long_weights: Path) -> Iterator[Server]:
    """A server of a tiny model with a thousand steps."""
    with Server(long_weights) as running:
        yield running


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """An asynchronous client with as many connections as it likes."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.client.base_url, timeout=120, limits=limits) as client:
        yield client


def watching(server: Server, path: str) -> connect:
    """A websocket of this server."""
    return connect(f"ws://127.0.0.1:{server.port}{path}", compression=None, open_timeout=60)


def understand(message: str | bytes) -> dict[str, Any]:
    """A message as an object; a picture as its header with `png`."""
    if isinstance(message, str):
        heard: dict[str, Any] = json.loads(message)
        return heard
    header, png = unpack(message)
    return header | {"png": png}


def is_kept(message: dict[str, Any]) -> bool:
    """Whether this message is numbered."""
    return message.get("type") not in ("queued", "progress", "dropped", "restarting", "resync", "pong")


async def hear(socket: ClientConnection) -> list[dict[str, Any]]:
    """Everything that is kept, to the end."""
    return [message async for text in socket if is_kept(message := understand(text))]


async def submit(client: httpx.AsyncClient, **request: Any) -> str:
    """The id of a new job."""
    answer = await client.post("/generate", json=request, headers=LATER)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def memory_of(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def until_metric(server: Server, name: str, value: float) -> float:
    """Scrapes without a pause until a metric has this value; the time at which it was seen."""
    until(lambda: read(server.client.get("/metrics").text)[name] == value, 30, pause_s=0)
    return time.monotonic()


def test_each_of_four_subscribers_of_each_of_64_jobs_sees_the_same(server: Server) -> None:
    async def view(job: str, delay_s: float) -> list[dict[str, Any]]:
        await asyncio.sleep(delay_s)
        async with watching(server, f"/jobs/{job}/stream") as socket:
            return await hear(socket)

    async def crowd() -> dict[str, list[list[dict[str, Any]]]]:
        draw = random.Random(7)
        async with client_of(server) as client:
            kinds = [{"count": 5, "kind": "both"}, {"every": 3}, {"every": 7, "kind": "x0"}]
            jobs = [
                await submit(client, seed=i, n=1 + i % 3, steps=draw.randint(5, 30), frames=draw.choice(kinds))
                for i in range(64)
            ]
            views = await asyncio.gather(*(view(job, draw.uniform(0, 2)) for job in jobs for _ in range(4)))
            heard = {job: views[4 * i : 4 * i + 4] for i, job in enumerate(jobs)}
            for job in jobs[::9]:  # what was seen is what the same request shows when nobody else is there
                request = (await client.get(f"/jobs/{job}")).json()["request"]
                alone = await view(await submit(client, **{k: v for k, v in request.items() if v is not None}), 0)
                assert shown(alone) == shown(heard[job][0])
            for job in jobs:
                document = (await client.get(f"/jobs/{job}")).json()
                pngs = [(await client.get(image["url"])).content for image in document["images"]]
                assert [
                    m["png"] for m in sorted(heard[job][0], key=lambda m: m.get("index", -1)) if is_image(m)
                ] == pngs
            return heard

    def shown(heard: list[dict[str, Any]]) -> dict[tuple[int, int, str], bytes]:
        return {(m["index"], m["step"], m["kind"]): m["png"] for m in heard if "png" in m}

    def is_image(message: dict[str, Any]) -> bool:
        return bool(message.get("kind") == "image")

    for job, views in asyncio.run(crowd()).items():
        first, *others = views
        assert others == [first] * 3
        assert [message["seq"] for message in first] == list(range(1, len(first) + 1))
        assert {message["job"] for message in first} == {job}
        assert [m["type"] for m in first if "type" in m] == ["started", "succeeded"]
        assert first[-1]["type"] == "succeeded"


def test_who_comes_back_at_any_point_misses_nothing_and_hears_nothing_twice(long: Server) -> None:
    async def whole(job: str) -> list[dict[str, Any]]:
        async with watching(long, f"/jobs/{job}/stream") as socket:
            return await hear(socket)

    async def broken(job: str, draw: random.Random) -> list[dict[str, Any]]:
        heard: list[dict[str, Any]] = []
        while not (heard and heard[-1].get("type") == "succeeded"):
            stay = draw.randint(1, 12)  # messages until the line breaks again
            async with watching(long, f"/jobs/{job}/stream?after={len(heard)}") as socket:
                async for text in socket:
                    message = understand(text)
                    heard += [message] if is_kept(message) else []
                    stay -= 1
                    if stay == 0:
                        socket.transport.abort()
                        break
        return heard

    async def all_of_them() -> list[list[dict[str, Any]]]:
        async with client_of(long) as client:
            job = await submit(client, seed=1, n=3, steps=400, frames={"every": 8, "kind": "both"})
            return await asyncio.gather(whole(job), *(broken(job, random.Random(i)) for i in range(6)))

    expected, *pieced_together = asyncio.run(all_of_them())

    assert [message["seq"] for message in expected] == list(range(1, 1 + 1 + 3 * (51 + 50) + 3 + 1))
    assert all(heard == expected for heard in pieced_together)


LONG = {"steps": 1000, "n": 4}


@contextmanager
def by_delete(server: Server) -> Iterator[Callable[[], object]]:
    """`DELETE /jobs/{id}`."""
    job = server.client.post("/generate", json=LONG, headers=LATER).json()["id"]
    yield lambda: server.client.delete(f"/jobs/{job}")


@contextmanager
def by_message(server: Server) -> Iterator[Callable[[], object]]:
    """A subscriber says so."""
    job = server.client.post("/generate", json=LONG, headers=LATER).json()["id"]
    with connect_sync(f"ws://127.0.0.1:{server.port}/jobs/{job}/stream") as socket:
        yield lambda: socket.send('{"type": "cancel"}')


@contextmanager
def by_closing_the_stream(server: Server) -> Iterator[Callable[[], object]]:
    """The subscriber of `/generate/stream` is gone."""
    with connect_sync(f"ws://127.0.0.1:{server.port}/generate/stream") as subscriber:
        subscriber.send(json.dumps(LONG))
        yield lambda: subscriber.socket.shutdown(socket.SHUT_RDWR)


@contextmanager
def by_leaving(server: Server, accept: str = "image/png") -> Iterator[Callable[[], object]]:
    """A caller who waits for the answer is gone."""
    body = json.dumps(LONG).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\naccept: {accept}\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        yield connection.close


def by_leaving_events(server: Server) -> AbstractContextManager[Callable[[], object]]:
    """The same for one who reads server-sent events."""
    return by_leaving(server, "text/event-stream")


@pytest.mark.alone
@pytest.mark.parametrize("way", [by_delete, by_message, by_closing_the_stream, by_leaving, by_leaving_events])
def test_a_cancelled_job_frees_its_slots_at_once(
    long: Server, way: Callable[[Server], AbstractContextManager[Callable[[], object]]]
) -> None:
    took = []
    for _ in range(7):
        with way(long) as cancel:
            until_metric(long, "ddpm_slots_used", 4)
            began = time.monotonic()
            cancel()
            took.append(until_metric(long, "ddpm_slots_used", 0) - began)
    until(lambda: read(long.client.get("/metrics").text)["ddpm_step_seconds_count"] > 0)  # told by the next heartbeat
    seen = read(long.client.get("/metrics").text)
    step_s = seen["ddpm_step_seconds_sum"] / seen["ddpm_step_seconds_count"]

    assert statistics.median(took) <= max(0.05, 3 * step_s)


def test_a_message_that_is_too_long_closes_the_socket(server: Server) -> None:
    with connect_sync(f"ws://127.0.0.1:{server.port}/generate/stream") as subscriber:
        subscriber.send("x" * 100_000)
        with pytest.raises(ConnectionClosed) as closed:
            subscriber.recv()

    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


@pytest.mark.parametrize("each", [25, pytest.param(125, marks=pytest.mark.long)])
def test_eight_who_race_cancel_against_completion_see_each_job_end_once(server: Server, each: int) -> None:
    async def race(client: httpx.AsyncClient, draw: random.Random, steps: int) -> tuple[str, list[str]]:
        job = await submit(client, steps=steps)
        await asyncio.sleep(draw.uniform(0, 0.004 * steps))
        answers = await asyncio.gather(*(client.delete(f"/jobs/{job}") for _ in range(draw.randint(1, 3))))
        said = {answer.json()["status"] for answer in answers}
        async with watching(server, f"/jobs/{job}/stream") as socket:
            heard = await hear(socket)
        ends = [m["type"] for m in heard if m.get("type") in ("succeeded", "failed", "cancelled")]
        assert said == {(await client.get(f"/jobs/{job}")).json()["status"]}
        return said.pop(), ends

    async def run(racer: int) -> list[tuple[str, list[str]]]:
        draw = random.Random(racer)
        async with client_of(server) as client:
            return [await race(client, draw, draw.randint(1, 12)) for _ in range(each)]

    async def races() -> list[tuple[str, list[str]]]:
        return [outcome for run_of_one in await asyncio.gather(*map(run, range(8))) for outcome in run_of_one]

    async def scrape(client: httpx.AsyncClient) -> None:
        while True:
            accepted, accounted_for = balance(read((await client.get("/metrics")).text))
            assert accepted == accounted_for

    async def races_with_scrapes() -> list[tuple[str, list[str]]]:
        async with client_of(server) as client:
            scraping = asyncio.create_task(scrape(client))
            outcomes = await races()
            assert not scraping.done()  # it would have failed
            scraping.cancel()
            await asyncio.wait({scraping})
            return outcomes

    before = read(server.client.get("/metrics").text)
    outcomes = asyncio.run(races_with_scrapes())
    after = read(server.client.get("/metrics").text)

    assert len(outcomes) == 8 * each
    assert all(ends == [status] for status, ends in outcomes)
    assert {status for status, _ in outcomes} == {"succeeded", "cancelled"}  # both were tried
    counted = {
        name: after[f"ddpm_jobs_total{{{name}}}"] - before[f"ddpm_jobs_total{{{name}}}"]
        for name in ("succeeded", "cancelled", "failed")
    }
    statuses = [status for status, _ in outcomes]
    assert counted == {"succeeded": statuses.count("succeeded"), "cancelled": statuses.count("cancelled"), "failed": 0}
    assert balance(after)[0] == balance(after)[1]
    until_metric(server, "ddpm_slots_used", 0)


def stall(server: Server, job: str) -> socket.socket:
    """A subscriber that never reads, with small buffers of its own."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(
        f"GET /jobs/{job}/stream HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    return connection


@pytest.mark.long
def test_subscribers_that_never_read_cost_little_and_are_let_go(tmp_path: Path) -> None:
    """The net is tiny, its pictures are not: they are what the server holds for a subscriber."""
    request = {"n": 64, "steps": 16, "frames": {"every": 1, "kind": "both"}}
    large = write_model(tmp_path / "large", {"sample_size": 32})
    server = Server(large, DDPM_SLOTS="16", DDPM_THREADS="1").wait_until_ready()
    pid = server.process.pid

    async def watched(stalled: int) -> tuple[str, int, list[socket.socket]]:
        """A job with one good subscriber and so many that never read; how much more memory is held at its end."""
        before = memory_of(pid)
        async with client_of(server) as client:
            job = await submit(client, **request)
            lazy = [stall(server, job) for _ in range(stalled)]
            async with watching(server, f"/jobs/{job}/stream") as socket:
                heard = await hear(socket)
        assert len(heard) == 1 + 64 * (17 + 16) + 64 + 1
        return job, memory_of(pid) - before, lazy

    try:
        asyncio.run(watched(0))  # what a first job warms up
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        job, usual, _ = asyncio.run(watched(0))

        before = memory_of(pid)
        one = stall(server, job)  # all is encoded already: whatever grows, grows for this subscriber
        time.sleep(1)
        assert memory_of(pid) - before <= 1 * MIB

        _, crowded, lazy = asyncio.run(watched(200))
        assert crowded - usual <= 64 * MIB
        until_metric(server, "ddpm_viewers", 0)
        until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= descriptors, 15)
        for connection in (one, *lazy):
            connection.close()
    finally:
        server.stop()


@pytest.mark.long
@pytest.mark.alone
def test_two_thousand_idle_subscribers_are_hardly_noticed(weights: Path) -> None:
    server = Server(DIGITS, DDPM_SLOTS="1").wait_until_ready()

    async def crowd() -> tuple[int, list[float]]:
        async with client_of(server) as client:
            await submit(client, steps=1000, n=64)
            waiting = await submit(client, steps=1000)
            before, sockets = memory_of(server.process.pid), []
            for _ in range(100):
                path = f"/jobs/{waiting}/stream"
                sockets += await asyncio.gather(*(watching(server, path).__aenter__() for _ in range(20)))
            await asyncio.sleep(1)
            grown, took = memory_of(server.process.pid) - before, []
            for _ in range(300):
                began = time.monotonic()
                await client.get("/healthz")
                took.append(time.monotonic() - began)
                await asyncio.sleep(0.01)
            assert read((await client.get("/metrics")).text)["ddpm_viewers"] == 2000
            for connection in sockets:
                connection.transport.abort()
            return grown, took

    try:
        grown, took = asyncio.run(crowd())
        until_metric(server, "ddpm_viewers", 0)
    finally:
        server.kill()
        server.ended()

    assert grown <= 150 * MIB
    assert statistics.quantiles(took, n=100)[98] <= 0.05
