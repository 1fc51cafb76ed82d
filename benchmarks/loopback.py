"""The server over loopback beside the bare engine loop in this process: what HTTP, processes and PNGs cost."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from benchmarks.measure import Measure, interleaved, median_ratio
from benchmarks.models import our_engine, run_engine
from model.engine.engine import Engine

PATIENCE_S = 120  # until a server is ready


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked for at once, and how often."""

    clients: int = 4
    pictures: int = 4  # of each
    steps: int = 100
    rounds: int = 7

    @property
    def slots(self) -> int:
        """As many as there are pictures at once."""
        return self.clients * self.pictures


@dataclass(frozen=True, slots=True)
class Running:
    """A server that has been started, and may not be ready yet."""

    process: subprocess.Popen[bytes]
    url: str

    def ready(self) -> bool:
        """Whether it takes work. Raises RuntimeError if it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError("the server has ended")
        return _ready(self.url)


@contextmanager
def started(
    weights: Path, slots: int, device: torch.device, *peer: str, engines: int = 1, data: Path
) -> Iterator[Running]:
    """A server of its own that begins to load; ours, or one of `benchmarks.peers`. It is ended afterwards.

    slots: of each of its engines, or workers, which share the processor's cores.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    knobs = {
        "DATA_DIR": str(data),
        "RESULT_CACHE": "no",
        "WEIGHTS": str(weights),
        "SLOTS": str(slots),
        "DEVICE": str(device),
        "ENGINES": str(engines),
        "LOG_LEVEL": "warning",
    }
    environ = os.environ | {f"DDPM_{name}": value for name, value in knobs.items()}
    environ.pop("DDPM_COMMIT", None)  # ours; a server refuses what is no setting of its own
    theirs = ["benchmarks.peers", *peer, "--weights", str(weights), "--batch", str(slots), "--device", device.type]
    theirs += ["--workers", str(engines)]
    command = [sys.executable, "-m", *(theirs if peer else ["server", "serve"]), "--port", str(port)]
    quiet = subprocess.DEVNULL if peer else None
    process = subprocess.Popen(command, env=environ, stdout=quiet, stderr=quiet, start_new_session=bool(peer))
    try:
        yield Running(process, f"http://127.0.0.1:{port}")
    finally:
        if peer:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGKILL)  # LitServe's processes outlive a polite word
        process.terminate()
        process.wait(60)


@contextmanager
def a_server(weights: Path, slots: int, device: torch.device, *peer: str, engines: int = 1) -> Iterator[str]:
    """As `started`, with nothing kept from before, and ready. Yields its address."""
    with (
        tempfile.TemporaryDirectory() as data,
        started(weights, slots, device, *peer, engines=engines, data=Path(data)) as server,
    ):
        deadline = time.monotonic() + PATIENCE_S
        while not (server.ready() and (peer or _whole(server.url))):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready within {PATIENCE_S} s")
            time.sleep(0.1)
        yield server.url


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _whole(url: str) -> bool:
    """Whether every engine of ours has loaded: the server is ready when one has."""
    with urllib.request.urlopen(f"{url}/models") as answer:
        return None not in json.load(answer)["models"][0]["engines"]


def post(url: str, load: Load, seed: int) -> None:
    """One request for several pictures."""
    body = json.dumps({"seed": seed, "steps": load.steps, "n": load.pictures}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        answer.read()


def measures(device: torch.device, digits: Path) -> Iterator[Measure]:
    """Everything this file measures."""
    load = Load()
    yield from beside(our_engine(digits, device, load.slots), digits, load)


def beside(engine: Engine, digits: Path, load: Load) -> Iterator[Measure]:
    """A server of the digits beside this engine, which has them too, and as many slots."""
    seeds = iter(range(0, 1 << 40, load.pictures))
    with a_server(digits, load.slots, engine.runner.device) as url:

        def serve() -> None:
            with ThreadPoolExecutor(load.clients) as clients:
                list(
                    clients.map(partial(post, url, load), islice(seeds, load.clients))
                )  # raises what any of them raised

        turns = {"server": serve, "engine": lambda: run_engine(engine, load.slots, load.steps)}
        seconds = interleaved(turns, load.rounds)
    work = load.slots * load.steps
    for contender, taken in seconds.items():
        rates = [work / s for s in taken]
        yield Measure(
            f"digits, {load.slots} at once: {contender}",
            statistics.median(rates),
            "image-steps/s",
            (min(rates), max(rates)),
        )
    ratio, spread = median_ratio(seconds["engine"], seconds["server"])
    yield Measure(f"digits, {load.slots} at once: server against engine loop", ratio, "of its throughput", spread)
