"""Our engine's loop beside diffusers as its users run it: same weights, same device, in turns, each in its own process.

What is said of each: milliseconds per step by batch and how they grow, start-up, memory, how far its net is from
float64, and whether a picture's bits are the same alone and in company.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import BARE, COMPILED_ON_CPU, ON_CPU, Setup
from benchmarks.measure import Measure, interleaved, median_ratio, seconds_of
from benchmarks.models import LARGEST, model_directory
from benchmarks.remote import Remote
from benchmarks.runtimes import by_torch, native_dtype, why_not


@dataclass(frozen=True, slots=True)
class Trial:
    """A model, the batches it is run at, and how long a block of steps takes at least.

    growing: batches that are compared with as many steps of one picture
    """

    name: str
    directory: Path
    batches: Sequence[int]
    block_s: float
    rounds: int = 5
    growing: Sequence[int] = ()


def started(trial: Trial, names: Sequence[str], device: torch.device) -> Iterator[tuple[Remote, float]]:
    """The contenders that could be loaded, and the seconds that took; why the others could not is printed."""
    reasons = {name: why_not(name, device) for name in names}
    for name, reason in reasons.items():
        if reason:
            print(f"left out: {name}: {reason}", flush=True)
    setup = Setup(trial.directory, device, max(trial.batches))
    remotes = [Remote.start(name, setup) for name, reason in reasons.items() if not reason]
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
                remote.ask("run", batch, 1)
                steps[batch] = steps_in(trial.block_s, remote, batch)
            yield remote, steps
        except RuntimeError as error:
            print(f"left out: {error}", flush=True)
            remote.end()


def steps_in(block_s: float, remote: Remote, batch: int) -> int:
    """How many steps of a batch fill a block, judged by four of them, or by one if that alone fills it."""
    took_s = remote.ask("run", batch, 1)
    return math.ceil(block_s / (remote.ask("run", batch, 4) / 4)) if took_s < block_s else 1


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
        yield from ratios(f"{trial.name}, batch {batch}", each)
    whole = {name: curve for name, curve in curves.items() if len(curve) == len(trial.batches) > 2}
    for name, curve in whole.items():
        slope, start = np.polyfit(trial.batches, curve, 1, w=1 / np.array(curve))
        yield Measure(f"{trial.name}: {name}, a step is {start:.3f} + b x", float(slope), "ms")


def ratios(title: str, took: dict[str, list[float]]) -> Iterator[Measure]:
    """How many times faster we are than each, and than the best of those that are not ours. took: by rounds"""
    if "ours" not in took:
        return
    for name in [name for name in took if name != "ours"]:
        ratio, spread = median_ratio(took[name], took["ours"])
        yield Measure(
            f"{title}: ours against {name}", ratio, "of its speed" if name == BARE else "times faster", spread
        )
    others = {name: each for name, each in took.items() if not name.startswith("ours")}
    if len(others) > 1:
        best = min(others, key=lambda name: statistics.median(others[name]))
        ratio, spread = median_ratio(others[best], took["ours"])
        yield Measure(f"{title}: ours against the best of the others ({best})", ratio, "times faster", spread)


def growth(trial: Trial, ours: Remote) -> Iterator[Measure]:
    """What a step of a batch takes beside as many steps of one picture, measured in turns."""
    steps = {}
    for batch in (1, *trial.growing):
        ours.ask("run", batch, 1)
        steps[batch] = steps_in(trial.block_s, ours, batch)
    runs = {str(batch): partial(ours.ask, "run", batch, count) for batch, count in steps.items()}
    seconds = {int(batch): taken for batch, taken in interleaved(runs, trial.rounds).items()}
    each = {batch: [s / steps[batch] for s in taken] for batch, taken in seconds.items()}
    for batch in trial.growing:
        ratio, (least, most) = median_ratio(each[batch], each[1])
        if batch == 2:
            yield Measure(f"{trial.name}: ours, a step of 2", ratio, "steps of 1", (least, most))
        spread = least / batch, most / batch
        yield Measure(
            f"{trial.name}: ours, a step of {batch} against {batch} of 1", ratio / batch, "of their time", spread
        )


def answers(trial: Trial, remotes: list[Remote], device: torch.device) -> Iterator[Measure]:
    """How far each net is from float64, and in how many batches a picture's bits are those it has alone."""
    from diffusers import UNet2DModel

    config = UNet2DModel.load_config(trial.directory)
    shape = (max(trial.batches), config["in_channels"], config["sample_size"], config["sample_size"])
    draw = np.random.default_rng(0)
    x, t = draw.standard_normal(shape, dtype=np.float32), draw.integers(0, 1000, shape[0])
    with torch.inference_mode():
        net = by_torch(trial.directory, device, torch.float64, False)
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
    """What this device reaches at best: matrix products in FLOP/s, copies in bytes/s (read and written).

    The products are of bfloat16 where the device multiplies in it, else of float32.

    side: of the matrices; 0: large enough for the device
    """
    side, size = (side or 8192, 1 << 30) if device.type == "cuda" else (side or 2048, 1 << 26)
    a = torch.randn(side, side, device=device, dtype=native_dtype(device))
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
    numbers = str(native_dtype(device)).removeprefix("torch.")
    yield Measure(f"{trial.name}: this device's matrix products, {numbers}", flops / 1e12, "TFLOP/s")
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
    for remote in remotes:
        if remote.name == "ours" and trial.growing:
            yield from as_far_as_it_goes(growth(trial, remote))
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


def trial_of(name: str, directory: Path) -> Trial:
    """How a model of `benchmarks.models` is measured: the larger, the fewer steps."""
    if name == LARGEST:
        return Trial(name, directory, (1, 2), 0.5, rounds=2, growing=(2,))
    growing = range(2, 17) if name == "digits" else (2, 3, 4, 6, 8, 12, 16)
    return Trial(name, directory, (1, 2, 8, 16), 0.5, growing=growing)


def measures(device: torch.device, digits: Path, name: str, against_compilers: bool) -> Iterator[Measure]:
    """Everything this file measures of a model of `benchmarks.models`, on a CPU."""
    names = COMPILED_ON_CPU if against_compilers else ON_CPU
    with model_directory(name, digits) as directory:
        yield from compare(trial_of(name, directory), list(names), device)
