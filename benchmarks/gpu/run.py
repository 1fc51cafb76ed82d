"""Runs stages in turn, each in a process of its own with a time limit and a log, whatever became of the others."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.facts import FACTS, OUTCOME, Fact, Reader, Setting, line_of, table, tell

ROOT = Path(__file__).parent.parent.parent
LOG = "stages.log"  # of all stages, one below the other
GRACE_S = 5.0  # between the request to end and the end
LEAST_S = 3.0  # a stage with less time than this is left out
LOOK_EVERY_S = 0.1
SHOWN_LINES = 15  # of the log of a stage that did not end well


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage by its name, how long it may take, and what gives its parts: module:function."""

    name: str
    limit_s: float
    work: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is wanted of a run."""

    out: Path
    minutes: float
    dry: bool = False
    train: Sequence[Sequence[str]] = ()
    environ: Mapping[str, str] | None = None  # of the stages; None: ours


def run(stages: Sequence[Stage], order: Order, show: Callable[[str], None] = print) -> bool:
    """Runs all of these in the time there is; facts and logs go to `order.out`. Returns whether all ended well."""
    began_s, well = time.time(), True
    until_s = began_s + 60 * order.minutes
    reader = Reader(order.out / FACTS)
    with tempfile.TemporaryDirectory(prefix="ddpm-gpu-") as scratch:
        for stage in stages:
            limit_s = min(stage.limit_s, until_s - time.time() - GRACE_S)
            setting = Setting(
                stage=stage.name,
                work=stage.work,
                out=str(order.out.resolve()),
                scratch=scratch,
                dry=order.dry,
                began_s=began_s,
                until_s=time.time() + limit_s,
                train=order.train,
            )
            if limit_s < LEAST_S:
                outcome, seconds = "left out: no time is left", 0.0
            else:
                show(f"{stage.name:11} begins, for {limit_s:.0f} s at most")
                outcome, seconds = _run_one(setting, limit_s, order, reader, show)
                well = well and outcome == "ended"
            tell(setting, Fact(OUTCOME, outcome, more={"seconds": round(seconds, 1)}))
            _show_news(reader, show)
    lines = table(reader.seen)
    show(f"facts and logs: {order.out}; {len(reader.seen)} facts, of which these {len(lines)}:")
    for line in lines:
        show(line)
    return well


def _run_one(
    setting: Setting, limit_s: float, order: Order, reader: Reader, show: Callable[[str], None]
) -> tuple[str, float]:
    """(what became of a stage, the seconds it took)"""
    log, began_s, stopped = order.out / f"{setting.stage}.log", time.monotonic(), False
    command = [sys.executable, "-m", "benchmarks.gpu.stage", setting.as_json()]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=order.environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        if not _wait(process, limit_s, reader, show):
            stopped = True
            _kill(process, signal.SIGTERM)
            _wait(process, GRACE_S, reader, show)
    finally:
        _kill(process, signal.SIGKILL)  # whoever of its processes is left, even if it has ended well itself
        code = process.wait()
        seconds = time.monotonic() - began_s
        outcome = f"stopped at its limit of {limit_s:.0f} s" if stopped else _said_by(code)
        _join_logs(log, order.out / LOG, f"{setting.stage}: {outcome}, {seconds:.1f} s")
    _show_news(reader, show)
    if outcome != "ended":
        for line in (order.out / LOG).read_text(errors="replace").splitlines()[-SHOWN_LINES:]:
            show(f"    {line}")
    return outcome, seconds


def _wait(process: "subprocess.Popen[bytes]", seconds: float, reader: Reader, show: Callable[[str], None]) -> bool:
    """Shows facts as they come. Returns whether the process has ended by itself within so many seconds."""
    until_s = time.monotonic() + seconds
    while True:
        try:
            process.wait(LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            _show_news(reader, show)
            if time.monotonic() > until_s:
                return False
        else:
            return True


def _show_news(reader: Reader, show: Callable[[str], None]) -> None:
    for fact in reader.news():
        show(line_of(fact))


def _kill(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Sends a signal to the process and to all that it has started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _said_by(code: int) -> str:
    """What an exit code says."""
    if code < 0:
        return f"died by {signal.Signals(-code).name}"
    return "failed" if code else "ended"


def _join_logs(log: Path, whole: Path, title: str) -> None:
    """Moves the log of a stage to the end of the log of all, under a title."""
    with whole.open("ab") as file:
        file.write(f"===== {title} =====\n".encode())
        file.write(log.read_bytes().rstrip(b"\n") + b"\n")
    log.unlink()
