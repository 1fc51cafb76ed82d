"""AsyncClient against a real server: concurrency, broken connections, cancelled tasks."""

import asyncio

from ddpm_client import AsyncClient, Client
from ddpm_client.types import NUMBERED

from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.server.web.lines import Threaded, line


def test_concurrent_requests_give_the_same_bytes_as_sequential_ones(server: Server, client: Client) -> None:
    async def at_once() -> list[bytes]:
        async with AsyncClient(f"http://127.0.0.1:{server.port}") as many:
            return [made.png for made in await asyncio.gather(*(many.generate(seed=s, steps=5) for s in range(12)))]

    assert asyncio.run(at_once()) == [client.generate(seed=seed, steps=5).png for seed in range(12)]


def test_a_connection_that_keeps_breaking_loses_and_repeats_no_event(server: Server, client: Client) -> None:
    async def numbers() -> list[int]:
        with line(server.port, most_bytes=4000) as bad:
            async with AsyncClient(bad.url) as far, far.stream(seed=9, steps=30, frames={"every": 1}) as stream:
                return [event.seq async for event in stream if isinstance(event, NUMBERED)]

    assert asyncio.run(numbers()) == list(range(1, 35))


def test_cancelling_a_task_cancels_its_job(grey: Threaded, backend: FakeBackend) -> None:
    async def status() -> str:
        async with AsyncClient(grey.url) as client:
            task = asyncio.create_task(client.generate(seed=1))
            while not (jobs := await client.jobs()):
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return (await jobs[0].refresh()).status

    grey.do(backend.gate.clear)
    assert asyncio.run(status()) == "cancelled"


def test_cancelling_a_task_before_the_id_is_known_cancels_its_job(grey: Threaded, backend: FakeBackend) -> None:
    async def statuses() -> list[str]:
        with line(grey.port, most_bytes=0) as bad:
            async with AsyncClient(bad.url) as far:
                task = asyncio.create_task(far.generate(seed=1))
                while bad.breaks < 2:
                    await asyncio.sleep(0.01)
                bad.most_bytes = None
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return [job.status for job in await far.jobs()]

    grey.do(backend.gate.clear)
    assert asyncio.run(statuses()) == ["cancelled"]
