"""The way of one `POST /generate`: which of our files it enters, and how often it moves from one file to another.

    python -m tests.way            a table for the API process and the engine process
    python -m tests.way --moves    every move, in order

A server is started over `weights/`, asked once so that everything is imported, and recorded while it answers a second
request. The way is the sequence of calls of our functions (resumptions of coroutines too); a move is a call in another
file than the call before it. What libraries do between them does not count.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).parent.parent
OURS = tuple(f"{ROOT / place}/" for place in ("server", "model", "client"))
OUT = "WAY_OUT"  # the environment variable by which a recorded process is told where to write
BODY = {"seed": 207, "steps": 5}


class Recorder:
    """The functions of ours that this process calls, while it is `on`."""

    def __init__(self) -> None:
        self.on = False
        self.calls: list[tuple[str, str]] = []  # (file, function), in order
        self._ours: dict[CodeType, str] = {}  # by code: its file from the root on, empty if it is not ours

    def place(self, code: CodeType) -> str:
        """The file of a function of ours, else nothing."""
        if code not in self._ours:
            ours = code.co_filename.startswith(OURS)
            self._ours[code] = str(Path(code.co_filename).relative_to(ROOT)) if ours else ""
        return self._ours[code]

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        """As `sys.setprofile` wants it."""
        if self.on and event == "call" and (file := self.place(frame.f_code)):
            self.calls.append((file, frame.f_code.co_name))


def install() -> None:
    """Records this process: SIGUSR1 begins, SIGUSR2 ends and writes down what was seen."""
    recorder = Recorder()

    def begin(number: int, frame: FrameType | None) -> None:
        recorder.on = True

    def end(number: int, frame: FrameType | None) -> None:
        recorder.on = False
        part = Path(os.environ[OUT]) / f"{os.getpid()}.part"
        part.write_text(json.dumps(recorder.calls))
        part.rename(part.with_suffix(".json"))

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    threading.setprofile(recorder.profile)
    sys.setprofile(recorder.profile)


def busy(pid: int) -> bool:
    """Whether a process computes: more than a tenth of the next half second."""

    def ticks() -> int:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return int(user) + int(system)

    before = ticks()
    time.sleep(0.5)
    return ticks() - before > 0.05 * os.sysconf("SC_CLK_TCK")


def record() -> dict[str, list[tuple[str, str]]]:
    """The way through the API process and through the engine process: (file, function) of every call."""
    from tests.server.conftest import Server

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text("from tests.way import install\n\ninstall()\n")
        os.environ |= {OUT: folder, "PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'client'}"}
        server = Server(ROOT / "weights").wait_until_ready()
        pids = {"API": server.process.pid, "engine": server.engine_pid}
        server.client.post("/generate", json=BODY).raise_for_status()
        while busy(pids["engine"]):  # it compiles its net for larger batches
            pass
        for pid in pids.values():
            os.kill(pid, signal.SIGUSR1)
        server.client.post("/generate", json=BODY).raise_for_status()
        for pid in pids.values():
            os.kill(pid, signal.SIGUSR2)
        written = {name: Path(folder) / f"{pid}.json" for name, pid in pids.items()}
        server.until(lambda: all(path.exists() for path in written.values()))
        seen = {name: [(file, call) for file, call in json.loads(path.read_text())] for name, path in written.items()}
        server.stop()
    return seen


def main() -> None:
    """Prints the way."""
    parser = ArgumentParser("python -m tests.way", description=__doc__)
    parser.add_argument("--moves", action="store_true", help="every move, in order")
    given = parser.parse_args()
    for process, calls in record().items():
        files = Counter(file for file, _ in calls)
        moves = [(before, now) for before, now in pairwise(calls) if before[0] != now[0]]
        print(f"{process} process: {len(files)} files, {len(moves)} moves")
        for file in sorted(files):
            print(f"    {files[file]:5} calls in {file}")
        for (_, _), (file, call) in moves if given.moves else ():
            print(f"    to {file} {call}")


if __name__ == "__main__":
    main()
