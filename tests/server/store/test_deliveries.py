"""Which webhook is next, as the journal has it."""

import asyncio
from pathlib import Path

from server.store.deliveries import Delivery
from server.store.store import Store
from tests.server.jobs.records import a_store, ended, record


async def owe(store: Store, id: str, owner: str | None = None, **fields: object) -> None:
    """A job that has ended and has a webhook."""
    await store.insert(record(id, owner=owner))
    delivery = Delivery(**{"host": "a"} | fields)  # type: ignore[arg-type]
    await store.finish(ended(id, owner=owner, delivery=delivery))


def test_of_those_that_are_due_the_one_with_the_fewest_attempts_is_next(tmp_path: Path) -> None:
    async def story() -> list[str]:
        found = list[str]()
        async with a_store(tmp_path) as store:
            await owe(store, "done", due=None, state="delivered")
            await owe(store, "tomorrow", due=200.0)
            await owe(store, "retry", due=1.0, attempts=3)
            await owe(store, "late", due=9.0, attempts=1)
            await owe(store, "bob's", due=5.0, attempts=1, owner="bob")
            await owe(store, "first", host="b")
            for jobs, hosts, owners in [
                *(([], [], []), ([], ["b"], []), ([], ["b"], ["bob"]), ([5, 6], [], []), ([4, 5, 6], [], [])),
                *(([3, 4, 5, 6], [], []), ([], ["a", "b"], []), ([2, 3, 4, 5, 6], [], [])),
            ]:
                after = await store.next_delivery(10.0, jobs, hosts, owners)
                found.append(after.id if after is not None else "none")
        return found

    assert asyncio.run(story()) == ["first", "bob's", "late", "late", "retry", "tomorrow", "none", "none"]


def test_a_record_has_its_delivery_again_after_a_restart(tmp_path: Path) -> None:
    after = Delivery(host="a", due=None, state="gone", attempts=2, status=410, error=None)

    async def story() -> Delivery | None:
        async with a_store(tmp_path) as store:
            await owe(store, "id")
            await store.note_delivery(1, after)
        async with a_store(tmp_path) as store:
            return (await store.find("id", None)).delivery

    assert asyncio.run(story()) == after
