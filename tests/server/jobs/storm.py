"""A storm: clients ask for pictures while the server, its engine or both are killed again and again.

Whoever was told that a job was accepted remembers it here, outside of the server, and comes back for it at the end.

python -m tests.server.jobs.storm --kills 200 --jobs 10000
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

from tests.model.convert.directories import write_model
from tests.server.conftest import Server
from tests.server.jobs.test_metrics import balance, read
from tests.waiting import until

LATER = {"prefer": "respond-async"}
Request = tuple[int, int, int]  # seed, steps, n


@dataclass(slots=True)
class Log:
    """What the clients have been told."""

    accepted: dict[str, Request] = field(default_factory=dict)  # by job
    keys: set[str] = field(default_factory=set)  # of requests that were answered in the end
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    over: bool = False


def body(request: Request) -> dict[str, Any]:
    """A request as it is sent."""
    seed, steps, n = request
    return {"seed": seed, "steps": steps, "n": n, "frames": None}


def pictures(client: httpx.Client, document: dict[str, Any]) -> list[str]:
    """The hashes of a job's pictures, as they are sent."""
    return [sha256(client.get(image["url"]).content).hexdigest() for image in document["images"]]


class Storm:
    """Sixteen clients, and somebody with a hammer."""

    def __init__(self, server: Server, seed: int = 0, clients: int = 16) -> None:
        self.server, self.log, self.draw = server, Log(), random.Random(seed)
        self._clients = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(clients)]
        self._lock = threading.Lock()
        self.expected: dict[Request, list[str]] = {}

    def learn(self) -> None:
        """What every request gives while nothing happens."""
        with httpx.Client(base_url=self.server.client.base_url, timeout=60) as client:
            for request in itertools.product(range(0, 40, 4), (2, 9), (1, 3)):
                answer = client.post("/generate", json=body(request), headers={"accept": "application/json"})
                self.expected[request] = pictures(client, answer.json())

    def rage(self, kills: int, jobs: int = 0) -> None:
        """Kills so often, and until so many jobs have been accepted."""
        for thread in self._clients:
            thread.start()
        while self.log.kills < kills or len(self.log.accepted) < jobs:
            self._kill_something()
            self.log.kills += 1
        self.server.wait_until_ready()
        self.log.over = True
        for thread in self._clients:
            thread.join(120)

    def _kill_something(self) -> None:
        victim = self.draw.choice(("server", "engine", "both", "loading", "loading", "loading"))
        if victim != "loading":  # else whatever has been started is killed before it is ready
            self.server.wait_until_ready()
            time.sleep(self.draw.expovariate(3))
        else:
            time.sleep(self.draw.random())
        if victim in ("engine", "both"):
            (engine,) = until(lambda: self.server.engine_pids)  # the one before may have been killed a moment ago
            try:
                os.kill(engine, signal.SIGKILL)
            except OSError:
                pass  # it is on its way already
        if victim != "engine":
            self.server.kill()
            self.server.start()

    def _ask(self, number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=self.server.client.base_url, timeout=30) as client:
            for i in itertools.count():
                if self.log.over:
                    return
                request, key = draw.choice(list(self.expected)), f"{number}-{i}"
                job = self._insist(client, request, key, waits=draw.random() < 0.3)
                with self._lock:
                    self.log.keys.add(key)
                    if self.log.accepted.setdefault(job, request) != request:
                        self.log.wrong.append(f"{job} was given for two requests")

    def _insist(self, client: httpx.Client, request: Request, key: str, waits: bool) -> str:
        """Asks until there is an answer; the id of the job. waits: for the pictures, at first."""
        while True:
            headers = {"idempotency-key": key, "accept": "application/json"} | ({} if waits else LATER)
            try:
                answer = client.post("/generate", json=body(request), headers=headers)
            except httpx.TransportError:
                time.sleep(0.2)
                continue
            if answer.status_code == 200 and [i["sha256"] for i in answer.json()["images"]] != self.expected[request]:
                self.log.wrong.append(f"{answer.json()['id']} was answered with other pictures")
            if answer.status_code in (200, 202):
                return str(answer.json()["id"])
            if answer.status_code == 409:
                time.sleep(0.05)
            elif answer.status_code in (429, 503):
                time.sleep(0.2)
            else:
                self.log.wrong.append(f"{key} was answered with {answer.status_code}: {answer.text}")
                return key

    def reckon(self) -> list[str]:
        """Everything that is not as it was promised."""
        wrong = list(self.log.wrong)
        self._settle()
        with httpx.Client(base_url=self.server.client.base_url, timeout=60) as client:
            known = {job["id"]: job for job in self._all(client)}
            for id, request in self.log.accepted.items():
                job = known.get(id)
                if job is None:
                    wrong.append(f"{id} was lost")
                elif job["status"] != "succeeded":
                    wrong.append(f"{id} {job['status']}: {job['error']}")
                elif [image["sha256"] for image in job["images"]] != self.expected[request]:
                    wrong.append(f"{id} has other bytes")
            for id in self.draw.sample(sorted(self.log.accepted), min(200, len(self.log.accepted))):
                if (
                    known.get(id, {}).get("status") == "succeeded"
                    and pictures(client, known[id]) != self.expected[self.log.accepted[id]]
                ):
                    wrong.append(f"{id} is sent as other bytes")
            made = len(known) - len(self.expected)  # those of `learn` had no key
            if made != len(self.log.keys):
                wrong.append(f"{len(self.log.keys)} requests were made into {made} jobs")
            seen = read(client.get("/metrics").text)
        if balance(seen)[0] != balance(seen)[1] or seen["ddpm_replay_mismatch_total"]:
            wrong.append(f"the metrics do not add up: {balance(seen)}, {seen['ddpm_replay_mismatch_total']} mismatches")
        return wrong

    def _settle(self) -> None:
        def is_idle() -> bool:
            seen = read(self.server.client.get("/metrics").text)
            return seen["ddpm_jobs_running"] + seen["ddpm_jobs_waiting"] == 0

        until(is_idle, 120)

    def _all(self, client: httpx.Client) -> Iterator[dict[str, Any]]:
        after = ""
        while jobs := client.get(f"/jobs?limit=200{after}").json()["jobs"]:
            yield from jobs
            after = f"&after={jobs[-1]['id']}"


def storm(weights: Path, kills: int, jobs: int = 0, seed: int = 0) -> tuple[Log, list[str]]:
    """A storm over a server of its own -> what was told, and what turned out not to be so."""
    server = Server(weights)
    try:
        over = Storm(server.wait_until_ready(), seed)
        over.learn()
        over.rage(kills, jobs)
        return over.log, over.reckon()
    finally:
        server.stop()


def main() -> int:
    """The long one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at least (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=10_000, help="accepted, at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of whom is killed when (default: %(default)s)")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log, wrong = storm(write_model(Path(folder) / "tiny").parent, args.kills, args.jobs, args.seed)
    print(*wrong, sep="\n")
    print(f"{log.kills} kills, {len(log.accepted)} jobs accepted, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
