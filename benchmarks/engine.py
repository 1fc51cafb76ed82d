"""Our engine's loop beside diffusers as its users run it: same weights, same device, in turns, each in its own process.

What is said of each: milliseconds per step by batch and how they grow, start-up, memory, how far its net is from
float64, and whether a picture's bits are the same alone and in company.
"""

import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import COMPILED_ON_CPU, COMPILED_ON_GPU, EVERYWHERE, ON_GPU, Setup, load
from benchmarks.measure import Measure, interleaved, median_ratio, seconds_of
from benchmarks.models import CIFAR10, LARGE, random_model
from benchmarks.remote import Remote


@dataclass(frozen=True, slots=True)
class Trial:
    """A model, the batches it is run at, and how long a block of steps takes at least."""

    name: str
    directory: Path
    batches: Sequence[int]
    block_s: float
    rounds: int = 5


def started(trial: Trial, names: Sequence[str], device: torch.device) -> Iterator[tuple[Remote, float]]:
    """The contenders that could be loaded, and the seconds that took; why the others could not is printed."""
    remotes = [Remote.start(name, Setup(trial.directory, device, max(trial.batches))) for name in names]
    for remote in remotes:
        try:
            yield remote, remote.answer()
        except RuntimeError as error:
            print(f"left out: {error}", flush=True)
            remote.end()


def warm(remotes: list[Remote], trial: Trial) -> Iterator[tuple[Remote, dict[int, int]]]:
    """Those that can run every batch, and how many steps of each fill a block."""
    for remote in remotes:
        try:
            steps = {}
            for batch in trial.batches:
                remote.ask("run", batch, 2)
                steps[batch] = max(2, math.ceil(trial.block_s / (remote.ask("run", batch, 4) / 4)))
            yield remote, steps
        except RuntimeError as error:
            print(f"left out: {error}", flush=True)
            remote.end()


def speed(trial: Trial, fields: list[tuple[Remote, dict[int, int]]]) -> Iterator[Measure]:
    """Milliseconds per step of everybody at every batch, how they grow with it, and how many times faster we are."""
    curves: dict[str, list[float]] = {remote.name: [] for remote, _ in fields}
    for batch in trial.batches:
        runs = {remote.name: partial(remote.ask, "run", batch, steps[batch]) for remote, steps in fields}
        seconds = interleaved(runs, trial.rounds, excused=RuntimeError)
        took = {remote.name: steps[batch] for remote, steps in fields}
        each = {name: [s / took[name] for s in taken] for name, taken in seconds.items()}
        for name, taken in each.items():
            curves[name].append(1000 * statistics.median(taken))
            spread = (1000 * min(taken), 1000 * max(taken))
            yield Measure(f"{trial.name}, batch {batch}: {name}", curves[name][-1], "ms/step", spread)
        for name in [name for name in each if name != "ours" and "ours" in each]:
            ratio, spread = median_ratio(each[name], each["ours"])
            yield Measure(f"{trial.name}, batch {batch}: ours against {name}", ratio, "times faster", spread)
    whole = {name: curve for name, curve in curves.items() if len(curve) == len(trial.batches) > 2}
    for name, curve in whole.items():
        slope, start = np.polyfit(trial.batches, curve, 1, w=1 / np.array(curve))
        yield Measure(f"{trial.name}: {name}, a step is {start:.3f} + b x", float(slope), "ms")


def answers(trial: Trial, remotes: list[Remote], device: torch.device) -> Iterator[Measure]:
    """How far each net is from float64, and in how many batches a picture's bits are those it has alone."""
    from diffusers import UNet2DModel

    config = UNet2DModel.load_config(trial.directory)
    shape = (max(trial.batches), config["in_channels"], config["sample_size"], config["sample_size"])
    draw = np.random.default_rng(0)
    x, t = draw.standard_normal(shape, dtype=np.float32), draw.integers(0, 1000, shape[0])
    with torch.inference_mode():
        net = load(Setup(trial.directory, device, 2), torch.float64, False)
        exact = net(torch.from_numpy(x[:2]).to(device).double(), torch.from_numpy(t[:2]).to(device)).cpu().numpy()
        del net
    for remote in remotes:
        try:
            alone = remote.ask("predict", x[:1], t[:1])[0]
            said = {b: remote.ask("predict", np.roll(x[:b], b // 2, 0), np.roll(t[:b], b // 2)) for b in trial.batches}
        except RuntimeError as reason:
            print(f"no answers: {reason}", flush=True)
            continue
        b = min((b for b in trial.batches if b > 1), default=1)  # one that is compiled already
        few = np.roll(said[b], -(b // 2), 0)[: len(exact)]
        error = float(np.linalg.norm(few - exact[: len(few)]) / np.linalg.norm(exact[: len(few)]))
        yield Measure(f"{trial.name}: {remote.name}, error of the net against float64", error, "of its norm")
        same = [bool((said[b][b // 2] == alone).all()) for b in trial.batches if b > 1]
        if same:
            share = f"{trial.name}: {remote.name}, same bits in company"
            yield Measure(share, float(sum(same)), f"of {len(same)} batches")


def ceilings(device: torch.device, side: int = 0) -> tuple[float, float]:
    """What this device reaches at best: bfloat16 matrix products in FLOP/s, copies in bytes/s (read and written).

    side: of the matrices; 0: large enough for the device
    """
    side, size = (side or 8192, 1 << 30) if device.type == "cuda" else (side or 2048, 1 << 26)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    product = seconds_of(lambda: torch.mm(a, a), device)
    return 2 * side**3 / product, 2 * size / seconds_of(lambda: target.copy_(source), device)


def limits(trial: Trial, ours: Remote, curve: dict[int, float], device: torch.device) -> Iterator[Measure]:
    """How near we are to what the device can do, and on a GPU how many kernels a step is and what lies between two."""
    from diffusers import UNet2DModel

    config = UNet2DModel.load_config(trial.directory)
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        net = UNet2DModel.from_config(config)
        net(torch.empty(1, config["in_channels"], config["sample_size"], config["sample_size"]), torch.zeros(1))
    flops, copied = ceilings(device)
    most = max(trial.batches)
    reached = counted.get_total_flops() * most / (curve[most] / 1000)
    yield Measure(f"{trial.name}: this device's matrix products", flops / 1e12, "TFLOP/s")
    yield Measure(f"{trial.name}: this device's copies", copied / 1e9, "GB/s")
    yield Measure(f"{trial.name}, batch {most}: ours", reached / flops, "of the matrix products")
    if device.type == "cuda":
        for batch in (1, most):
            yield Measure(f"{trial.name}, batch {batch}: ours, nodes", ours.ask("nodes", batch), "per step")
            gap = 1000 * (curve[batch] - ours.ask("replay", batch))
            yield Measure(f"{trial.name}, batch {batch}: ours, between replays", gap, "us")


def compare(trial: Trial, names: Sequence[str], device: torch.device) -> Iterator[Measure]:
    """Everything about one model."""
    loaded = list(started(trial, names, device))
    for remote, took in loaded:
        yield Measure(f"{trial.name}: {remote.name}, loaded in", took, "s")
    fields = list(warm([remote for remote, _ in loaded], trial))
    remotes, curve = [remote for remote, _ in fields], dict[int, float]()
    for measure in speed(trial, fields):
        if measure.name.endswith(": ours"):
            curve[trial.batches[len(curve)]] = measure.value
        yield measure
    yield from as_far_as_it_goes(answers(trial, remotes, device))
    for remote in remotes:
        yield from as_far_as_it_goes(memory(trial, remote))
        if remote.name == "ours":
            yield from as_far_as_it_goes(limits(trial, remote, curve, device))
    for remote in remotes:
        remote.end()


def memory(trial: Trial, remote: Remote) -> Iterator[Measure]:
    """How much of the device, or of the machine's memory, it took."""
    yield Measure(f"{trial.name}: {remote.name}, memory", remote.ask("memory") / 2**20, "MiB at most")


def as_far_as_it_goes(measures: Iterator[Measure]) -> Iterator[Measure]:
    """These; should one of them fail (no memory left, a profiler that is not allowed), those before it."""
    try:
        yield from measures
    except RuntimeError as reason:
        print(f"left out: {reason}", flush=True)


def measures(device: torch.device, digits: Path, against_compilers: bool) -> Iterator[Measure]:
    """Everything this file measures."""
    gpu = device.type == "cuda"
    names = (COMPILED_ON_GPU if gpu else COMPILED_ON_CPU) if against_compilers else ON_GPU if gpu else EVERYWHERE
    with tempfile.TemporaryDirectory() as folder:
        small = random_model(Path(folder) / "small", CIFAR10)
        large = random_model(Path(folder) / "large", LARGE)
        if gpu:
            trials = [
                Trial("CIFAR-10 configuration", small, (1, 2, 4, 8, 16, 32, 64, 128, 256), 0.1),
                Trial("256 x 256 configuration", large, (1, 2, 4, 8, 16, 32), 0.2),
            ]
            if against_compilers:  # each batch is compiled for a minute
                batches = ((1, 64), (1, 8))
                trials = [Trial(t.name, t.directory, b, t.block_s) for t, b in zip(trials, batches, strict=True)]
        else:
            trials = [
                Trial("CIFAR-10 configuration", small, (1, 8), 0.5),
                Trial("digits", digits, (1, 8, 16), 0.5),
                Trial("256 x 256 configuration", large, (1,), 0.5, 3),
            ][: 1 if against_compilers else 3]
        yield from chain.from_iterable(compare(trial, list(names), device) for trial in trials)
