"""Who waits for whom, over HTTP: another key's 5,000 pictures, and long requests among short ones.

    python -m benchmarks.fairness [--minutes 5]

Beside 5,000 pictures of one key, a picture of 50 steps of another: against what it takes when both keys hold half the
seats. Then requests of 50 to 1000 steps at 80 % of what a micro-batcher that batches equal step counts can do: the same
arrivals for the micro-batcher and for ours, and ours at 80 % of its own.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path

import httpx
import torch

from benchmarks import http
from benchmarks.http import DIGITS, OTHERS, OURS, Answer, Mixture
from benchmarks.loopback import a_server
from benchmarks.measure import Measure, report

MIXTURE: Mixture = {50: 0.4, 100: 0.3, 250: 0.15, 500: 0.1, 1000: 0.05}
FLOOD, STEPS, SLOTS, SAMPLES, SHARE = 5000, 50, 8, 20, 0.8
KEYS = {"many": "a-key-of-one-who-asks-for-much", "few": "a-key-of-one-who-asks-for-little"}


def client_of(url: str, name: str) -> httpx.AsyncClient:
    """A client with a key."""
    headers = {"authorization": f"Bearer {KEYS[name]}"}
    return httpx.AsyncClient(base_url=url, timeout=None, headers=headers)


async def take(client: httpx.AsyncClient, count: int = SAMPLES) -> list[float]:
    """Seconds of pictures of 50 steps, one after the other."""
    took = []
    for seed in range(count):
        began = time.monotonic()
        (await client.post("/generate", json={"seed": seed, "steps": STEPS})).raise_for_status()
        took.append(time.monotonic() - began)
        await asyncio.sleep(0.2)
    return took


async def beside_a_flood(url: str) -> list[float]:
    """One key asks for 5,000 pictures at once; what the other's take meanwhile."""
    async with client_of(url, "many") as many, client_of(url, "few") as few:
        jobs, left = list[str](), FLOOD
        while left:
            n = min(64, left)
            body = {"seed": left, "n": n, "steps": STEPS, "frames": None}
            answer = await many.post("/generate", json=body, headers={"prefer": "respond-async"})
            jobs.append(answer.raise_for_status().json()["id"])
            left -= n
        await asyncio.sleep(2.0)
        took = await take(few)
        for job in jobs:
            await many.delete(f"/jobs/{job}")
        return took


async def at_half_share(url: str) -> list[float]:
    """Each key keeps half of the seats, with one picture after the other."""
    over = asyncio.Event()

    async def keep_a_seat(client: httpx.AsyncClient, seed: int) -> None:
        while not over.is_set():
            await client.post("/generate", json={"seed": seed, "steps": STEPS})

    async with client_of(url, "many") as many, client_of(url, "few") as few:
        others = [(many, SLOTS // 2), (few, SLOTS // 2 - 1)]
        keeping = [asyncio.create_task(keep_a_seat(who, i)) for who, seats in others for i in range(seats)]
        await asyncio.sleep(2.0)
        took = await take(few)
        over.set()
        await asyncio.gather(*keeping)
        return took


def shares(device: torch.device, digits: Path) -> Iterator[Measure]:
    """The two keys."""
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
        print(
            *(f"{name}:{sha256(key.encode()).hexdigest()}" for name, key in KEYS.items()),
            sep="\n",
            file=file,
            flush=True,
        )
        os.environ["DDPM_API_KEYS"] = file.name
        with a_server(digits, SLOTS, device) as url:
            half, flooded = asyncio.run(at_half_share(url)), asyncio.run(beside_a_flood(url))
        del os.environ["DDPM_API_KEYS"]
    ratio = statistics.median(flooded) / statistics.median(half)
    yield Measure("a picture at half share", statistics.median(half), "s", (min(half), max(half)))
    yield Measure(f"beside {FLOOD} of another key", statistics.median(flooded), "s", (min(flooded), max(flooded)))
    yield Measure("the latter against the former", ratio, "of its time")


def mixed(device: torch.device, digits: Path, load_s: float) -> Iterator[Measure]:
    """The mixture at 80 % load."""
    batcher = next(contender for contender in OTHERS if contender.peer == ("batcher",))
    mean = sum(steps * share for steps, share in MIXTURE.items())
    rates, late = dict[str, float](), dict[str, float]()
    for contender in (batcher, OURS[0]):
        with contender.serve(digits, device) as url:
            asyncio.run(http.warm(url))
            capacity = asyncio.run(http.saturate(url, MIXTURE))
            yield Measure(f"{contender.name}: saturated", capacity, "image-steps/s")
            rates[contender.name] = SHARE * capacity / mean
            for of, rate in rates.items():
                name = f"{contender.name} at {SHARE:.0%} of {of} ({rate:.2f}/s)"
                answers: list[Answer] = asyncio.run(http.load(url, rate, MIXTURE, load_s))
                yield from http.latencies(name, answers)
                late[name] = http.late(a.took_s for a in answers if a.steps == STEPS)
    first, *ours = late
    for name in ours:
        yield Measure(f"p99 of {STEPS} steps: {name}", late[name] / late[first], "of the batcher's")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["shares", "mixed", "both"], default="both", help="(default: both)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each load (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/fairness.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cpu")
    parts = {"shares": shares(device, DIGITS), "mixed": mixed(device, DIGITS, args.minutes * 60)}
    report(chain.from_iterable(parts.values() if args.only == "both" else [parts[args.only]]), args.out)


if __name__ == "__main__":
    main()
