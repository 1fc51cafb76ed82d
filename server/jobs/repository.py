"""Jobs from their acceptance to the end of their retention: all of them on disk, some of them in memory.

Whatever clients are told of a job was written first. In memory are the jobs that have not ended, and those that ended
lately, as long as there is room: only there are their frames.
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import aclosing

from model.checkpoint.card import ModelCard
from model.engine.events import Finished
from model.sampling.plan import stands
from server.clock import DAY_S, Clock
from server.documents import ProblemDocument
from server.engines.backend import Backend
from server.errors import Gone, NotFound, NotReady, StorageFull
from server.jobs import encode
from server.jobs.codec import answered_from_cache, concluded, identities, stored, to_job, to_record
from server.jobs.job import Image, Job
from server.jobs.stream import StreamCounts
from server.logs import report
from server.settings import Settings
from server.store.blobs import is_sound
from server.store.records import ImageRow
from server.store.rows import IdempotentHit
from server.store.store import Store
from server.worker.messages import Spec

logger = logging.getLogger(__name__)
SWEEP_S = 10.0  # between two looks for jobs whose retention has ended
REMAKE_S = 10.0  # that a caller waits for all the pictures that are made again for its request
KEPT_BYTES = 256 << 20  # what ended jobs hold in memory, at most
KEPT_JOBS = 10_000  # and how many of them there are


class JobRepository:
    """The jobs of a server."""

    def __init__(
        self, store: Store, settings: Settings, counts: StreamCounts, cards: Mapping[str, ModelCard], backend: Backend
    ) -> None:
        self.store, self.counts, self.clock = store, counts, Clock()
        self.live: dict[str, Job] = {}  # those that have not ended, in order of arrival
        self.mismatches = 0  # pictures that came out with other bytes than before
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._ended_bytes = 0
        self._settings = settings
        self._sweeper: asyncio.Task[None] | None = None
        self._cards, self._backend = cards, backend
        self._remaking: asyncio.Task[dict[int, bool]] | None = None

    async def start(self) -> list[Job]:
        """Opens the journal. -> the jobs that the last server had not ended, in order of arrival"""
        self.store.start()
        self._loop = asyncio.get_running_loop()
        self.clock = Clock(await self.store.latest())
        self._sweeper = asyncio.create_task(self._sweep(), name="retention")
        self._sweeper.add_done_callback(report)
        jobs = [to_job(record, self.read, self.counts) for record in await self.store.recover()]
        self.live |= {job.id: job for job in jobs}
        return jobs

    async def close(self) -> None:
        """Returns when everything is on disk, or cannot be."""
        try:
            if self._remaking is not None:
                self._remaking.cancel()
            if self._sweeper is not None:
                self._sweeper.cancel()
                await asyncio.gather(self._sweeper, return_exceptions=True)
                await self.store.park()
        except (StorageFull, NotReady) as error:
            logger.warning("the disk is full at the end", extra={"reason": str(error)})
        finally:
            await self.store.close()

    async def accept(self, job: Job, again: bool) -> IdempotentHit | Job:
        """Writes down a new job. -> the job, with its pictures if all are in the cache; or what came with its
        Idempotency-Key before.

        again: cached pictures are not accepted. Raises StorageFull.
        """
        cached, known = None, list[str]()
        plain = job.request.frames is None and not job.request.floats
        if self._settings.result_cache and job.model.exact and plain and not again:
            cached, known = answered_from_cache(job, time.time(), self.clock.now()), identities(job)
        made = await self.store.insert(to_record(job), cached, known)
        if isinstance(made, IdempotentHit):
            return made
        if made.status is not None:
            job = to_job(made, self.read, self.counts)
            job.cached = True
        self.live[job.id] = job
        return job

    async def end(self, job: Job, status: str, finished_at: float, error: ProblemDocument | None) -> None:
        """Writes down the end of a job, its pictures first. Waits for room on the disk."""
        ended = self.clock.now()
        pngs = {image.sha256: image.png for image in job.images.values()} if status == "succeeded" else {}
        record = concluded(job, pngs, status, finished_at, ended, error)
        if pngs:
            await self.store.blobs.save(pngs)
        try:
            exact = bool(pngs) and job.model.exact
            done = await self.store.finish(record, identities(job) if exact else ())
        finally:
            self.store.blobs.unpin(pngs)
        if done is None:
            return logger.error("a result came late and was not taken", extra={"job": job.id})
        for made, kept in zip(record.images, done.images, strict=True):
            if made.sha256 != kept.sha256:
                self.mismatches += 1
                extra = {"job": job.id, "seed": kept.seed}
                logger.error("a picture came out with other bytes than before", extra=extra)
                job.images[kept.index] = stored(job, kept, self.read)

    def read(self, job: Job, kept: ImageRow) -> bytes:
        """The PNG of an image on disk. If it is missing or damaged, all such pictures of its job are made again, to the
        same bytes.

        Slow: call it in a thread. Raises NotReady while they are being made, Gone if this one comes out otherwise now.
        """
        try:
            return self.store.blobs.read(kept.sha256)
        except Gone as damage:
            asyncio.run_coroutine_threadsafe(self._mended(job, kept, damage), self._loop).result()
        return self.store.blobs.read(kept.sha256)

    async def _mended(self, job: Job, kept: ImageRow, damage: Gone) -> None:
        """Waits until a picture has been made again, but not long, and for one job at a time: a thread waits, too."""
        if self._remaking is not None and not self._remaking.done():
            raise NotReady("another picture that was damaged on disk is being made again")
        self._remaking = task = asyncio.create_task(self._remake(job, damage), name=f"again {job.id}")
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([task], timeout=REMAKE_S)
        if not task.done() or task.cancelled():
            raise NotReady("this picture was damaged on disk and is being made again")
        match task.result().get(kept.index):
            case None:
                raise NotReady("this picture was damaged on disk and could not be made again now")
            case False:
                raise Gone(f"{damage}, and it comes out with other bytes on this machine")

    async def _remake(self, job: Job, damage: Gone) -> dict[int, bool]:
        """Makes the damaged pictures of a job again, all at once: who asks for one asks for the others, too.
        -> by index, whether a picture that is there now has the bytes that it had"""
        backend, request = self._backend, job.request
        await self.store.find(job.id, request.owner)  # raises Gone if it was deleted meanwhile
        images = job.images.items()
        damaged = await asyncio.to_thread(lambda: {i: image for i, image in images if self._is_damaged(image)})
        same = dict.fromkeys(job.images.keys() - damaged.keys(), True)
        if not damaged:  # they have been made again since
            return same
        logger.error("a picture was damaged on disk", extra={"job": job.id, "images": [*damaged]})
        if request.model not in backend.models:
            raise NotReady(str(damage)) if backend.trouble is not None else damage
        if backend.models[request.model].digest != job.model.digest:
            raise Gone(f"{damage}, and the model that made it is no longer served")
        seeds, asked = tuple(image.seed for image in damaged.values()), request.sampling
        if not stands(self._cards[request.model].process, asked):
            raise Gone(f"{damage}, and the plan that made it is no longer served")
        spec = Spec(model=request.model, seeds=seeds, indices=(*damaged,), sampling=asked, shows_x=False, job=job.id)
        async with aclosing(backend.run(spec)) as events:
            async for event in events:
                if isinstance(event, Finished) and isinstance(event.id, int):
                    image = damaged[event.id]
                    png = await asyncio.to_thread(encode.png, event.picture, job.texts(image.seed))
                    if same.setdefault(event.id, is_sound(image.known_sha256, png)):
                        await self.store.blobs.save({image.known_sha256: png})
                        self.store.blobs.unpin([image.known_sha256])
        self.mismatches += [*same.values()].count(False)
        logger.warning("pictures were made again", extra={"job": job.id, "images": [i for i in damaged if same.get(i)]})
        return same

    def _is_damaged(self, image: Image) -> bool:
        """Whether an image that is on disk only is missing there, or damaged. Slow."""
        try:
            return bool(image.known_sha256) and not self.store.blobs.read(image.known_sha256)
        except Gone:
            return True

    def retire(self, job: Job) -> None:
        """A job has ended, and its last message was sent: what it holds does not change any more."""
        self._ended[job.id] = self.live.pop(job.id)
        self._ended_bytes += job.size_bytes
        while len(self._ended) > 1 and (self._ended_bytes > KEPT_BYTES or len(self._ended) > KEPT_JOBS):
            self._forget([next(iter(self._ended))])

    def in_memory(self, id: str) -> Job | None:
        """A job by its id, if it is in memory."""
        return self.live.get(id) or self._ended.get(id)

    def _forget(self, ids: Iterable[str]) -> None:
        for id in ids:
            if (job := self._ended.pop(id, None)) is not None:
                self._ended_bytes -= job.size_bytes

    async def find(self, id: str, owner: str | None) -> Job:
        """A job by its id, if it is this owner's. Raises NotFound, or Gone after its retention."""
        job = self.in_memory(id)
        if job is None:
            record = await self.store.find(id, owner)
            if record.status is None:  # it is being accepted, and nobody has been told of it yet
                raise NotFound("there is no such job")
            job = to_job(record, self.read, self.counts)
        if job.request.owner != owner:
            raise NotFound("there is no such job")
        return job

    async def page(self, owner: str | None, status: str | None, after: str | None, limit: int) -> list[Job]:
        """An owner's jobs, newest first, older than the one with id `after`. Raises as `find` does for that one."""
        if status in ("queued", "running"):
            before = (await self.find(after, owner)).arrived if after is not None else math.inf
            mine = [job for job in reversed(self.live.values()) if job.request.owner == owner]
            return [job for job in mine if job.status == status and job.arrived < before][:limit]
        records = await self.store.page(owner, status, after, limit)
        jobs = [self.in_memory(r.id) or to_job(r, self.read, self.counts) for r in records]
        return [job for job, record in zip(jobs, records, strict=True) if record.status or job.id in self.live]

    async def sweep(self) -> None:
        """Deletes jobs whose retention has ended, with the pictures that no other job has.

        Raises StorageFull, NotReady or OSError, and then there may be more to delete.
        """
        now, more = self.clock.now(), True
        while more:
            before = now - self._settings.retention_days * DAY_S
            expired = await self.store.expire(before, self._settings.retention_bytes, now)
            self._forget(expired.ids)
            if expired.ids:
                logger.info("jobs were deleted, for their retention had ended", extra={"count": len(expired.ids)})
            await self.store.delete_unused()
            more = expired.more
        await asyncio.to_thread(self.store.blobs.clear_aside)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except (StorageFull, NotReady, OSError) as error:
                logger.warning("jobs after their retention were not deleted", extra={"reason": str(error)})
