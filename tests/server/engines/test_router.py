"""Several engines as one backend: over fakes that a test controls, and over two engines on a CPU."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.engine.events import Finished
from model.sampling.plan import resolve
from server.engines.backend import Progress, Restarting, SampleEvent
from server.engines.quarantine import DEATHS_IN_COMPANY, Quarantine
from server.engines.router import Router
from server.errors import EXIT_ENGINE, EXIT_NO_DEVICE, EngineFailed, NotReady
from server.worker.messages import Spec
from tests.model.tiny import PROCESS
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.server.faults import faulty
from tests.server.jobs.test_metrics import read

SAMPLING = resolve(PROCESS, steps=10)


class Engine(FakeBackend):
    """A fake whose runs hear `say` before they go on. Each `Restarting` counts as `deaths` with the job seated."""

    quarantine = Quarantine()
    deaths = 0

    def __init__(self, numerics: str = "fake") -> None:
        super().__init__()
        self.models = {"tiny": replace(self.models["tiny"], numerics=numerics)}
        self.gate.clear()
        self.say: list[SampleEvent] = []

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """The events of `say`, and then all pictures of `spec`."""
        record = self.quarantine.record(spec)
        for event in self.say:
            for _ in range(self.deaths if isinstance(event, Restarting) else 0):
                self.quarantine.died({record: frozenset({(0, 3)})}, killed=False)
            yield event
        async with aclosing(super().run(spec)) as events:
            async for event in events:
                yield event


def router_of(*engines: Engine, on_failed: Callable[[EngineFailed], None] = print) -> Router:
    """A router over these engines."""
    made = Router(on_failed, Engine.quarantine)
    for engine in engines:
        made.join(engine)
    return made


async def collect(router: Router, spec: Spec, heard: list[SampleEvent]) -> None:
    """Appends all events of a run."""
    async with aclosing(router.run(spec)) as events:
        async for event in events:
            heard.append(event)


async def settle() -> None:
    """Lets every task run until it has to wait."""
    for _ in range(20):
        await asyncio.sleep(0)


def play(scene: Coroutine[Any, Any, None]) -> None:
    """Runs a scene that must come to its end."""
    asyncio.run(asyncio.wait_for(scene, 10))


def seeds(engine: Engine) -> list[int]:
    """The seeds that an engine was asked for."""
    return [seed for spec in engine.specs for seed in spec.seeds]


def pictures(heard: list[SampleEvent]) -> dict[object, int]:
    """The grey level of each picture, by index."""
    return {event.id: int(event.picture[0, 0, 0]) for event in heard if isinstance(event, Finished)}


def test_the_pictures_of_a_job_are_split_over_engines_and_keep_their_indices() -> None:
    async def scene() -> None:
        a, b, heard = Engine(), Engine(), list[SampleEvent]()
        running = asyncio.create_task(
            collect(router_of(a, b), Spec(model="tiny", seeds=(5, 6, 7, 8, 9), sampling=SAMPLING), heard)
        )
        await settle()
        b.gate.set()
        await settle()
        a.gate.set()
        await running

        assert sorted(seeds(a) + seeds(b)) == [5, 6, 7, 8, 9]
        assert {len(seeds(a)), len(seeds(b))} == {2, 3}
        assert pictures(heard) == {0: 5, 1: 6, 2: 7, 3: 8, 4: 9}

    play(scene())


def test_a_picture_goes_to_the_engine_with_the_least_work() -> None:
    async def scene() -> None:
        a, b = Engine(), Engine()
        router, heard = router_of(a, b), list[SampleEvent]()
        long, short = (Spec(model="tiny", seeds=(1,), sampling=resolve(PROCESS, steps=steps)) for steps in (30, 3))
        running = [asyncio.create_task(collect(router, spec, heard)) for spec in (long, *[short] * 4)]
        await settle()

        assert (len(a.specs), len(b.specs)) == (1, 4)
        for engine in (a, b):
            engine.gate.set()
        await asyncio.gather(*running)

    play(scene())


def test_a_tenant_with_little_work_is_spread_over_engines_that_another_floods() -> None:
    """Its two pictures get a share of each engine, though one engine has more work before them."""

    async def scene() -> None:
        a, b = Engine(), Engine()
        router, heard = router_of(a, b), list[SampleEvent]()
        flood = [Spec(model="tiny", seeds=tuple(range(40)), sampling=SAMPLING, owner="many") for _ in range(3)]
        flood.append(Spec(model="tiny", seeds=(1,), sampling=resolve(PROCESS, steps=30), owner="many"))
        running = [asyncio.create_task(collect(router, spec, heard)) for spec in flood]
        await settle()
        running.append(
            asyncio.create_task(
                collect(router, Spec(model="tiny", seeds=(1, 2), sampling=SAMPLING, owner="few"), heard)
            )
        )
        await settle()

        assert [sum(spec.owner == "few" for spec in engine.specs) for engine in (a, b)] == [1, 1]
        for engine in (a, b):
            engine.gate.set()
        await asyncio.gather(*running)

    play(scene())


def test_one_task_looks_for_an_engine_however_many_runs_wait_for_it() -> None:
    async def scene() -> None:
        a, b, heard = Engine(), Engine(), list[SampleEvent]()
        a.trouble = b.trouble = "loading"
        router = router_of(a, b)
        running = [
            asyncio.create_task(collect(router, Spec(model="tiny", seeds=(i,), sampling=SAMPLING), heard))
            for i in range(50)
        ]
        await settle()
        assert [task.get_name() for task in asyncio.all_tasks()].count("wait for an engine") == 1
        b.trouble = None
        b.gate.set()
        await asyncio.gather(*running)

        assert (len(a.specs), len(b.specs)) == (0, 50)
        await router.close()

    play(scene())


def test_a_job_stays_within_one_numerics_class() -> None:
    async def scene() -> None:
        a, b, heard = Engine("one class"), Engine("another"), list[SampleEvent]()
        router = router_of(a, b)
        running = [
            asyncio.create_task(collect(router, Spec(model="tiny", seeds=(1, 2, 3), sampling=SAMPLING), heard))
            for _ in range(2)
        ]
        await settle()

        assert (seeds(a), seeds(b)) == ([1, 2, 3], [1, 2, 3])
        for engine in (a, b):
            engine.gate.set()
        await asyncio.gather(*running)

    play(scene())


def test_the_samples_of_a_lost_engine_move_to_another() -> None:
    async def scene() -> None:
        a, b, heard, failures = Engine(), Engine(), list[SampleEvent](), list[EngineFailed]()
        router = router_of(a, b, on_failed=failures.append)
        running = asyncio.create_task(collect(router, Spec(model="tiny", seeds=(1, 2, 3, 4), sampling=SAMPLING), heard))
        await settle()
        a.failure, a.trouble = EngineFailed("gone", EXIT_ENGINE), "gone"
        router.lose(a.failure)
        a.gate.set()
        await settle()
        b.gate.set()
        await running

        assert pictures(heard) == {0: 1, 1: 2, 2: 3, 3: 4}
        assert sorted(seeds(b)) == [1, 2, 3, 4]
        assert (router.trouble, failures) == (None, [])

    play(scene())


def test_the_router_fails_with_its_last_engine() -> None:
    async def scene() -> None:
        engines, heard, failures = (Engine(), Engine()), list[SampleEvent](), list[EngineFailed]()
        router = router_of(*engines, on_failed=failures.append)
        running = asyncio.create_task(collect(router, Spec(model="tiny", seeds=(1, 2), sampling=SAMPLING), heard))
        await settle()
        for engine in engines:
            engine.failure, engine.trouble = EngineFailed("gone", EXIT_ENGINE), "gone"
            router.lose(engine.failure)
            engine.gate.set()

        with pytest.raises(EngineFailed):
            await running
        assert router.trouble == "gone"
        assert [failure.exit_code for failure in failures] == [EXIT_ENGINE]

    play(scene())


def test_a_missing_device_ends_the_start() -> None:
    a, b, failures = Engine(), Engine(), list[EngineFailed]()
    a.models, b.models = {}, {}
    router = router_of(a, b, on_failed=failures.append)

    router.lose(EngineFailed("no such device", EXIT_NO_DEVICE))

    assert [failure.exit_code for failure in failures] == [EXIT_NO_DEVICE]


def test_a_job_that_was_seated_at_one_death_stays_where_it_is() -> None:
    async def scene() -> None:
        a, b, heard = Engine(), Engine(), list[SampleEvent]()
        a.say, a.deaths = [Progress({0: 3}), Restarting(1.0)], 1
        running = asyncio.create_task(
            collect(router_of(a, b), Spec(model="tiny", seeds=(1, 2, 3, 4), sampling=SAMPLING), heard)
        )
        await settle()

        assert (len(seeds(a)), len(seeds(b)), b.given_up) == (2, 2, [])
        for engine in (a, b):
            engine.gate.set()
        await running
        assert pictures(heard) == {0: 1, 1: 2, 2: 3, 3: 4}

    play(scene())


def test_an_isolated_job_is_made_by_the_engine_that_it_was_seated_on() -> None:
    async def scene() -> None:
        a, b, heard = Engine(), Engine(), list[SampleEvent]()
        a.say, a.deaths = [Progress({0: 3}), Restarting(1.0)], DEATHS_IN_COMPANY
        router = router_of(a, b)
        running = asyncio.create_task(
            collect(router, Spec(model="tiny", seeds=(1, 2, 3, 4), sampling=SAMPLING, job="suspect"), heard)
        )
        await settle()

        assert sorted(a.specs[-1].seeds) == [1, 2, 3, 4]
        assert sorted(seed for spec in a.given_up + b.given_up for seed in spec.seeds) == [1, 2, 3, 4]
        a.say = []
        a.gate.set()
        await running
        assert pictures(heard) == {0: 1, 1: 2, 2: 3, 3: 4}

    play(scene())


def test_a_job_that_asks_to_be_alone_is_made_by_one_engine() -> None:
    async def scene() -> None:
        a, b, heard = Engine(), Engine(), list[SampleEvent]()
        spec = Spec(model="tiny", seeds=(1, 2, 3, 4), sampling=SAMPLING, alone=True)
        running = asyncio.create_task(collect(router_of(a, b), spec, heard))
        await settle()

        assert (seeds(a), seeds(b)) == ([1, 2, 3, 4], [])
        a.gate.set()
        await running

    play(scene())


def test_an_isolated_job_moves_from_a_lost_engine_as_one_shard_and_keeps_its_record() -> None:
    async def scene() -> None:
        a, b, heard = Engine(), Engine(), list[SampleEvent]()
        a.say, a.deaths = [Progress({0: 3}), Restarting(1.0)], DEATHS_IN_COMPANY
        router = router_of(a, b)
        spec = Spec(model="tiny", seeds=(1, 2, 3, 4), sampling=SAMPLING, job="moves")
        running = asyncio.create_task(collect(router, spec, heard))
        await settle()
        deaths = Engine.quarantine.record(spec).deaths
        a.failure, a.trouble = EngineFailed("gone", EXIT_ENGINE), "gone"
        router.lose(a.failure)
        a.gate.set()
        await settle()

        assert sorted(b.specs[-1].seeds) == [1, 2, 3, 4]
        assert Engine.quarantine.record(b.specs[-1]).deaths == deaths >= DEATHS_IN_COMPANY
        b.gate.set()
        await running
        assert pictures(heard) == {0: 1, 1: 2, 2: 3, 3: 4}
        assert (router.trouble, router.models) == (None, b.models)

    play(scene())


def test_a_job_that_waited_when_an_engine_died_stays_where_it_is() -> None:
    async def scene() -> None:
        a, b, heard = Engine(), Engine(), list[SampleEvent]()
        a.say = [Restarting(1.0)]
        running = asyncio.create_task(
            collect(router_of(a, b), Spec(model="tiny", seeds=(1, 2), sampling=SAMPLING), heard)
        )
        await settle()

        assert (len(seeds(a)), len(seeds(b))) == (1, 1)
        for engine in (a, b):
            engine.gate.set()
        await running

    play(scene())


def test_closing_a_run_gives_up_all_shards_and_their_work_is_not_counted_any_more() -> None:
    async def scene() -> None:
        a, b = Engine(), Engine()
        router = router_of(a, b)
        running = asyncio.create_task(collect(router, Spec(model="tiny", seeds=(1, 2, 3), sampling=SAMPLING), []))
        await settle()
        running.cancel()
        await asyncio.wait([running])
        heard = list[SampleEvent]()
        after = asyncio.create_task(collect(router, Spec(model="tiny", seeds=(7,), sampling=SAMPLING), heard))
        await settle()
        a.gate.set()
        await after

        assert (len(a.given_up), len(b.given_up)) == (1, 1)
        assert pictures(heard) == {0: 7}  # by the first of two with nothing to do

    play(scene())


def test_a_run_waits_while_no_engine_takes_work_and_fails_when_none_ever_will() -> None:
    async def scene() -> None:
        a, b = Engine(), Engine()
        a.trouble, b.trouble = "one thing", "another"
        router = router_of(a, b)

        assert (router.trouble, router.models) == ("one thing; another", {})
        waiting = asyncio.create_task(collect(router, Spec(model="tiny", seeds=(1,), sampling=SAMPLING), []))
        await settle()
        assert not waiting.done()
        await router.close()
        with pytest.raises(NotReady):
            await waiting

    play(scene())


def test_a_step_of_two_engines_holds_twice_as_many() -> None:
    assert router_of(Engine(), Engine()).step_s("tiny", [1, 2]) == [0.0, 0.1, 0.1, 0.2, 0.2]


@pytest.fixture(scope="module")
def two(weights: Path) -> Iterator[Server]:
    """A server with two engines, which die at the third step of the pictures with the seeds 1 and 2."""
    faults = faulty(*({"do": "die", "seed": seed, "step": 3} for seed in (1, 2)))
    made = Server(weights, **({"DDPM_DEVICE": "cpu", "DDPM_ENGINES": "2", "DDPM_THREADS": "2"} | faults))
    try:
        yield made.wait_until_ready()
    finally:
        code = made.stop()[0]
    assert code == 0


def until_both_are_there(two: Server) -> None:
    """Waits until each of the two engines has the model."""
    two.until(lambda: None not in two.client.get("/models").json()["models"][0]["engines"])


def test_two_engines_make_what_one_makes_and_one_that_is_killed_is_replaced(server: Server, two: Server) -> None:
    job = {"seed": 5, "steps": 30, "n": 64}
    expected = server.client.post("/generate", json=job).content
    until_both_are_there(two)
    first = two.engine_pids
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(two.client.post("/generate", json=job)))
    caller.start()
    two.until(lambda: read(two.client.get("/metrics").text)["ddpm_slots_used"] > 0)
    os.kill(first[0], signal.SIGKILL)
    ready = {two.client.get("/readyz").status_code}
    while caller.is_alive():
        ready.add(two.client.get("/readyz").status_code)
        caller.join(0.02)

    assert [answer.content for answer in answers] == [expected]
    assert ready == {200}
    assert first[1] in two.engine_pids


def restarts(server: Server) -> float:
    """How many engines have been replaced."""
    seen = read(server.client.get("/metrics").text)
    return sum(count for name, count in seen.items() if name.startswith("ddpm_engine_restarts"))


@pytest.mark.long
def test_a_job_that_kills_engines_fails_on_one_of_them_and_no_other_job_fails(two: Server) -> None:
    until_both_are_there(two)
    before = restarts(two)
    poison = two.accepted(seed=1, steps=30, n=2)
    others = [two.accepted(seed=100 + i, steps=30) for i in range(4)]

    two.until(lambda: two.client.get(poison).json()["status"] == "failed", 120)
    two.until(lambda: all(two.client.get(job).json()["status"] == "succeeded" for job in others))
    assert restarts(two) - before <= 8
