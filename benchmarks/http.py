"""The server beside what people run today, over HTTP: throughput when saturated, and latency under the same load.

    python -m benchmarks.http [--gpu] [--only STEPS]

Requests are drawn from a mixture of step counts. Saturated: a fixed number is always outstanding. Under load: they
arrive as a Poisson process (open loop: nobody waits for anybody), at the rate that saturates the best of the others.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import torch

from benchmarks.loopback import a_server
from benchmarks.measure import Measure, report

Mixture = dict[int, float]  # share of requests by steps
MIXTURE: Mixture = {50: 0.4, 100: 0.3, 250: 0.2, 500: 0.1}
OUTSTANDING, WARM_S, SATURATED_S, LOAD_S, PATIENCE_S = 32, 10.0, 30.0, 75.0, 60.0
DIGITS = Path(__file__).parent / "digits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A server to be measured."""

    name: str
    kind: str  # of which only the best is held against us
    slots: int  # of each engine
    engines: int = 1
    peer: tuple[str, ...] = ()  # arguments of benchmarks.peers; none: ours

    def serve(self, weights: Path, device: torch.device) -> AbstractContextManager[str]:
        """It, ready; its address."""
        return a_server(weights, self.slots, device, *self.peer, engines=self.engines)

    def why_not(self, device: torch.device) -> str:
        """Why it cannot take part; empty if it can. Engines and workers share the cores of a CPU, but no GPU."""
        if self.engines > 1 and device.type != "cpu":
            return "one engine has the whole device"
        if "openvino" in self.peer and device.type != "cpu":
            return "it runs on CPUs"
        missing = [package for package in PACKAGES if package in self.peer and find_spec(package) is None]
        return f"{' and '.join(missing)} cannot be found" if missing else ""


PACKAGES = ("litserve", "openvino")  # words among the arguments of a peer that are also what it needs
LITSERVE, WITH_OPENVINO = ("litserve",), ("litserve", "--net", "openvino")
OURS = [
    Contender(name="ours", kind="ours", slots=16),
    Contender(name="ours, 2 engines", kind="ours", slots=16, engines=2),
]
OTHERS = [
    *(
        contender
        for kind, peer in (("LitServe's step loop", LITSERVE), ("LitServe's step loop with OpenVINO", WITH_OPENVINO))
        for contender in (
            Contender(name=f"{kind}, batch 8", kind=kind, peer=peer, slots=8),
            Contender(name=f"{kind}, batch 32", kind=kind, peer=peer, slots=32),
            Contender(name=f"{kind}, 2 workers of 16", kind=kind, peer=peer, slots=16, engines=2),
        )
    ),
    Contender(name="micro-batcher, 20 ms and 8", kind="micro-batcher", peer=("batcher",), slots=8),
    Contender(name="DDPMPipeline, one at a time", kind="one at a time", peer=("pipeline",), slots=1),
]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request."""

    steps: int
    sent: float
    took_s: float  # infinite if it had not come when patience ran out

    def steps_within(self, began: float, ended: float) -> float:
        """How many of its steps fall into this time, if they came evenly."""
        overlap = min(self.sent + self.took_s, ended) - max(self.sent, began)
        return self.steps * max(0.0, overlap) / self.took_s


def draw_steps(draw: random.Random, mixture: Mixture) -> int:
    """A step count from the mixture."""
    return draw.choices(list(mixture), list(mixture.values()))[0]


async def ask(client: httpx.AsyncClient, seed: int, steps: int) -> Answer:
    """One picture."""
    began = time.monotonic()
    answer = await client.post("/generate", json={"seed": seed, "steps": steps})
    answer.raise_for_status()
    return Answer(steps, began, time.monotonic() - began)


def client_of(url: str) -> httpx.AsyncClient:
    """A client that waits as long as it takes."""
    return httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None))


async def saturate(url: str, mixture: Mixture) -> float:
    """Image-steps per second while `OUTSTANDING` requests are always waiting or being made."""
    draw, answers, began = random.Random(0), list[Answer](), time.monotonic() + WARM_S
    ended = began + SATURATED_S

    async def keep_asking(client: httpx.AsyncClient) -> None:
        while time.monotonic() < ended:
            answers.append(await ask(client, draw.randrange(1 << 40), draw_steps(draw, mixture)))

    async with client_of(url) as client:
        await asyncio.gather(*(keep_asking(client) for _ in range(OUTSTANDING)))
    return sum(answer.steps_within(began, ended) for answer in answers) / SATURATED_S


async def load(url: str, rate: float, mixture: Mixture, load_s: float = LOAD_S) -> list[Answer]:
    """The answers to Poisson arrivals, so many requests a second, for so long: the same ones for everybody."""
    draw, asked = random.Random(1), []

    async def later(client: httpx.AsyncClient, at: float, seed: int, steps: int) -> Answer:
        await asyncio.sleep(at)
        sent = time.monotonic()
        try:
            async with asyncio.timeout(load_s + PATIENCE_S - at):
                return await ask(client, seed, steps)
        except TimeoutError:
            return Answer(steps, sent, float("inf"))

    async with client_of(url) as client:
        at = draw.expovariate(rate)
        while at < load_s:
            asked.append(asyncio.create_task(later(client, at, draw.randrange(1 << 40), draw_steps(draw, mixture))))
            at += draw.expovariate(rate)
        return await asyncio.gather(*asked)


async def same_bytes(url: str) -> bool:
    """Whether a picture has the same bytes alone as it has in company."""
    async with client_of(url) as client:
        alone = (await client.post("/generate", json={"seed": 42, "steps": 50})).content
        company = [asyncio.create_task(ask(client, i, 100)) for i in range(7)]
        await asyncio.sleep(0.2)
        beside = (await client.post("/generate", json={"seed": 42, "steps": 50})).content
        await asyncio.gather(*company)
    return alone == beside


async def padded(url: str) -> float:
    """What share of the steps our server has computed was for nobody."""
    async with client_of(url) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    made, wasted = (
        next(float(line.split()[1]) for line in lines if line.startswith(f"ddpm_{name}_total "))
        for name in ("sample_steps", "padded_slots")
    )
    return wasted / (made + wasted)


def late(took: Iterable[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(took)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def latencies(name: str, answers: list[Answer]) -> Iterator[Measure]:
    """Median and 99th percentile by steps."""
    for steps in sorted({answer.steps for answer in answers}):
        took = [a.took_s for a in answers if a.steps == steps]
        spread = (min(took), late(took))
        yield Measure(f"{name}: {steps} steps, p50 and p99 of {len(took)}", statistics.median(took), "s", spread)


def measures(device: torch.device, digits: Path, mixture: Mixture = MIXTURE) -> Iterator[Measure]:
    """Everything this file measures."""
    there = []
    for contender in (*OURS, *OTHERS):
        if reason := contender.why_not(device):
            print(f"left out: {contender.name}: {reason}", flush=True)
        else:
            there.append(contender)
    capacity: dict[Contender, float] = {}
    for contender in there:
        with contender.serve(digits, device) as url:
            asyncio.run(warm(url))
            equal = asyncio.run(same_bytes(url))
            capacity[contender] = asyncio.run(saturate(url, mixture))
            if not contender.peer:
                yield Measure(f"{contender.name}: steps computed for nobody", asyncio.run(padded(url)), "of all")
        yield Measure(f"{contender.name}: saturated", capacity[contender], "image-steps/s")
        yield Measure(f"{contender.name}: the same bytes in company", float(equal), "(1: yes)")
    yield from against_the_best(capacity)
    yield from under_load(device, digits, mixture, capacity)


def against_the_best(capacity: Mapping[Contender, float]) -> Iterator[Measure]:
    """Our throughput against the best of each kind, under which settings it may be."""
    ours = [contender for contender in capacity if not contender.peer]
    for mine in ours:
        for kind in dict.fromkeys(contender.kind for contender in capacity if contender.peer):
            best = max((c for c in capacity if c.kind == kind), key=lambda contender: capacity[contender])
            ratio = capacity[mine] / capacity[best]
            yield Measure(f"{mine.name}, against {best.name}", ratio, "times the throughput")


def under_load(
    device: torch.device, digits: Path, mixture: Mixture, capacity: Mapping[Contender, float]
) -> Iterator[Measure]:
    """Latencies at the rate that saturates the best of the others, and our 99th percentile against its."""
    ours, others = ([c for c in capacity if bool(c.peer) == theirs] for theirs in (False, True))
    best, shortest = max(others, key=lambda contender: capacity[contender]), min(mixture)
    rate = capacity[best] / sum(steps * share for steps, share in mixture.items())
    latest: dict[Contender, float] = {}
    for contender in (best, *ours):
        with contender.serve(digits, device) as url:
            asyncio.run(warm(url))
            answers = asyncio.run(load(url, rate, mixture))
        latest[contender] = late(a.took_s for a in answers if a.steps == shortest)
        yield from latencies(f"{rate:.2f} requests/s, {contender.name}", answers)
    for mine in ours:
        name = f"{shortest}-step requests, p99: {mine.name}, against {best.name}"
        yield Measure(name, latest[mine] / latest[best], "of its time")


async def warm(url: str) -> None:
    """Whatever a first request warms up."""
    async with client_of(url) as client:
        await asyncio.gather(*(ask(client, i, 20) for i in range(OUTSTANDING)))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on the first GPU (default: on the CPU)")
    parser.add_argument("--only", type=int, metavar="STEPS", help="all requests alike (default: a mixture)")
    parser.add_argument("--out", type=Path, default=Path("build/http.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    mixture = {args.only: 1.0} if args.only else MIXTURE
    report(measures(torch.device("cuda" if args.gpu else "cpu"), DIGITS, mixture), args.out)


if __name__ == "__main__":
    main()
