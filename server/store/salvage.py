"""Copies what is sound of a damaged store into a new directory, which a server can start on."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from server.errors import Gone, SettingsError
from server.store import deliveries, rows, wal
from server.store.blobs import is_sound
from server.store.checks import PLAIN
from server.store.journal import create, migrate
from server.store.records import FIELDS, Record, checksum, job_checksum
from server.store.schema import JOURNAL, LOG, PICTURES

MOST_UNREADABLE = 100_000  # numbers that are tried one by one where the table cannot be read
PAGE_BYTES = 4096  # as SQLite chooses it
UNREADABLE = (sqlite3.Error, Gone, TypeError, ValueError)
INSERT = f"INSERT INTO jobs (number, {', '.join(FIELDS)}, checksum) VALUES ({'?, ' * len(FIELDS)} ?, ?)"


@dataclass(slots=True)
class Salvaged:
    """What is in the new directory, and what could not be saved."""

    jobs: int = 0
    pictures: int = 0
    again: list[str] = field(default_factory=list)  # ended jobs that will run again: a picture was damaged
    lost: list[str] = field(default_factory=list)  # what cannot be read, in words


def salvage(directory: Path, out: Path) -> Salvaged:
    """Writes every sound job of a store into a new one. Raises SettingsError unless `out` is empty or not there."""
    if out.resolve().is_relative_to(directory.resolve()):
        raise SettingsError(f"{out} must not be in the data directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} must be a directory that is empty or does not exist")
    (out / PICTURES).mkdir(mode=0o700, parents=True)
    create(out / JOURNAL)
    report = Salvaged()
    states = list(_states(directory, out))
    jobs = _jobs(states, report)
    with closing(sqlite3.connect(out / JOURNAL, isolation_level=None)) as db:
        db.execute("BEGIN")
        for record in jobs:
            try:
                _save(db, record, directory, out, report)
            except sqlite3.IntegrityError:  # it was deleted, and its Idempotency-Key used again
                report.lost.append(f"job number {record.number}: a later one has its id or its Idempotency-Key")
        report.again.reverse()
        report.lost.reverse()
        for table in PLAIN:
            _copy(states, db, table, report)
        db.execute("COMMIT")
    for state in states:
        state.close()
    for left in out.glob("state*"):
        left.unlink()
    os.sync()
    return report


def _states(directory: Path, out: Path) -> Iterator[sqlite3.Connection]:
    """Copies of the journal, the best one first: with every sound page of the log, even behind a bad one; and as it was
    before the first bad one. Whatever of their rows fits its checksum is right."""
    journal, log = directory / JOURNAL, directory / LOG
    try:
        frames = wal.read(log)
    except ValueError:
        frames = wal.read_without_header(log, PAGE_BYTES)
    for number in range(1 if frames is None else 2):
        copy = out / f"state{number}"
        copy.write_bytes(b"")
        with suppress(FileNotFoundError):  # then the log may still have much of it
            shutil.copyfile(journal, copy)
        if frames is not None:
            wal.apply(log, frames, copy, len(frames.pages) if number == 0 else frames.committed)
        _mend_header(copy, (out / JOURNAL).read_bytes())
        db = sqlite3.connect(copy, isolation_level=None)
        db.row_factory = sqlite3.Row
        with suppress(*UNREADABLE):
            migrate(db)
        yield db


def _mend_header(path: Path, sound: bytes) -> None:
    """Writes into a copy of the journal what all journals have in their headers. sound: a new one"""
    pages = path.stat().st_size // PAGE_BYTES
    parts = {0: sound[:18] + b"\1\1" + sound[20:24], 28: pages.to_bytes(4), 44: sound[44:48], 56: sound[56:60]}
    with open(path, "r+b") as file:
        for at, part in parts.items():  # the ones at 18: there is no log
            file.seek(at)
            file.write(part)


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


def _jobs(states: list[sqlite3.Connection], report: Salvaged) -> Iterator[Record]:
    """All jobs that are sound in some state, newest first."""
    for number in sorted(set[int]().union(*map(_numbers, states)), reverse=True):
        failure = None
        for db in states:
            try:
                row = db.execute(f"{rows.SELECT} WHERE number = ?", (number,)).fetchone()
                if row is not None:
                    record = rows.read_job(db, row)
                    with suppress(*UNREADABLE):
                        record = replace(record, delivery=deliveries.read(db, number))
                    yield record
                    break
            except UNREADABLE as error:
                failure = error
        else:
            if failure is not None:
                report.lost.append(f"job number {number}: {failure}")


def _save(db: sqlite3.Connection, record: Record, directory: Path, out: Path, report: Salvaged) -> None:
    """Writes a job, its pictures and the delivery of its webhook. If a picture is damaged, the job is written as it was
    when it was accepted: the next server makes the same pictures. A delivery that is damaged begins anew."""
    pngs = dict[str, bytes]()
    for image in record.images:
        with suppress(OSError):
            pngs[image.sha256] = (directory / PICTURES / image.sha256).read_bytes()
    record = replace(record, delivery=record.delivery or deliveries.first(record))
    if not all(is_sound(image.sha256, pngs.get(image.sha256, b"")) for image in record.images):
        report.again.append(record.id)
        empty: dict[str, Any] = dict.fromkeys(("status", "started_at", "finished_at", "ended", "steps", "error"))
        record = replace(
            record, **empty, images=(), delivery=None, messages=0, attempt=record.attempt + 1, attached=False
        )
        pngs = {}
    for name, png in pngs.items():
        (out / PICTURES / name).write_bytes(png)
    db.execute(INSERT, [record.number, *(getattr(record, name) for name in FIELDS), job_checksum(record)])
    rows.insert_images(db, record.number, record.images)
    deliveries.insert(db, record.number, record.owner, record.delivery)
    report.jobs += 1
    report.pictures += len(pngs)


def _copy(states: list[sqlite3.Connection], db: sqlite3.Connection, table: str, report: Salvaged) -> None:
    """Copies the sound rows of a table, except for known pictures that were not saved."""
    columns = ", ".join(PLAIN[table])
    for state in states:
        with suppress(*UNREADABLE):
            for *values, written in state.execute(f"SELECT {columns}, checksum FROM {table}"):
                if checksum(*values) != written:
                    report.lost.append(f"the row of {values[0]} in the table {table}")
                elif table != "known" or rows.has_job(db, values[1]):
                    query = f"INSERT OR IGNORE INTO {table} ({columns}, checksum) VALUES (?, ?, ?)"
                    db.execute(query, (*values, written))
