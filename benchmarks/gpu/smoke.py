"""Stage smoke: does a captured step compute what it should, and how long does it take?

The CIFAR-10 configuration begins to load at once, in a process of its own. If it cannot be captured, it is run eagerly
in the next; if that fails as well, in plain torch, without Triton.
"""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import model.nets.layers
from benchmarks.gpu.apart import Apart
from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.stage import Part
from benchmarks.gpu.worlds import DIGITS, device_of, small, tiny
from model.checkpoint.card import read_card
from model.checkpoint.load import load_layers
from model.engine.engine import Engine
from model.engine.events import Finished, Picture, Request
from model.engine.runner import prepared
from model.engine.slots import Slots
from model.engine.step import denoise
from model.sampling.plan import plan, resolve
from model.sampling.table import COLUMNS
from server.worker.device import choose_dtype

BATCHES, DRY_BATCHES = (1, 8, 64), (1, 2, 4)
WAYS = ("a graph", "eager", "plain torch")
STEPS, ROUNDS = 20, 5
PATIENCE_S = 20.0  # between two numbers; for the first way all the time there is,
LATER_S = 25.0  # but for what others would take


def parts(setting: Setting) -> list[Part]:
    """The small net first. Nothing else is on the GPU while steps are timed."""
    device, batches = device_of(setting), DRY_BATCHES if setting.dry else BATCHES
    return [
        partial(replays, tiny(setting) if setting.dry else DIGITS, device),
        partial(a_picture, DIGITS, device, 2 if setting.dry else 20),
        partial(steps_one_way_or_another, setting, device, batches),
    ]


@torch.inference_mode()
def replays(directory: Path, device: torch.device) -> Iterator[Fact]:
    """Whether a replay of every bucket of a net is the eager step, bit for bit."""
    runner = prepared(load_layers(read_card(directory), device, choose_dtype("auto", device)), 4)
    slots, generator, wrong = runner.slots, torch.Generator().manual_seed(0), list[int]()
    x = torch.randn(slots.x.shape, generator=generator).to(device)
    history = torch.randn(slots.history.shape, generator=generator).to(device)
    row = torch.rand(slots.capacity, len(COLUMNS), generator=generator).to(device)
    for bucket in runner.buckets:
        results = []
        for step in (runner.step, partial(denoise, runner.model.net, runner.model.table, slots)):
            slots.x.copy_(x)
            slots.history.copy_(history)
            slots.rows[:, 0] = row
            slots.cursor.zero_()
            slots.last.fill_(1)
            step(bucket)
            results.append(slots.x[:bucket].clone())
        wrong += [] if torch.equal(*results) else [bucket]
    name = f"{directory.name}: buckets whose replay is the eager step, bit for bit"
    yield Fact(name, len(runner.buckets) - len(wrong), f"of {len(runner.buckets)}", more={"others": wrong}, main=True)


def a_picture(directory: Path, device: torch.device, steps: int) -> Iterator[Fact]:
    """How far a picture made here in float32 is from that of the CPU."""

    def made(where: torch.device) -> Picture:
        engine = Engine(prepared(load_layers(read_card(directory), where, torch.float32), 1))
        process = engine.runner.model.card.process
        engine.submit(Request("one", 42, plan(process, resolve(process, "ddpm", steps))))
        while True:
            for event in engine.step():
                assert isinstance(event, Finished), event
                return event.picture

    apart = abs(made(device).astype(int) - made(torch.device("cpu")).astype(int))
    name = f"{directory.name}, float32, {steps} steps: the most that a pixel differs from the CPU's"
    yield Fact(name, int(apart.max()), "grey levels", more={"pixels": int((apart > 0).sum())}, main=True)


def steps_one_way_or_another(setting: Setting, device: torch.device, batches: tuple[int, ...]) -> Iterator[Fact]:
    """Milliseconds per step, in the first of WAYS in which there are any."""
    for way in WAYS:
        told, patience_s = 0, max(PATIENCE_S, setting.left_s - LATER_S if way == WAYS[0] else 0.0)
        try:
            for name, value, unit in Apart(step_times, small(setting), device, batches, way).results(patience_s):
                told += unit == "ms/step"
                yield Fact(name, value, unit, main=unit == "ms/step")
            return
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            yield Fact(f"steps by {way} failed", str(error).splitlines()[-1][:300], main=True)
            if told:
                return
    raise RuntimeError("no step could be run in any way")


@torch.inference_mode()
def step_times(
    directory: Path, device: torch.device, batches: tuple[int, ...], way: str
) -> Iterator[tuple[str, float, str]]:
    """(name, value, unit) of what a net with these batches takes to be ready, and for a step."""
    began = time.perf_counter()
    if way == "plain torch":
        model.nets.layers.TRITON_ON = frozenset()
    loaded = load_layers(read_card(directory), device, choose_dtype("auto", device))
    slots, step = Slots(max(batches), loaded.card.shape, loaded.card.process.schedule.T, device), None
    yield f"{directory.name}, by {way}: loaded in", time.perf_counter() - began, "s"
    if way == "a graph":
        runner = prepared(loaded, max(batches), exact=False, buckets=batches)
        slots, step = runner.slots, runner.step
        yield f"{directory.name}, by {way}: captured in", time.perf_counter() - began, "s"
    slots.rows[:] = 0.5
    slots.last.fill_(slots.rows.shape[1] - 1)
    for batch in batches:
        run = partial(step, batch) if step else partial(denoise, loaded.net, loaded.table, slots, batch)
        took = min(_block(run, device) for _ in range(ROUNDS))
        yield f"{directory.name}, not exact, batch {batch}, by {way}", 1000 * took, "ms/step"


def _block(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a step among many."""
    began = time.perf_counter()
    for _ in range(STEPS):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / STEPS
