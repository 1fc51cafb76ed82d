"""Good, slow, killed and hostile clients together, for as long as is asked: `python -m tests.fuzz.soak --minutes 30`.

At every scrape, jobs accepted = succeeded + failed + cancelled + running + waiting; after the warm-up the server's
memory stays flat, but for the jobs that it keeps; at the end no descriptor is left, and nothing has been answered with
an error that was not documented.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.fuzz.sockets import converse
from tests.model.convert.directories import write_model
from tests.server.conftest import Server
from tests.server.jobs.test_metrics import balance, read
from tests.server.web.raw import HANDSHAKE, abort, connected, frame, open_files, request, resident_bytes, say, settles

MIB = 1 << 20
WARM_UP = 0.25  # of the time
GROWTH = 8 * MIB  # allowed after it, besides the jobs that are kept
KEPT_JOB_BYTES = 40_000  # of a job of up to three 8 x 8 pictures with its frames, generously
GOOD_PROGRAM = """
import sys, httpx
while True:
    httpx.post(sys.argv[1] + "/generate", json={"steps": 30, "n": 3}, timeout=60)
"""


class Soak:
    """Clients in threads, until it is over. What goes wrong in one of them is kept."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.url = server, f"http://127.0.0.1:{server.port}"
        self.over, self.wrong, self.done = threading.Event(), list[str](), 0
        self._chance = random.Random(seed)

    def client(self, act: Callable[[random.Random], None]) -> threading.Thread:
        """A thread that does this again and again."""
        chance = random.Random(self._chance.random())

        def run() -> None:
            while not self.over.is_set():
                try:
                    act(chance)
                    self.done += 1
                except Exception as error:  # whatever it is, the soak has failed, and says so at its end
                    self.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")
                    return self.over.set()

        thread = threading.Thread(target=run, name=act.__name__)
        thread.start()
        return thread

    def good(self, chance: random.Random) -> None:
        """Asks for pictures, and gets them."""
        body = {"seed": chance.randrange(100), "steps": chance.randint(1, 30), "n": chance.randint(1, 3)}
        answer = httpx.post(f"{self.url}/generate", json=body, timeout=60)
        assert answer.status_code in (200, 429), answer.text

    def slow(self, chance: random.Random) -> None:
        """Asks for a stream and hardly reads it."""
        with connected(self.server.port, 30) as connection:
            say(connection, HANDSHAKE.format(path="/generate/stream").encode())
            say(connection, frame(1, b'{"steps": 30, "n": 2, "frames": {"every": 1, "kind": "both"}}'))
            for _ in range(chance.randrange(20)):
                connection.recv(64)
                self.over.wait(0.05)
            abort(connection)

    def leaving(self, chance: random.Random) -> None:
        """Asks for pictures and is gone."""
        with connected(self.server.port) as connection:
            say(connection, request(body=b'{"steps": 30, "n": 3}')[: chance.randrange(60, 200)])
            self.over.wait(chance.random() / 20)
            abort(connection)

    def hostile(self, chance: random.Random) -> None:
        """Says what nobody should."""
        given = converse(self.server.port, chance.randrange(1 << 32))
        assert all(status < 500 or status == 503 for status in given), given

    def killed(self, chance: random.Random) -> None:
        """A program that is killed while it waits for pictures."""
        process = subprocess.Popen([sys.executable, "-c", GOOD_PROGRAM, self.url], stderr=subprocess.DEVNULL)
        self.over.wait(1 + chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()

    def scrape(self) -> dict[str, float]:
        """The metrics, which must balance."""
        values = read(self.server.client.get("/metrics").text)
        accepted, known = balance(values)
        assert accepted == known, values
        return values


def soak(server: Server, seconds: float, seed: int) -> dict[str, float]:
    """The whole of it. Raises AssertionError if anything is not as it must be."""
    pid, run = server.process.pid, Soak(server, seed)
    idle, began = open_files(pid), time.monotonic()
    acts = [run.good, run.good, run.slow, run.leaving, run.hostile, run.hostile, run.killed]
    threads = [run.client(act) for act in acts]
    warm, scrapes = (0.0, 0), 0
    while time.monotonic() - began < seconds and not run.over.wait(1):
        values, resident = run.scrape(), resident_bytes(pid)
        scrapes += 1
        if not warm[1] and time.monotonic() - began > seconds * WARM_UP:
            warm = (values["ddpm_jobs_accepted_total"], resident)
    run.over.set()
    for thread in threads:
        thread.join()
    assert run.wrong == []
    values = run.scrape()
    jobs, grown = values["ddpm_jobs_accepted_total"], resident_bytes(pid) - warm[1]
    assert settles(idle, pid), f"{open_files(pid) - idle} descriptors were left"
    assert grown < GROWTH + (jobs - warm[0]) * KEPT_JOB_BYTES, f"{grown} bytes more than after the warm-up"
    return {"seconds": seconds, "seed": seed, "scrapes": scrapes, "acts": run.done, "jobs": jobs, "grown_bytes": grown}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "tiny")
        server = Server(Path(folder), DDPM_LOG_LEVEL="warning").wait_until_ready()
        try:
            found = soak(server, arguments.minutes * 60, arguments.seed)
        finally:
            code, log = server.stop()
    assert (code, "Traceback" in log) == (0, False), log[-2000:]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
