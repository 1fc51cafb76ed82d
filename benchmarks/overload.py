"""A thousand requests at the same moment where there is room for 64: what the 64 lose by the others.

    python -m benchmarks.overload

Throughput is counted from that moment to the end of the last job that was accepted, in turns with runs in which only
those 64 ask.
"""

import argparse
import asyncio
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from benchmarks.loopback import a_server
from benchmarks.measure import Measure, median_ratio

ROOM, STEPS, ASKING, ROUNDS = 64, 100, 1000, 3


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client got, and when, in seconds after it asked."""

    status: int
    headers: dict[str, str]
    after_s: float


async def post(port: int, body: dict[str, int], later: bool, go: asyncio.Event) -> Reply:
    """One request over a connection of its own that is there when `go` is set."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    prefer = "prefer: respond-async\r\n" if later else ""
    head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{prefer}"
    await go.wait()
    began = time.monotonic()
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    after_s = time.monotonic() - began
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    writer.close()
    return Reply(int(status.split()[1]), headers, after_s)


async def flood(port: int, count: int, steps: int) -> list[Reply]:
    """So many requests at the same moment, every other one asynchronous."""
    go = asyncio.Event()
    asking = [asyncio.create_task(post(port, {"seed": i, "steps": steps}, i % 2 == 1, go)) for i in range(count)]
    await asyncio.sleep(0.5)
    go.set()
    return await asyncio.gather(*asking)


def run(url: str, count: int) -> tuple[float, list[Reply]]:
    """Seconds per accepted job, and what everybody was answered."""
    port = urlsplit(url).port
    assert port is not None
    began = time.monotonic()
    replies = asyncio.run(flood(port, count, STEPS))
    while not _idle(url):
        time.sleep(0.02)
    accepted = sum(reply.status in (200, 202) for reply in replies)
    return (time.monotonic() - began - 0.5) / accepted, replies


def _idle(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return b"\nddpm_steps_waiting 0.0\n" in answer.read()


def measures(device: torch.device, digits: Path) -> Iterator[Measure]:
    """Everything this file measures."""
    os.environ["DDPM_MAX_QUEUED_STEPS"] = str(ROOM * STEPS)
    alone, crowded, replies = list[float](), list[float](), list[Reply]()
    with a_server(digits, 8, device) as url:
        for _ in range(ROUNDS):
            alone.append(run(url, ROOM)[0])
            seconds, answers = run(url, ASKING)
            crowded.append(seconds)
            replies += answers
    del os.environ["DDPM_MAX_QUEUED_STEPS"]
    ratio, spread = median_ratio(alone, crowded)
    yield Measure(f"{ASKING} at once, room for {ROOM}: throughput", ratio, "of an unloaded run", spread)
    refused = sorted(reply.after_s for reply in replies if reply.status == 429)
    yield Measure("refusals, median and last", refused[len(refused) // 2], "s", (refused[0], refused[-1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "digits")
    for measure in measures(torch.device("cpu"), parser.parse_args().weights):
        print(f"{measure.name:50} {measure.value:8.3f} {measure.unit} {measure.spread}", flush=True)
