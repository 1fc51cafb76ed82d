"""Damage to the data directory of a server that was killed: what the next server makes of it.

`python -m tests.server.store.flips --runs 200` damages a copy each time, at random, and prints a table.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from server.errors import StoreRefused
from server.settings import Settings
from server.store.schema import JOURNAL, LOG, PICTURES
from server.web.app import create_app
from tests.model.convert.directories import write_model
from tests.server.fakes import FakeBackend
from tests.waiting import until

Damage = Callable[[Path, random.Random], str]
LATER = {"prefer": "respond-async"}


def start(weights: Path, data: Path, open_gate: bool = True) -> TestClient:
    """A server on this data directory; enter it."""
    backend = FakeBackend()
    if not open_gate:
        backend.gate.clear()
    settings = Settings(weights=weights, data_dir=data)
    return TestClient(create_app(settings, backend))


def fill(weights: Path, directory: Path) -> None:
    """Two servers accept jobs in `directory/data`; the first one stops, the second one is killed. What clients were
    promised is in `directory/promised`."""
    promised = dict[str, Any]()
    for run in range(2):
        with start(weights, directory / "data") as client:
            for seed in range(20 * run, 20 * run + 20):
                body = {"seed": seed, "steps": 2, "n": 1 + seed % 3, "frames": None}
                answer = client.post("/generate", json=body, headers={"accept": "application/json"})
                id = answer.headers["x-job-id"]
                document = client.get(f"/jobs/{id}").json()
                assert document["status"] == "succeeded"
                promised[id] = document
            if run == 1:
                client.app.state.jobs.backend.gate.clear()  # type: ignore[attr-defined]
                for seed in range(5):
                    job = client.post("/generate", json={"seed": 100 + seed, "steps": 2}, headers=LATER).json()
                    promised[job["id"]] = job
                (directory / "promised").write_text(json.dumps(promised))
                os._exit(0)


def killed(weights: Path, directory: Path) -> dict[str, Any]:
    """Makes such a directory -> the documents of all jobs by their ids"""
    command = [sys.executable, "-m", "tests.server.store.flips", "--fill", str(weights), str(directory)]
    subprocess.run(command, check=True)
    promised: dict[str, Any] = json.loads((directory / "promised").read_text())
    return promised


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def pick(data: Path, kind: str, draw: random.Random) -> Path:
    """The journal, its log, or a picture."""
    return data / kind if kind != PICTURES else draw.choice(sorted((data / PICTURES).iterdir()))


def flip(path: Path, draw: random.Random) -> str:
    """Flips one bit."""
    at, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {at} of {path.name}"


def truncate(path: Path, draw: random.Random) -> str:
    """Cuts a file off."""
    size = draw.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut off at {size}"


def verdict(weights: Path, data: Path, promised: dict[str, Any]) -> str:
    """What the next server makes of it: "exit 4", "all there", or what is wrong."""
    before = snapshot(data)
    try:
        client = start(weights, data)
    except StoreRefused as refusal:
        assert "ddpm check" in str(refusal)
        return "exit 4" if snapshot(data) == before else "exit 4, but something was changed"
    with client:
        for id, document in promised.items():
            wrong = _differs(client, id, document)
            if wrong:
                return wrong
    return "all there"


def _differs(client: TestClient, id: str, document: dict[str, Any]) -> str:
    def found() -> Any:
        answer = client.get(f"/jobs/{id}")
        return None if answer.json().get("status") in ("queued", "running") else answer

    answer = until(found, 10, pause_s=0.01)
    if answer.status_code != 200 or answer.json()["status"] != "succeeded":
        return f"a job is lost: {answer.text}"
    if document["status"] == "succeeded" and answer.json() != document:
        return f"a job has changed: {answer.text}"
    for image in answer.json()["images"]:
        png = client.get(image["url"])
        if png.status_code != 200:
            return f"a picture is refused: {png.status_code}"
        if sha256(png.content).hexdigest() != image["sha256"]:
            return "a picture has other bytes"
    return ""


def main() -> None:
    """Prints how often each damage had which verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--fill", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.fill:
        return fill(*given.fill)
    draw, table = random.Random(given.seed), Counter[tuple[str, str, str]]()
    with tempfile.TemporaryDirectory() as name:
        weights, place = write_model(Path(name) / "weights" / "tiny").parent, Path(name)
        promised = killed(weights, place)
        for run in range(given.runs):
            data = place / f"{run}"
            shutil.copytree(place / "data", data)
            kind, damage = draw.choice((JOURNAL, LOG, PICTURES)), draw.choice((flip, truncate))
            what = damage(pick(data, kind, draw), draw)
            came = verdict(weights, data, promised)
            table[kind, damage.__name__, came] += 1
            if came not in ("exit 4", "all there"):
                print(what, came)
            shutil.rmtree(data)
    print(f"seed {given.seed}, {given.runs} damages of a store with {len(promised)} jobs:")
    for (kind, damage_name, came), count in sorted(table.items()):
        print(f"{kind:18} {damage_name:10} {came:30} {count:4}")
    sys.exit(any(came not in ("exit 4", "all there") for _, _, came in table))


if __name__ == "__main__":
    main()
