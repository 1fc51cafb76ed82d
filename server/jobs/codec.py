"""Jobs as they are written down, and back: everything that must outlive the server."""

import json
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from typing import Any

from model.sampling.plan import Sampling
from server.errors import Problem, Recalled
from server.jobs.job import Image, Job, ResolvedRequest, StoredImage, Watched, frame_points
from server.jobs.schemas import Frames
from server.jobs.stream import Shown, Subscribers, Text
from server.store.blobs import Blobs
from server.store.rows import ImageRow, Record
from server.worker.messages import ModelStatus


def identities(job: Job) -> list[str]:
    """A hash of all that decides each picture of a job, which is what its PNG says of itself; and of its owner, since
    nobody need know what another has asked for."""
    owner, found = {"owner": job.request.owner}, []
    for index in range(job.request.n):
        image = job.images.get(index)
        texts = image.texts if isinstance(image, Image) else job.texts(job.request.seed + index)
        found.append(sha256(json.dumps({**texts, **owner}, sort_keys=True).encode()).hexdigest())
    return found


def _order_to_json(order: ResolvedRequest) -> str:
    return _json(order.fields() | {"T": order.T, "shape": order.shape, "floats": order.wants_floats})


def _order_from_json(text: str, owner: str | None) -> ResolvedRequest:
    fields = json.loads(text)
    sampling = Sampling(**{name: fields[name] for name in Sampling.__slots__})
    watched = None
    if fields["frames"] is not None:
        frames = Frames(**fields["frames"])
        watched = Watched(frames, frame_points(frames, sampling.steps, sampling.steps))
    rest = (fields["priority"], fields["deadline_s"], fields["floats"], owner)
    shape = tuple(fields["shape"])
    return ResolvedRequest(fields["model"], fields["T"], shape, fields["seed"], fields["n"], sampling, watched, *rest)


def to_record(job: Job) -> Record:
    """A job as it is written down when it is accepted."""
    return Record(
        id=job.id,
        owner=job.request.owner,
        key=job.key,
        fingerprint=job.fingerprint,
        created_at=job.created_at,
        arrived=job.arrived,
        request=_order_to_json(job.request),
        served=_json(asdict(job.served)),
        attached=job.attached,
        attempt=job.attempt,
        deaths=job.deaths,
    )


def concluded(job: Job, status: str, finished_at: float, ended: float, error: dict[str, Any] | None) -> Record:
    """The same once it has ended, by both clocks; its last message is said when this is on disk."""
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


def had_before(job: Job, now: float, ended: float) -> Record:
    """The same if all of its pictures are here already; their hashes and sizes are for the store to fill in."""
    order = job.request
    return replace(
        to_record(job),
        status="succeeded",
        started_at=now,
        finished_at=now,
        ended=ended,
        steps=_json([order.sampling.steps] * order.n),
        messages=2 + order.n,
        images=tuple(ImageRow(index=i, seed=order.seed + i, sha256="", size=0, message=2 + i) for i in range(order.n)),
    )


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def to_job(record: Record, blobs: Blobs, audience: Subscribers) -> Job:
    """A job that was written down. If it had ended, all that can be asked of it is as it was, but for frames."""
    job = Job(
        record.id,
        _order_from_json(record.request, record.owner),
        ModelStatus(**json.loads(record.served)),
        audience,
        record.created_at,
        record.arrived,
        attached=record.attached,
        key=record.key,
        fingerprint=record.fingerprint,
        attempt=record.attempt,
        deaths=record.deaths,
    )
    if record.status is not None:
        _conclude(job, record, blobs)
    return job


def _conclude(job: Job, record: Record, blobs: Blobs) -> None:
    """What had come of it, and its stream from `started` to the end."""
    job.status, job.started_at, job.finished_at = record.status or "", record.started_at, record.finished_at
    job.steps = json.loads(record.steps or "[]")
    if record.error is not None:
        job.error = json.loads(record.error)
        job.failure = Recalled(_problem(job.error))
    for kept in record.images:
        job.images[kept.index] = stored(kept, blobs)
    feed, first = job.stream, len(job.stream.kept)
    feed.skip(record.messages - first)
    if job.started_at is not None:
        body = {"type": "started", "job": job.id, "seq": first + 1, "steps": job.request.image_steps}
        feed.kept[first] = Text(first + 1, body)
    for image in job.images.values():
        header = {"job": job.id, "seq": image.message, **job.header_of(image)}
        feed.kept[image.message - 1] = Shown(image.message, header, False, False, partial(_png, image))
    last = {"type": job.status, "job": job.id, "seq": record.messages, "document": job.document()}
    feed.kept[-1], feed.ended = Text(record.messages, last), True


def stored(kept: ImageRow, blobs: Blobs) -> StoredImage:
    """A picture on disk."""
    return StoredImage(kept.index, kept.seed, kept.sha256, kept.message, partial(blobs.read, kept.sha256))


def _png(image: Image | StoredImage) -> bytes:
    return image.png


def _problem(error: dict[str, Any]) -> Problem:
    return Problem(error["status"], error["code"], error["detail"], error.get("errors", []))
