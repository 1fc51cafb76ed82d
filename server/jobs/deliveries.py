"""Delivers webhooks: posts the document of an ended job to the URL that came with it, until that has succeeded.

What is to be delivered is in the journal, so that a restart loses nothing: a webhook is sent at least once, always with
the same id and body. No receiver can delay the others: each host, each key and all together have so many at once, and
first attempts go before repeated ones.
"""

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from server import __version__
from server.errors import Invalid, NotReady, StorageFull
from server.jobs.codec import to_job
from server.jobs.repository import JobRepository
from server.jobs.stream import TextMessage
from server.logs import report
from server.settings import Settings
from server.store.records import Delivery, Record
from server.webhooks.post import Poster
from server.webhooks.signing import secret_of, signed
from server.webhooks.target import Undelivered, parse_url

logger = logging.getLogger(__name__)
PAUSES_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 21_600.0, 86_400.0)  # before the second attempt, the third, ...
MOST, MOST_OF_A_KEY, MOST_OF_A_HOST = 16, 8, 2  # at once
FULL_S = 5.0  # until the next look while the journal cannot be asked
GONE = 410  # by which a receiver says that it wants no more
OUTCOMES = ("delivered", "retried", "gone", "failed")


def after_attempt(before: Delivery, status: int | None, error: str | None, now: float) -> Delivery:
    """How far a delivery is after another attempt. status: of the answer. error: why there was none"""
    tried = replace(before, attempts=before.attempts + 1, status=status, error=error, due=None)
    if status is not None and 200 <= status < 300:
        return replace(tried, state="delivered", delivered_at=time.time())
    if status == GONE:
        return replace(tried, state="gone")
    if before.attempts == len(PAUSES_S):
        return replace(tried, state="failed")
    return replace(tried, due=now + PAUSES_S[before.attempts] * random.uniform(1, 1.2))


@dataclass(slots=True)
class Deliveries:
    """The webhooks of a server. Without DDPM_WEBHOOK_SECRET it sends none; those in the journal wait."""

    settings: Settings
    repository: JobRepository
    outcomes: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)))  # of attempts
    _poster: Poster | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)  # a job with a webhook, or an attempt, has ended
    _sending: dict[int, Record] = field(default_factory=dict)  # by number
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def start(self) -> None:
        """Begins to deliver."""
        if self.settings.webhook_secret.get_secret_value():
            self._poster = Poster()
            self._begin(self._run(), "webhooks")

    async def close(self) -> None:
        """Ends at once: what is on its way is sent again by the next server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """A job that has a webhook has ended."""
        self._news.set()

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(report)

    async def _run(self) -> None:
        while True:
            self._news.clear()
            try:
                pause_s = await self._begin_next()
            except (StorageFull, NotReady):
                pause_s = FULL_S
            if pause_s != 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._news.wait()

    async def _begin_next(self) -> float | None:
        """Begins an attempt that is due -> 0; else the seconds until one is due, or None if there is nothing to wait
        for but news. Raises StorageFull or NotReady."""
        if len(self._sending) == MOST:
            return None
        hosts = Counter(record.delivery.host for record in self._sending.values() if record.delivery)
        owners = Counter(record.owner for record in self._sending.values() if record.owner)
        busy_hosts = [host for host, count in hosts.items() if count == MOST_OF_A_HOST]
        busy_owners = [owner for owner, count in owners.items() if count == MOST_OF_A_KEY]
        now = self.repository.clock.now()
        record = await self.repository.store.next_delivery(now, list(self._sending), busy_hosts, busy_owners)
        if record is None or record.delivery is None or record.delivery.due is None:
            return None
        if record.delivery.due <= now:
            self._sending[record.number] = record
            self._begin(self._deliver(record, record.delivery), f"webhook of job {record.id}")
            return 0
        return record.delivery.due - now

    async def _deliver(self, record: Record, before: Delivery) -> None:
        """One attempt. A bug in it leaves the delivery in `_sending`, so that it is not tried again by this server."""
        status, error = None, None
        try:
            status = await self.repository.store.troubles.outlast(lambda: self._post(record))
        except Undelivered as failure:
            error = str(failure)
        after = after_attempt(before, status, error, self.repository.clock.now())
        await self.repository.store.note_delivery(record, after)
        if (job := self.repository.in_memory(record.id)) is not None:
            job.delivery = after
        outcome = "retried" if after.state == "pending" else after.state
        self.outcomes[outcome] += 1
        logger.log(
            logging.INFO if outcome == "delivered" else logging.WARNING,
            "webhook attempted",
            extra={"job": record.id, "outcome": outcome, "host": after.host, **after.document},
        )
        del self._sending[record.number]
        self._news.set()

    async def _post(self, record: Record) -> int:
        """The status of the answer to the job's document, as its last message has it. Raises Undelivered."""
        assert self._poster is not None
        job = to_job(record, self.repository.read, self.repository.counts)
        last = job.stream.kept[-1]
        assert isinstance(last, TextMessage) and job.request.webhook is not None
        body = json.dumps(last.body["document"]).encode()
        secret = secret_of(self.settings.webhook_secret.get_secret_value(), record.owner)
        headers = {"Content-Type": "application/json", "User-Agent": f"ddpm-server/{__version__}"}
        headers |= signed(secret, record.id, int(time.time()), body)
        try:
            target = parse_url(job.request.webhook, self.settings.webhook_hosts)
        except Invalid:
            raise Undelivered("the host is not allowed any more") from None
        return await self._poster.post(target, headers, body)
