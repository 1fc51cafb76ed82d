"""A storm over long jobs: the server, its engine or both are killed while jobs last from a second to minutes.

Two jobs are the reason of deaths themselves: they are to fail, each by its own step, and all others are to succeed with
the bytes that they have on a quiet server.

python -m tests.server.jobs.long_storm --kills 200
"""

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.model.convert.directories import write_model
from tests.server.conftest import Server
from tests.server.faults import faulty
from tests.waiting import Impatient, until

SHORTEST_S, LONGEST_S = 0.1, 60.0  # between two kills
OUTSTANDING = 16  # jobs that have not ended, at most
SIZES = ((60, 1), (1000, 1), (1000, 4), (1000, 32), (1000, 96))  # steps, n
SEEDS = 192  # of which every job takes some that follow each other
CRASHES, KILLS = 9001, 9002  # seeds of the jobs that end their engine, by an exit and by SIGKILL
FAULTS = ({"do": "die", "seed": CRASHES, "step": 40}, {"do": "kill", "seed": KILLS, "step": 40})
REASONS = ("engine", "engine", "server", "both")
PATIENCE_S = 3600.0  # for jobs to end once nobody kills anything
STEPS = sorted({steps for steps, _ in SIZES})


@dataclass(slots=True)
class Storm:
    """The jobs that were accepted, and what is to become of them."""

    server: Server
    draw: random.Random
    expected: dict[tuple[int, int], str] = field(default_factory=dict)  # by steps and seed: the picture's hash
    accepted: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # by job: seed, steps, n
    ended_itself: list[str] = field(default_factory=list)  # its exit code and the last line of its log

    def ask(self, seed: int, steps: int, n: int) -> str:
        """A job that has been accepted -> its id."""
        body = {"seed": seed, "steps": steps, "n": n, "frames": None}
        headers = {"prefer": "respond-async", "idempotency-key": str(self.draw.random())}
        while True:
            with suppress(httpx.TransportError):
                answer = self.server.client.post("/generate", json=body, headers=headers)
                if answer.status_code == 202:
                    self.accepted[str(answer.json()["id"])] = seed, steps, n
                    return str(answer.json()["id"])
            self.revive()
            time.sleep(0.1)

    def documents(self) -> dict[str, dict[str, Any]]:
        """All jobs that were accepted here, by id."""
        found: dict[str, dict[str, Any]] = {}
        after = ""
        while jobs := self.server.client.get(f"/jobs?limit=200{after}").json()["jobs"]:
            found |= {job["id"]: job for job in jobs}
            after = f"&after={jobs[-1]['id']}"
        return {id: found[id] for id in self.accepted if id in found}

    def learn(self) -> None:
        """What every seed gives while nothing happens."""
        jobs = [self.ask(first, steps, 64) for steps in STEPS for first in range(0, SEEDS, 64)]
        self.settle(PATIENCE_S)
        documents = self.documents()
        for id in jobs:
            _, steps, _ = self.accepted.pop(id)
            self.expected |= {(steps, image["seed"]): image["sha256"] for image in documents[id]["images"]}

    def revive(self) -> None:
        """Starts the server again if it has ended by itself."""
        if self.server.process.poll() is not None:
            self.ended_itself.append(f"the server ended with {self.server.process.returncode}: {self.server.last_line}")
            self.server.start()

    def rage(self, kills: int) -> None:
        """Kills so often, and keeps jobs outstanding."""
        for seed in (CRASHES, KILLS):
            self.ask(seed, 60, 1)
        for _ in range(kills):
            self.top_up()
            time.sleep(math.exp(self.draw.uniform(math.log(SHORTEST_S), math.log(LONGEST_S))))
            self.revive()
            victim = self.draw.choice(REASONS)
            if victim != "server":
                for pid in self.server.engine_pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            if victim != "engine":
                self.server.kill()
                self.server.start()

    def top_up(self) -> None:
        """Asks for more jobs, unless the server cannot be reached."""
        with suppress(httpx.TransportError, KeyError):
            left = [job for job in self.documents().values() if job["status"] in ("queued", "running")]
            for _ in range(OUTSTANDING - len(left)):
                steps, n = self.draw.choice(SIZES)
                self.ask(self.draw.randrange(SEEDS - n + 1), steps, n)

    def settle(self, patience_s: float) -> None:
        """Waits until every job has ended."""

        def is_over() -> bool:
            self.revive()
            with suppress(httpx.TransportError, KeyError):
                return all(job["status"] not in ("queued", "running") for job in self.documents().values())
            return False

        until(is_over, patience_s, pause_s=1.0)

    def wrong(self) -> list[str]:
        """Every job that did not come out as it should."""
        documents, wrong = self.documents(), list[str]()
        for id, (seed, steps, n) in self.accepted.items():
            job = documents.get(id)
            if job is None:
                wrong.append(f"{id} was lost")
            elif seed in (CRASHES, KILLS):
                if job["status"] != "failed" or job["error"]["code"] != "sample-failed":
                    wrong.append(f"{id} ended its engine and {job['status']}: {job['error']}")
            elif job["status"] != "succeeded":
                wrong.append(f"{id} (n = {n}, {steps} steps) {job['status']}: {job['error']}")
            elif [image["sha256"] for image in job["images"]] != [self.expected[steps, seed + i] for i in range(n)]:
                wrong.append(f"{id} has other bytes")
        return wrong


def storm(weights: Path, kills: int, seed: int = 0) -> tuple[Storm, list[str]]:
    """A storm over a server of its own -> what was accepted, and what came out wrong."""
    server = Server(weights, **faulty(*FAULTS), DDPM_MAX_N="256", DDPM_MAX_LIVE_BYTES=str(1 << 32))
    try:
        over = Storm(server.wait_until_ready(), random.Random(seed))
        over.learn()
        over.rage(kills)
        unsettled = []
        try:
            over.settle(PATIENCE_S)
        except Impatient as error:
            unsettled = [str(error)]
        return over, over.ended_itself + unsettled + over.wrong()
    finally:
        server.stop()


def main() -> int:
    """The whole storm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when (default: %(default)s)")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scheduler = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
        weights = write_model(Path(folder) / "long", scheduler=scheduler).parent
        over, wrong = storm(weights, args.kills, args.seed)
    print(*wrong, sep="\n")
    print(f"{args.kills} kills, {len(over.accepted)} jobs, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
