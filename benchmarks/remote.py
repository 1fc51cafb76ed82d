"""A contender in a process of its own, asked through a pipe."""

import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import full
from benchmarks.contenders import ALL, Contender, Ours, Setup
from server.worker.cpus import cores

PATIENCE_S = 900.0  # the longest anything takes: compilers


@dataclass(slots=True)
class Remote:
    """A contender in its own process. Every question may raise RuntimeError, with what went wrong over there."""

    name: str
    pipe: Connection
    process: Any
    patience_s: float = PATIENCE_S  # an answer that takes longer is taken for none

    @classmethod
    def start(cls, name: str, setup: Setup, patience_s: float = PATIENCE_S) -> "Remote":
        """Begins to load it."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, name, setup), daemon=True)
        process.start()
        theirs.close()
        return cls(name, ours, process, patience_s)

    def answer(self) -> Any:
        """The next answer. If it is a failure, its traceback goes to stderr."""
        try:
            if not self.pipe.poll(self.patience_s):
                self.end()  # else its answer would pass for that to the next question
                raise RuntimeError(f"{self.name} gave no answer in {self.patience_s:.0f} s")
            kind, value = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{self.name} ended without a word") from error
        if kind == "failed":
            print(f"{self.name}:\n{value}", file=sys.stderr, flush=True)
            raise RuntimeError(f"{self.name}: {value.splitlines()[-1]}")
        return value

    def ask(self, verb: str, *arguments: Any) -> Any:
        """One question, one answer."""
        try:
            self.pipe.send((verb, *arguments))
        except OSError as error:
            raise RuntimeError(f"{self.name} has ended") from error
        return self.answer()

    def end(self) -> None:
        """Its process ends."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, name: str, setup: Setup) -> None:
    torch.set_num_threads(setup.threads or cores())
    began = time.perf_counter()
    try:
        contender = ALL[name](setup)
    except Exception:  # whatever keeps one of them from taking part is told, and the others go on
        pipe.send(("failed", traceback.format_exc().strip()))
        return
    pipe.send(("ready", time.perf_counter() - began))
    gc.collect()
    gc.freeze()  # what is there by now stays: later collections need not look at it
    while True:
        try:
            verb, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = VERBS[verb](contender, *arguments)
        except Exception:  # as above; the next question may have an answer yet
            pipe.send(("failed", traceback.format_exc().strip()))
        else:
            pipe.send((verb, answer))


def _run(contender: Contender, batch: int, steps: int) -> float:
    """Seconds of so many steps."""
    gc.collect()
    began = time.perf_counter()
    contender.run(batch, steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _memory(contender: Contender) -> int:
    """The most memory that was held so far, in bytes: of the GPU, else of the process."""
    if torch.cuda.is_available():
        most: int = torch.cuda.max_memory_reserved()
        return most
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _nodes(contender: Contender, batch: int) -> int:
    """Kernels and copies on the GPU in one step."""
    contender.run(batch, 3)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        contender.run(batch, 10)
        torch.cuda.synchronize()
    on_gpu = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return round(len(on_gpu) / 10)


def _replay(contender: Ours, batch: int) -> float:
    """Milliseconds that the GPU takes for a step when the next one always waits already."""
    runner, (began, ended) = contender.engine.runner, (torch.cuda.Event(enable_timing=True) for _ in range(2))
    bucket = runner.bucket_for(batch)
    runner.step(bucket)
    began.record()
    for _ in range(20):
        runner.step(bucket)
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 20


def _full(contender: Ours, batch: int, block_s: float) -> dict[int, list[float]]:
    """Image-steps per second in a batch that is always full, by the steps of its requests, round by round."""
    contender.clear()
    return full.rates(contender.engine, batch, block_s)


def _kernels(contender: Ours) -> str:
    """Which kernels its net runs by, and in which of its buckets a picture's bits are the same."""
    runner = contender.engine.runner
    return f"{runner.chosen or 'no kernels chosen'}; exact buckets {runner.exact_buckets} of {runner.buckets}"


VERBS: dict[str, Callable[..., Any]] = {
    "run": _run,
    "memory": _memory,
    "nodes": _nodes,
    "replay": _replay,
    "full": _full,
    "kernels": _kernels,
    "predict": lambda contender, x, t: contender.predict(torch.from_numpy(x), torch.from_numpy(t)).numpy(),
}
