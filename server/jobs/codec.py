"""Jobs as rows of the journal, and back: everything that must outlive the server."""

import json
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from model.sampling.plan import Sampling
from server.errors import Problem, Recalled
from server.jobs.job import Image, Job, State, StoredImage
from server.jobs.request import FramePoints, ResolvedRequest, fingerprint
from server.jobs.schemas import Frames
from server.jobs.stream import Shown, StreamCounts, Text
from server.store.blobs import Blobs
from server.store.rows import ImageRow, Record
from server.worker.messages import ModelStatus


def identities(job: Job) -> list[str]:
    """A hash of all that decides each picture of a job, which is what its PNG's text chunks say; and of its owner: one
    tenant need not know what another has asked for."""
    owner, found = {"owner": job.request.owner}, []
    for index in range(job.request.n):
        image = job.images.get(index)
        texts = image.texts if isinstance(image, Image) else job.texts(job.request.seed + index)
        found.append(fingerprint({**texts, **owner}))
    return found


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _request_to_json(request: ResolvedRequest) -> str:
    return _json(request.document() | {"T": request.T, "shape": request.shape, "floats": request.floats})


def _request_from_json(text: str, owner: str | None) -> ResolvedRequest:
    fields = json.loads(text)
    sampling = Sampling(**{name: fields[name] for name in Sampling.__slots__})
    frames = Frames(**fields["frames"]) if fields["frames"] is not None else None
    return ResolvedRequest(
        model=fields["model"],
        T=fields["T"],
        shape=tuple(fields["shape"]),
        seed=fields["seed"],
        n=fields["n"],
        sampling=sampling,
        frames=FramePoints.of(frames, sampling.steps, sampling.steps) if frames is not None else None,
        priority=fields["priority"],
        deadline_s=fields["deadline_s"],
        floats=fields["floats"],
        owner=owner,
    )


def to_record(job: Job) -> Record:
    """The row of a job when it is accepted."""
    return Record(
        id=job.id,
        owner=job.request.owner,
        key=job.key,
        fingerprint=job.fingerprint,
        created_at=job.created_at,
        arrived=job.arrived,
        request=_request_to_json(job.request),
        served=_json(asdict(job.model)),
        attached=job.attached,
        attempt=job.attempt,
        deaths=job.deaths,
    )


def concluded(job: Job, status: str, finished_at: float, ended: float, error: dict[str, Any] | None) -> Record:
    """The row of a job that has ended, by the wall clock and by the one that does not jump. Its last message, which is
    sent when the row is on disk, is counted already."""
    made = sorted(job.images.items()) if status == "succeeded" else []
    return replace(
        to_record(job),
        status=status,
        started_at=job.started_at,
        finished_at=finished_at,
        ended=ended,
        steps=_json(job.steps),
        error=_json(error) if error is not None else None,
        messages=len(job.stream.kept) + 1,
        images=tuple(
            ImageRow(index=i, seed=image.seed, sha256=image.sha256, size=len(image.png), message=image.message)
            for i, image in made
        ),
    )


def answered_from_cache(job: Job, now: float, ended: float) -> Record:
    """The row of a job if all of its pictures are in the cache; the store fills in their hashes and sizes."""
    request = job.request
    return replace(
        to_record(job),
        status="succeeded",
        started_at=now,
        finished_at=now,
        ended=ended,
        steps=_json([request.sampling.steps] * request.n),
        messages=2 + request.n,
        images=tuple(
            ImageRow(index=i, seed=request.seed + i, sha256="", size=0, message=2 + i) for i in range(request.n)
        ),
    )


def to_job(record: Record, blobs: Blobs, counts: StreamCounts) -> Job:
    """The job of a row. If it has ended, everything that can be asked of it is as it was, except for frames."""
    job = Job(
        id=record.id,
        request=_request_from_json(record.request, record.owner),
        model=ModelStatus(**json.loads(record.served)),
        counts=counts,
        created_at=record.created_at,
        arrived=record.arrived,
        attached=record.attached,
        key=record.key,
        fingerprint=record.fingerprint,
        attempt=record.attempt,
        deaths=record.deaths,
        state=State(record.status) if record.status is not None else State.QUEUED,
        started_at=record.started_at,
        finished_at=record.finished_at,
    )
    if record.status is not None:
        _restore_result(job, record, blobs)
    return job


def _restore_result(job: Job, record: Record, blobs: Blobs) -> None:
    """What a job had come to, and its stream from `started` to the end."""
    job.steps = json.loads(record.steps or "[]")
    if record.error is not None:
        job.error = json.loads(record.error)
        job.failure = Recalled(_problem(job.error))
    for kept in record.images:
        job.images[kept.index] = stored(kept, blobs)
    stream, first = job.stream, len(job.stream.kept)
    stream.skip(record.messages - first)
    if job.started_at is not None:
        body = {"type": "started", "job": job.id, "seq": first + 1, "steps": job.image_steps}
        stream.kept[first] = Text(first + 1, body)
    for image in job.images.values():
        header = {"job": job.id, "seq": image.message, **job.header_of(image)}
        stream.kept[image.message - 1] = Shown(image.message, header, False, False, partial(_png, image))
    last = {"type": job.status, "job": job.id, "seq": record.messages, "document": job.document()}
    stream.kept[-1], stream.closed = Text(record.messages, last), True


def stored(kept: ImageRow, blobs: Blobs) -> StoredImage:
    """A picture on disk."""
    read = partial(blobs.read, kept.sha256)
    return StoredImage(index=kept.index, seed=kept.seed, sha256=kept.sha256, message=kept.message, read=read)


def _png(image: Image | StoredImage) -> bytes:
    return image.png


def _problem(error: dict[str, Any]) -> Problem:
    return Problem(error["status"], error["code"], error["detail"], error.get("errors", []))
