"""What being watched costs a server, what a subscriber that never reads costs the others, and how right an ETA is."""

import asyncio
import json
import random
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from websockets.asyncio.client import connect

from benchmarks.loopback import a_server
from benchmarks.measure import Measure, interleaved, median_ratio

SLOTS, JOBS, STEPS = 16, 16, 100
LEAST_LEFT_S = 1.0  # an ETA that speaks of less is not judged
MIXTURE = (50, 50, 50, 50, 100, 100, 100, 250, 250, 500)  # steps, as benchmarks of queues draw them


async def watch(url: str, request: dict[str, Any]) -> list[tuple[float, float]]:
    """Makes a job and reads all that is sent. -> (when, seconds left as told), and (when it ended, 0) last."""
    told = []
    async with connect(f"{url.replace('http', 'ws', 1)}/generate/stream", compression=None) as subscriber:
        await subscriber.send(json.dumps(request))
        async for message in subscriber:
            if isinstance(message, str):
                heard = json.loads(message)
                if "eta_s" in heard:
                    told.append((time.monotonic(), heard["eta_s"]))
    return [*told, (time.monotonic(), 0.0)]


async def together(work: Callable[[int], Awaitable[object]]) -> None:
    """`JOBS` of them at once."""
    await asyncio.gather(*(work(i) for i in range(JOBS)))


def what_watching_costs(url: str) -> Iterator[Measure]:
    """The same jobs with frames and without, each over a websocket that is read to its end."""
    seeds = iter(range(1 << 40))

    def jobs(frames: dict[str, object] | None) -> Callable[[], None]:
        def one(_: int) -> Awaitable[object]:
            return watch(url, {"seed": next(seeds), "steps": STEPS, "frames": frames})

        return lambda: asyncio.run(together(one))

    seconds = interleaved({"unwatched": jobs(None), "watched": jobs({"count": 30})}, 15)
    for name, taken in seconds.items():
        rates = [JOBS * STEPS / s for s in taken]
        yield Measure(f"{JOBS} jobs, {name}", statistics.median(rates), "image-steps/s", (min(rates), max(rates)))
    ratio, spread = median_ratio(seconds["unwatched"], seconds["watched"])
    yield Measure("every job watched, 30 frames each", ratio, "of the throughput", spread)


def stall(url: str, job: str) -> socket.socket:
    """A subscriber that never reads."""
    host, _, port = url.removeprefix("http://").partition(":")
    subscriber = socket.socket()
    subscriber.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    subscriber.connect((host, int(port)))
    head = f"GET /jobs/{job}/stream HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    key = "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    subscriber.sendall((head + key).encode())
    return subscriber


def what_a_stalled_subscriber_costs(url: str) -> Iterator[Measure]:
    """A job of 64 pictures with every frame of both kinds, read by one subscriber, with and without one that stalls."""
    request = {"n": 64, "steps": 10, "frames": {"every": 1, "kind": "both"}}

    async def job(stalled: int) -> None:
        async with connect(f"{url.replace('http', 'ws', 1)}/generate/stream", compression=None) as subscriber:
            await subscriber.send(json.dumps(request))
            lazy: list[socket.socket] = []
            async for message in subscriber:
                if stalled and not lazy and isinstance(message, str):
                    lazy = [stall(url, json.loads(message)["job"]) for _ in range(stalled)]
            for each in lazy:
                each.close()

    seconds = interleaved({"alone": lambda: asyncio.run(job(0)), "beside": lambda: asyncio.run(job(1))}, 7)
    ratio, spread = median_ratio(seconds["beside"], seconds["alone"])
    yield Measure("a job beside a subscriber who never reads", ratio, "times as long", spread)


def how_right_an_eta_is(url: str) -> Iterator[Measure]:
    """Jobs of mixed length arrive a little faster than they can be done. Every ETA told is held against the end."""
    draw, errors, firsts = random.Random(1), [], []

    async def one(i: int) -> None:
        await asyncio.sleep(i * 0.15)
        *told, (end, _) = await watch(url, {"seed": i, "n": draw.randint(1, 3), "steps": draw.choice(MIXTURE)})
        shares = [abs(when + eta_s - end) / (end - when) for when, eta_s in told if end - when > LEAST_LEFT_S]
        errors.extend(shares)
        firsts.extend(shares[:1])

    async def all_of_them() -> None:
        await asyncio.gather(*(one(i) for i in range(60)))

    asyncio.run(all_of_them())
    for name, shares in (("first ETA of a job", firsts), ("every ETA", errors)):
        if len(shares) < 2:
            print(f"left out: {name}, since no job took {LEAST_LEFT_S:g} s", flush=True)
            continue
        deciles = statistics.quantiles(shares, n=10)
        yield Measure(f"{name}: error", statistics.median(shares), "of the time left", (deciles[0], deciles[-1]))


def measures(device: torch.device, digits: Path) -> Iterator[Measure]:
    """Everything this file measures."""
    with a_server(digits, SLOTS, device) as url:
        yield from what_watching_costs(url)
        yield from what_a_stalled_subscriber_costs(url)
        yield from how_right_an_eta_is(url)
