"""The life of an engine process: load the models, then step whatever is busy, until the pipe closes.

The only room of the server where torch is imported. It owns one device, and has no sockets and no disk to write to.
"""

import ctypes
import os
import platform
import time
import traceback
from collections.abc import Sequence
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch

from model.card import read_card
from model.checkpoint import Model, load_model
from model.engine import Engine
from model.errors import ModelRefused, NoSuchDevice
from model.events import ENDS, Event, Request, Stats
from model.plan import Plan, Sampling, plan
from model.runner import Runner
from model.schedule import Process
from server import faults
from server.backend import Served
from server.messages import Beat, Cancel, Died, Happened, Ready, Refused, Start, Step, Submit

BEAT_S = 0.25
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """The device by its name in the settings. Raises NoSuchDevice."""
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    index = int(wanted.partition(":")[2] or 0)
    if index >= gpus:
        raise NoSuchDevice(f"device {wanted} was asked for, this machine has {gpus} GPUs")
    return torch.device("cuda", index)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Numbers inside the net: bfloat16 wherever the device computes in it, unless told otherwise."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def usual_slots(device: torch.device) -> int:
    """How many pictures share a batch, unless told otherwise."""
    return 64 if device.type == "cuda" else 8


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_cpu(threads: int) -> None:
    """Makes this process an engine on a CPU: its threads, and an allocator that keeps what it has got.

    Left alone, glibc gives a step's large tensors back to the system and gets them again, page by page, in the next.
    """
    torch.set_num_threads(threads or cores())
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def ranges(numbers: Sequence[int]) -> str:
    """1-4,6 for [1, 2, 3, 4, 6], none for []."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


def describe(runner: Runner, model: Model, load_s: float) -> Served:
    """What the world may know of a loaded model."""
    device, dtype = runner.device, str(model.table.dtype).removeprefix("torch.")
    name = device_name(device)
    parts = [name, f"torch {torch.__version__}", dtype, f"exact {ranges(runner.exact_buckets)}"]
    if device.type == "cuda":
        parts.insert(2, f"cudnn {torch.backends.cudnn.version()}")
        parts += [str(runner.chosen)] if runner.chosen else []
    else:
        parts.insert(2, f"{torch.get_num_threads()} threads")
    return Served(
        model.card.digest,
        f"{device} ({name})",
        dtype,
        model.parameters,
        runner.slots.capacity,
        runner.buckets,
        runner.exact_buckets,
        runner.admitted,
        runner.exact,
        "; ".join(parts),
        load_s,
    )


def _time_a_step(runner: Runner, count: int) -> float:
    """How long a step takes that has room for so many pictures, with nobody in it: the shorter of two."""
    took = []
    for _ in range(2):
        began = time.monotonic()
        runner.step(runner.bucket_for(count))
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        took.append(time.monotonic() - began)
    return min(took)


@lru_cache(256)
def _plan(process: Process, sampling: Sampling) -> Plan:
    return plan(process, sampling)


class Engines:
    """The engines of one device, by model."""

    def __init__(self, start: Start) -> None:
        device = choose_device(start.device)
        if device.type == "cpu":
            prepare_cpu(start.threads)
        else:
            torch.cuda.set_device(device)
        dtype, slots = choose_dtype(start.dtype, device), start.slots or usual_slots(device)
        self.engines: dict[str, Engine] = {}
        self.processes: dict[str, Process] = {}
        self.served: dict[str, Served] = {}
        self.models: dict[int, str] = {}  # which engine a sample that has not ended is in
        self.device = device
        self.taken: list[Step] = []  # since they were last told
        self.watched: set[int] = set()  # samples of which every step is told
        for name, directory in start.models:
            began = time.monotonic()
            model = load_model(read_card(directory, name), device, dtype)
            runner = Runner(model, slots, start.exact)
            self.engines[name], self.processes[name] = Engine(runner), model.card.process
            faults.plant(runner)
            self.served[name] = describe(runner, model, round(time.monotonic() - began, 3))
            for count in (1, runner.slots.capacity):
                self.taken.append(Step(name, runner.bucket_for(count), _time_a_step(runner, count)))

    @property
    def busy(self) -> bool:
        """Whether any engine has something to do."""
        return any(engine.busy for engine in self.engines.values())

    @property
    def stats(self) -> Stats:
        """The sum over all engines."""
        each = [engine.stats for engine in self.engines.values()]
        return Stats(*(sum(getattr(s, name) for s in each) for name in Stats.__slots__))

    @property
    def progress(self) -> list[tuple[int, int]]:
        """(sample, updates done) of all that are seated."""
        return [(cast(int, id), step) for engine in self.engines.values() for id, step in engine.progress]

    def handle(self, message: Submit | Cancel) -> None:
        """What the API process wants."""
        if isinstance(message, Cancel):
            for id in message.ids:
                if id in self.models:
                    self.engines[self.models[id]].cancel(id)
            return
        spec = message.spec
        self.watched.update(message.ids if message.watched else ())
        table = _plan(self.processes[spec.model], spec.sampling)
        for id, seed in zip(message.ids, spec.seeds, strict=True):
            self.models[id] = spec.model
            shown = (spec.frames, spec.shows_x, spec.shows_x0, spec.wants_floats)
            self.engines[spec.model].submit(Request(id, seed, table, spec.order, *shown, spec.owner))

    @property
    def memory_bytes(self) -> int:
        """Memory of the device that is held."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def tell_steps(self) -> list[Step]:
        """The steps done since this was last asked."""
        told, self.taken = self.taken, []
        return told

    def seat(self) -> list[tuple[int, int]]:
        """Seats who waits. -> (sample, updates done) of those who have just sat down"""
        return [(cast(int, id), step) for engine in self.engines.values() for id, step in engine.seat()]

    def step(self) -> list[Event]:
        """One step of every engine that is busy. -> what happened"""
        events = list[Event]()
        for name, engine in self.engines.items():
            if engine.busy:
                before, began = engine.stats, time.monotonic()
                events += engine.step()
                if engine.stats.steps > before.steps:
                    bucket = engine.stats.slot_steps - before.slot_steps
                    self.taken.append(Step(name, bucket, time.monotonic() - began))
        for event in events:
            if isinstance(event, ENDS):
                del self.models[cast(int, event.id)]
                self.watched.discard(cast(int, event.id))
        return events


def serve(pipe: Connection, start: Start) -> None:
    """Runs until the other end of the pipe is closed."""
    try:
        engines = Engines(start)
        pipe.send(Ready(engines.served, engines.tell_steps()))
        _loop(pipe, engines)
    except (ModelRefused, NoSuchDevice) as error:
        pipe.send(Refused(type(error).__name__, str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the API process is gone
    except Exception as error:  # the one place where whatever killed the engine can be told
        pipe.send(Died(_cause(error), traceback.format_exc()[-4000:]))


def _cause(error: Exception) -> str:
    """In a word of `server.messages.CAUSES`. Nothing on a GPU works any more after an error of its own."""
    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    return "cuda" if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error) else "failed"


def _loop(pipe: Connection, engines: Engines) -> None:
    beat_at = 0.0
    while True:
        while pipe.poll(0 if engines.busy else BEAT_S):
            engines.handle(pipe.recv())
        if engines.busy:
            if begun := engines.seat():  # told before they are stepped: whoever sits there when it dies is known
                pipe.send(Happened([], engines.stats, begun))
            if events := engines.step():
                pipe.send(Happened(events, engines.stats))
        now = time.monotonic()
        if now - beat_at >= BEAT_S or engines.watched:
            pipe.send(Beat(engines.stats, engines.tell_steps(), engines.progress, engines.memory_bytes))
            beat_at = now
