"""Jobs as rows of the journal, and back: everything that must outlive the server."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from model.sampling.levels import timesteps
from model.sampling.samplers import Sampling
from server.documents import ProblemDocument
from server.errors import Problem, Recalled
from server.jobs.job import Image, Job, State
from server.jobs.request import FramePoints, ResolvedRequest
from server.jobs.schemas import Frames, fingerprint
from server.jobs.stream import StreamCounts
from server.store.records import ImageRow, Record
from server.worker.messages import ModelStatus

Read = Callable[[Job, ImageRow], bytes]
_json = json.JSONEncoder(separators=(",", ":")).encode
# Fields that a job and its row have in common
COMMON = "id key fingerprint created_at arrived attached attempt deaths started_at finished_at".split()


def identities(job: Job) -> list[str]:
    """A hash of all that decides each picture of a job, which is what its PNG's text chunks say; and of its owner: one
    tenant need not know what another has asked for."""
    seeds = range(job.request.seed, job.request.seed + job.request.n)
    texts = [job.images[i].texts if i in job.images else job.texts(seed) for i, seed in enumerate(seeds)]
    return [fingerprint({**each, "owner": job.request.owner}) for each in texts]


def _request(text: str, owner: str | None) -> ResolvedRequest:
    fields = json.loads(text)
    sampling = _sampling({name: fields.pop(name) for name in Sampling.__slots__ if name in fields}, fields["T"])
    frames, shape = fields.pop("frames"), tuple(fields.pop("shape"))
    labels = tuple(fields.pop("labels", None) or ()) or None
    points = FramePoints.of(Frames(**frames), sampling.steps, sampling.steps) if frames is not None else None
    return ResolvedRequest(**fields, shape=shape, sampling=sampling, labels=labels, frames=points, owner=owner)


def _sampling(chosen: dict[str, Any], T: int) -> Sampling:
    """How a job is sampled. Rows of earlier versions have no `timesteps`, and the levels of their `dpmpp_2m` were those
    of `ddpm`; they are told by number, so that the job's pictures are those that it was accepted for."""
    if "timesteps" not in chosen and chosen["sampler"] == "dpmpp_2m":
        visited = timesteps(T, chosen["steps"], chosen["spacing"]).tolist()
        chosen |= {"order": 2, "timesteps": visited, "spacing": None}
    if (levels := chosen.get("timesteps")) is not None:
        chosen["timesteps"] = tuple(levels)
    if (interval := chosen.get("guidance_interval")) is not None:
        chosen["guidance_interval"] = tuple(interval)
    return Sampling(**chosen)


def to_record(job: Job, **end: Any) -> Record:
    """The row of a job. end: the fields that are known when it has ended."""
    fields: dict[str, Any] = {name: getattr(job, name) for name in COMMON}
    request = job.request
    document = {**request.document, "plan_digest": request.sampling.plan_digest}
    document |= {"T": request.T, "shape": request.shape, "floats": request.floats}
    fields |= {"owner": request.owner, "request": _json(document), "served": _json(asdict(job.model))}
    return Record(**fields | end)


def concluded(
    job: Job,
    pngs: Mapping[str, bytes],
    status: str,
    finished_at: float,
    ended: float,
    error: ProblemDocument | None,
) -> Record:
    """The row of a job that has ended, by the wall clock and by the one that does not jump. Its last message, which is
    sent when the row is on disk, is counted already. pngs: those that are kept, by their hashes"""
    return to_record(
        job,
        status=status,
        finished_at=finished_at,
        ended=ended,
        steps=_json(job.steps),
        error=_json(error) if error is not None else None,
        messages=len(job.stream.kept) + 1,
        delivery=job.delivery,
        images=tuple(
            ImageRow(index=i, seed=image.seed, sha256=image.sha256, size=len(pngs[image.sha256]), message=image.message)
            for i, image in sorted(job.images.items() if pngs else ())
        ),
    )


def answered_from_cache(job: Job, now: float, ended: float) -> Record:
    """The row of a job if all of its pictures are in the cache; the store fills in their hashes and sizes."""
    seed, n = job.request.seed, job.request.n
    return to_record(
        job,
        status="succeeded",
        started_at=now,
        finished_at=now,
        ended=ended,
        steps=_json([job.request.sampling.steps] * n),
        messages=2 + n,
        delivery=job.delivery,
        images=tuple(ImageRow(index=i, seed=seed + i, sha256="", size=0, message=2 + i) for i in range(n)),
    )


def to_job(record: Record, read: Read, counts: StreamCounts) -> Job:
    """The job of a row. If it has ended, everything that can be asked of it is as it was, except for frames.

    read: gives the PNG of a job's image.
    """
    fields: dict[str, Any] = {name: getattr(record, name) for name in COMMON}
    request, model = _request(record.request, record.owner), ModelStatus(**json.loads(record.served))
    job = Job(**fields, request=request, model=model, counts=counts, state=State(record.status or "queued"))
    if record.status is not None:
        _restore_result(job, record, read)
    job.delivery = record.delivery or job.delivery  # the last message told of it as it was then
    return job


def _restore_result(job: Job, record: Record, read: Read) -> None:
    """What a job had come to, and its stream from `started` to the end."""
    job.steps = json.loads(record.steps or "[]")
    if record.error is not None:
        job.error = error = json.loads(record.error)
        job.failure = Recalled(Problem(error["status"], error["code"], error["detail"], error.get("errors", [])))
    if job.started_at is not None:
        job.stream.keep_text("started", steps=job.updates)
    for kept in sorted(record.images, key=lambda kept: kept.message):
        job.stream.skip_to(kept.message)
        job.finish(stored(job, kept, read))
    job.stream.skip_to(record.messages)
    job.stream.end(job.status, document=job.document())


def stored(job: Job, kept: ImageRow, read: Read) -> Image:
    """A picture on disk."""
    index, seed, message = kept.index, kept.seed, kept.message
    return Image(index=index, seed=seed, read=partial(read, job, kept), known_sha256=kept.sha256, message=message)
