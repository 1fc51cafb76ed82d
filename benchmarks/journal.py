"""The journal by itself: how many jobs a second can be accepted, beside what one sync of this disk takes."""

import asyncio
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.loopback import a_server
from benchmarks.measure import Measure
from server.store.records import Record
from server.store.store import Store

JOBS, AT_ONCE, ROUNDS = 4000, 256, 5
REQUEST, STATUS = '{"model":"digits","seed":1,"steps":100}' + " " * 200, "{}" + " " * 400  # as long as they are


def a_job(id: str) -> Record:
    """A job as it is written down when it is accepted."""
    return Record(
        id=id,
        owner=None,
        key=None,
        fingerprint=None,
        created_at=0.0,
        arrived=0.0,
        request=REQUEST,
        served=STATUS,
        attached=False,
    )


def sync_s(folder: Path) -> list[float]:
    """Seconds of a sync of a page that was appended to a file."""
    took = []
    with open(folder / "page", "wb", buffering=0) as file:
        for _ in range(50):
            file.write(os.urandom(4096))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return took


async def _insert(folder: Path, rounds: int) -> list[float]:
    """Jobs a second, of each round, that so many callers at once have got into the journal."""
    store = Store(folder)
    store.start()
    rates = []
    for number in range(rounds):

        async def caller(first: int, number: int = number) -> None:
            for i in range(first, JOBS, AT_ONCE):
                await store.insert(a_job(f"{number}-{i}"))

        began = time.perf_counter()
        await asyncio.gather(*(caller(first) for first in range(AT_ONCE)))
        rates.append(JOBS / (time.perf_counter() - began))
    await store.close()
    return rates


def accept_s(url: str, times: int) -> list[float]:
    """Seconds until an idle server has answered 202. Each job ends before the next one comes."""
    took = []
    for seed in range(times):
        data = json.dumps({"seed": seed, "steps": 1, "frames": None}).encode()
        headers = {"content-type": "application/json", "prefer": "respond-async"}
        began = time.perf_counter()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/generate", data, headers)) as answer:
            id = json.load(answer)["id"]
        took.append(time.perf_counter() - began)
        status = "queued"
        while status in ("queued", "running"):
            time.sleep(0.02)
            with urllib.request.urlopen(f"{url}/jobs/{id}") as answer:
                status = json.load(answer)["status"]
    return took


def _measure(name: str, values: list[float], unit: str) -> Measure:
    return Measure(name, statistics.median(values), unit, (min(values), max(values)))


def measures(device: torch.device, digits: Path) -> Iterator[Measure]:
    """Everything this file measures."""
    build = Path("build")  # on the disk that this is on: a temporary folder may well be in memory
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        yield _measure("journal: one sync of this disk", [s * 1e3 for s in sync_s(Path(folder))], "ms")
        rates = asyncio.run(_insert(Path(folder) / "store", ROUNDS))
        yield _measure(f"journal: jobs accepted by {AT_ONCE} callers at once", rates, "jobs/s")
    with a_server(digits, 4, device) as url:
        accept_s(url, 5)
        yield _measure("server: an idle accept, on disk", [s * 1e3 for s in accept_s(url, 40)], "ms")
