"""Copies what is sound of a damaged store into a new directory, which a server can start on."""

import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from server.errors import Gone, SettingsError
from server.store import deliveries, lock, rows, wal
from server.store.blobs import copy_file, is_sound, why_unreadable
from server.store.checks import PLAIN
from server.store.journal import PAGE_BYTES, create, mend
from server.store.records import (
    FIELDS,
    Delivery,
    ImageRow,
    Record,
    checksum,
    checksums,
    image_of,
    images_checksum,
    job_checksum,
    record_of,
)
from server.store.schema import JOURNAL, LOG, PICTURES, VERSION_2, as_storage_full, count_commit

MOST_UNREADABLE = 100_000  # numbers that are tried one by one where the table cannot be read
UNREADABLE = (sqlite3.Error, Gone, TypeError, ValueError)
INSERT = f"INSERT INTO jobs (number, {', '.join(FIELDS)}, {rows.CHECKSUMS}) VALUES ({'?, ' * len(FIELDS)} ?, ?, ?)"


@dataclass(slots=True)
class Salvaged:
    """What is in the new directory, and what could not be saved."""

    jobs: int = 0
    pictures: int = 0
    again: list[str] = field(default_factory=list)  # ended jobs that will run again: their pictures are not all sound
    lost: list[str] = field(default_factory=list)  # what cannot be read, in words


@dataclass(frozen=True, slots=True)
class State:
    """A copy of the journal. checked: its rows have checksums, which those of version 1 lack"""

    db: sqlite3.Connection
    checked: bool


def salvage(directory: Path, out: Path) -> Salvaged:
    """Writes every sound job of a store into a new one. No server starts on that before it is complete.

    Raises SettingsError unless `out` is empty or not there, StorageFull if it cannot be written.
    """
    if out.resolve().is_relative_to(directory.resolve()):
        raise SettingsError(f"{out} must not be in the data directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} must be a directory that is empty or does not exist")
    with as_storage_full(out):
        (out / PICTURES).mkdir(mode=0o700, parents=True)
        held = lock.opened(out, os.O_RDWR | os.O_CREAT)
        try:
            lock.hold(held, out)
            lock.write_floor(held, 1, "")  # the transaction below: without it the new store is refused
            if lock.read_floor(held) != (1, ""):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            create(out / JOURNAL)
            return _copy(directory, out)
        finally:
            os.close(held)


def _copy(directory: Path, out: Path) -> Salvaged:
    report = Salvaged()
    states = list(_states(directory, out))
    with closing(sqlite3.connect(out / JOURNAL, isolation_level=None)) as db:
        db.execute("BEGIN")
        for record, images in _jobs(states, report):
            try:
                _save(db, record, images, directory, out, report)
            except sqlite3.IntegrityError:  # it was deleted, and its Idempotency-Key used again
                report.lost.append(f"job number {record.number}: a later one has its id or its Idempotency-Key")
        report.again.reverse()
        report.lost.reverse()
        for table in PLAIN:
            _copy_table(states, db, table, report)
        count_commit(db)
        db.execute("COMMIT")
    for state in states:
        state.db.close()
    for left in out.glob("state*"):
        left.unlink()
    os.sync()
    return report


def _states(directory: Path, out: Path) -> Iterator[State]:
    """Copies of the journal, the best one first: with every sound page of the log, even behind a bad one; and as it was
    before the first bad one. Whatever of their rows fits its checksum is right."""
    journal, log = directory / JOURNAL, directory / LOG
    try:
        frames = wal.read(log) if why_unreadable(log) is None else None
    except ValueError:
        frames = wal.read_without_header(log, PAGE_BYTES)
    for number in range(1 if frames is None else 2):
        copy = out / f"state{number}"
        copy.write_bytes(b"")
        if journal.exists() and why_unreadable(journal) is None:  # else the log may still have much of it
            copy_file(journal, copy)
        if frames is not None:
            wal.apply(log, frames, copy, len(frames.pages) if number == 0 else frames.committed)
        version = mend(copy, (out / JOURNAL).read_bytes())
        db = sqlite3.connect(copy, isolation_level=None)
        db.row_factory = sqlite3.Row
        if version == 1:
            with suppress(*UNREADABLE):
                db.executescript(VERSION_2)
        yield State(db, checked=version > 1)


def _numbers(db: sqlite3.Connection) -> set[int]:
    """The numbers that jobs may have in a state: those in the table and in its indexes, and those between the first and
    the last place where the table cannot be read."""
    found, edges, highest = set[int](), list[int](), 0
    with suppress(*UNREADABLE):
        highest = int(db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()[0])
    for number, order in ((0, ""), (highest + 1, "DESC")):
        try:
            for (number,) in db.execute(f"SELECT number FROM jobs NOT INDEXED ORDER BY number {order}"):
                found.add(number)
        except UNREADABLE:
            edges.append(number)
    for index, where in (("unfinished", "IS NULL"), ("ends", "IS NOT NULL")):
        with suppress(*UNREADABLE):
            query = f"SELECT number FROM jobs INDEXED BY {index} WHERE status {where}"
            found.update(number for (number,) in db.execute(query))
    if edges:
        found.update(range(edges[0] + 1, min(edges[-1], edges[0] + MOST_UNREADABLE)))
    return found


def _jobs(states: list[State], report: Salvaged) -> Iterator[tuple[Record, tuple[ImageRow, ...] | None]]:
    """All jobs whose own rows are sound in some state, newest first, with their images: None if those of an ended job
    are sound in no state."""
    for number in sorted(set[int]().union(*(_numbers(state.db) for state in states)), reverse=True):
        failure: Exception | None = None
        for state in states:
            try:
                row = state.db.execute(f"{rows.SELECT} WHERE number = ?", (number,)).fetchone()
                if row is None:
                    continue
                record = record_of(row, ())
                plain = isinstance(json.loads(record.request), dict)  # all that can be known without a checksum
                if not plain or (state.checked and job_checksum(record) != row["checksum"]):
                    raise Gone("this job was damaged on disk")
            except UNREADABLE as error:
                failure = error
                continue
            written = row["images_checksum"] if state.checked else None
            yield replace(record, delivery=_delivery(states, number)), _images(states, record, written)
            break
        else:
            if failure is not None:
                report.lost.append(f"job number {number}: {failure}")


def _images(states: list[State], record: Record, written: int | None) -> tuple[ImageRow, ...] | None:
    """The images of a job that fit their checksum in some state. written: the checksum; None if there is none"""
    if record.status != "succeeded":  # others have none
        return ()
    for state in states:
        with suppress(*UNREADABLE):
            images = tuple(map(image_of, state.db.execute(rows.IMAGES, (record.number,))))
            if images_checksum(images) == written or (images and written is None):
                return images
    return None


def _delivery(states: list[State], number: int) -> Delivery | None:
    """How far the delivery of a job's webhook is, as the best state has it where it is sound."""
    for state in states:
        with suppress(*UNREADABLE):
            if (found := deliveries.read(state.db, number)) is not None:
                return found
    return None


def _save(
    db: sqlite3.Connection,
    record: Record,
    images: tuple[ImageRow, ...] | None,
    directory: Path,
    out: Path,
    report: Salvaged,
) -> None:
    """Writes a job, its pictures and the delivery of its webhook. If a picture or its row is damaged, the job is
    written as it was when it was accepted: the next server makes the same pictures, and sends the webhook unless its
    delivery had ended. A delivery that is damaged begins anew."""
    pngs = dict[str, bytes]()
    for image in images or ():
        with suppress(OSError):
            pngs[image.sha256] = (directory / PICTURES / image.sha256).read_bytes()
    if images is None or not all(is_sound(image.sha256, pngs.get(image.sha256, b"")) for image in images):
        report.again.append(record.id)
        empty: dict[str, Any] = dict.fromkeys(("status", "started_at", "finished_at", "ended", "steps", "error"))
        record = replace(record, **empty, messages=0, attempt=record.attempt + 1, attached=False)
        if record.delivery is not None and record.delivery.due is not None:
            record = replace(record, delivery=None)
        images, pngs = (), {}
    record = replace(record, images=images, delivery=record.delivery or deliveries.first(record))
    for name, png in pngs.items():
        (out / PICTURES / name).write_bytes(png)
    db.execute(INSERT, [record.number, *(getattr(record, name) for name in FIELDS), *checksums(record)])
    rows.insert_images(db, record.number, record.images)
    deliveries.insert(db, record.number, record.owner, record.delivery)
    report.jobs += 1
    report.pictures += len(pngs)


def _copy_table(states: list[State], db: sqlite3.Connection, table: str, report: Salvaged) -> None:
    """Copies the sound rows of a table, except for known pictures that were not saved."""
    columns, damaged = ", ".join(PLAIN[table]), dict[Any, None]()
    query = f"INSERT OR IGNORE INTO {table} ({columns}, checksum) VALUES (?, ?, ?)"
    for state in states:
        with suppress(*UNREADABLE):
            for *values, written in state.db.execute(f"SELECT {columns}, checksum FROM {table}"):
                if state.checked and checksum(*values) != written:
                    damaged[values[0]] = None
                elif table != "known" or rows.has_job(db, values[1]):
                    db.execute(query, (*values, checksum(*values)))
    saved = f"SELECT 1 FROM {table} WHERE {PLAIN[table][0]} = ?"  # as another state had it
    lost = (name for name in damaged if not db.execute(saved, (name,)).fetchone())
    report.lost += [f"the row of {name} in the table {table}" for name in lost]
