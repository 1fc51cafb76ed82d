"""What is known of all jobs: those in memory, and all of them on disk. Whatever is told of a job was written first."""

import asyncio
import logging
import math
import time
from typing import Any

from server.errors import NotFound, StorageFull
from server.jobs.clock import Clock
from server.jobs.codec import concluded, had_before, identities, stored, to_job, to_record
from server.jobs.job import Job
from server.jobs.register import Register
from server.jobs.stream import Subscribers
from server.logs import report
from server.settings import Settings
from server.store.rows import IdempotentHit
from server.store.store import Store

logger = logging.getLogger(__name__)
SWEEP_S = 10.0  # how often it is looked for jobs that need not be kept any longer
DAY_S = 86_400.0


class JobRepository:
    """Jobs, from their acceptance to the end of their retention."""

    def __init__(self, store: Store, settings: Settings, audience: Subscribers) -> None:
        self.register, self.store, self.clock = Register(), store, Clock()
        self.mismatches = 0  # pictures that came out with other bytes than before
        self._settings, self.audience = settings, audience
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> list[Job]:
        """Begins to write. -> the jobs that the last server had not ended, in the order in which they came"""
        self.store.start()
        self.clock = Clock(await self.store.latest())
        self._sweeper = asyncio.create_task(self._sweep(), name="retention")
        self._sweeper.add_done_callback(report)
        jobs = [to_job(record, self.store.blobs, self.audience) for record in await self.store.recover()]
        for job in jobs:
            self.register.add(job)
        return jobs

    async def close(self) -> None:
        """Ends once everything is on disk, or cannot be."""
        try:
            if self._sweeper is not None:
                self._sweeper.cancel()
                await asyncio.gather(self._sweeper, return_exceptions=True)
                await self.store.park()
        except StorageFull as error:
            logger.warning("the disk is full at the end", extra={"reason": str(error)})
        finally:
            await self.store.close()

    async def accept(self, job: Job, again: bool) -> IdempotentHit | Job:
        """A new job, on disk; what came with its key before; or the job with pictures that were made before.

        again: make them again nevertheless. Raises StorageFull.
        """
        over, known = None, list[str]()
        cached = self._settings.result_cache and job.served.exact and not again
        if cached and job.request.watched is None and not job.request.wants_floats:
            over, known = had_before(job, time.time(), self.clock.now()), identities(job)
        made = await self.store.insert(to_record(job), over, known)
        if isinstance(made, IdempotentHit):
            return made
        if made.status is not None:
            job = to_job(made, self.store.blobs, self.audience)
            job.cached = True
        self.register.add(job)
        return job

    async def end(self, job: Job, status: str, finished_at: float, error: dict[str, Any] | None) -> None:
        """What has come of a job is on disk when this returns, its pictures first. Waits for room on the disk."""
        record = concluded(job, status, finished_at, self.clock.now(), error)
        pngs = {image.sha256: image.png for image in job.images.values()} if record.images else {}
        if pngs:
            await self.store.blobs.save(pngs)
        try:
            exact = bool(pngs) and job.served.exact
            done = await self.store.finish(record, identities(job) if exact else ())
        finally:
            self.store.blobs.unpin(pngs)
        if done is None:
            return logger.error("a result came late and was not taken", extra={"job": job.id})
        for made, kept in zip(record.images, done.images, strict=True):
            if made.sha256 != kept.sha256:
                self.mismatches += 1
                logger.error(
                    "a picture came out with other bytes than before", extra={"job": job.id, "seed": kept.seed}
                )
                job.images[kept.index] = stored(kept, self.store.blobs)

    async def find(self, id: str, owner: str | None) -> Job:
        """A job by its id, if it is this owner's. Raises NotFound, or Gone if it was kept once."""
        job = self.register.find(id)
        if job is None:
            record = await self.store.find(id, owner)
            if record.status is None:  # it is being accepted, and nobody has been told of it yet
                raise NotFound("there is no such job")
            job = to_job(record, self.store.blobs, self.audience)
        if job.request.owner != owner:
            raise NotFound("there is no such job")
        return job

    async def page(self, owner: str | None, status: str | None, after: str | None, limit: int) -> list[Job]:
        """An owner's jobs, newest first, older than the one with id `after`. Raises what `find` does of that one."""
        if status in ("queued", "running"):
            before = (await self.find(after, owner)).arrived if after is not None else math.inf
            live = reversed(self.register.live.values())
            mine = [job for job in live if job.request.owner == owner]
            return [job for job in mine if job.status == status and job.arrived < before][:limit]
        records = await self.store.page(owner, status, after, limit)
        jobs = [self.register.find(r.id) or to_job(r, self.store.blobs, self.audience) for r in records]
        return [job for job, record in zip(jobs, records, strict=True) if record.status or job.id in self.register.live]

    async def sweep(self) -> None:
        """Jobs that need not be kept any longer are deleted, with the pictures that no other job has.

        Raises StorageFull, and then there may be more to go.
        """
        before = self.clock.now() - self._settings.retention_days * DAY_S
        more = True
        while more:
            expired = await self.store.expire(before, self._settings.retention_bytes)
            self.register.forget(expired.ids)
            await self.store.delete(expired.blobs)
            more = expired.more

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except StorageFull as error:
                logger.warning("jobs that need not be kept were not deleted", extra={"reason": str(error)})
