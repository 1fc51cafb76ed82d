"""Our engine's loop beside diffusers as its users run it: same weights, same device, in turns, each in its own process.

What is said of each: milliseconds per step by batch and how they grow, start-up, memory, how far its net is from
float64, and whether a picture's bits are the same alone and in company.
"""

import json
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
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import COMPILED_ON_CPU, COMPILED_ON_GPU, EVERYWHERE, ON_GPU, Remote, load
from benchmarks.measure import Measure, interleaved, median_ratio, seconds_of
from model.card import read_card
from model.checkpoint import load_model
from model.engine import Engine
from model.events import Request
from model.plan import plan, resolve
from model.runner import Runner
from server.machine import choose_dtype

# The configurations of google/ddpm-cifar10-32 and of google/ddpm-celebahq-256 and its sisters.
BOTH = {"norm_eps": 1e-6, "attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1}
CIFAR10: dict[str, object] = BOTH | {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
}
LARGE = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A model, the batches it is run at, and how long a block of steps takes at least."""

    name: str
    directory: Path
    batches: Sequence[int]
    block_s: float
    rounds: int = 5


def random_model(directory: Path, config: dict[str, object]) -> Path:
    """A model directory with this configuration and random weights."""
    torch.manual_seed(0)
    UNet2DModel(**config).save_pretrained(directory)
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "variance_type": "fixed_large"}
    (directory / "scheduler_config.json").write_text(json.dumps(scheduler))
    return directory


def our_engine(directory: Path, device: torch.device, slots: int) -> Engine:
    """The engine as the server builds it: numbers as the device computes best, exact buckets only."""
    return Engine(Runner(load_model(read_card(directory), device, choose_dtype("auto", device)), slots))


def run_engine(engine: Engine, batch: int, steps: int) -> None:
    """Makes `batch` pictures of `steps` steps of ddpm."""
    process = engine.runner.model.card.process
    table = plan(process, resolve(process, "ddpm", steps))
    for i in range(batch):
        engine.submit(Request(i, i, table))
    while engine.busy:
        engine.step()


def started(trial: Trial, names: Sequence[str], device: torch.device) -> Iterator[tuple[Remote, float]]:
    """The contenders that could be loaded, and the seconds that took; why the others could not is printed."""
    remotes = [Remote.start(name, trial.directory, device, max(trial.batches)) for name in names]
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
        seconds = interleaved(runs, trial.rounds)
        each = {remote.name: [s / steps[batch] for s in seconds[remote.name]] for remote, steps in fields}
        for name, taken in each.items():
            curves[name].append(1000 * statistics.median(taken))
            spread = (1000 * min(taken), 1000 * max(taken))
            yield Measure(f"{trial.name}, batch {batch}: {name}", curves[name][-1], "ms/step", spread)
        for name in [name for name in each if name != "ours" and "ours" in each]:
            ratio, spread = median_ratio(each[name], each["ours"])
            yield Measure(f"{trial.name}, batch {batch}: ours against {name}", ratio, "times faster", spread)
    for name, curve in curves.items() if len(trial.batches) > 2 else ():
        slope, start = np.polyfit(trial.batches, curve, 1, w=1 / np.array(curve))
        yield Measure(f"{trial.name}: {name}, a step is {start:.3f} + b x", float(slope), "ms")


def answers(trial: Trial, remotes: list[Remote], device: torch.device) -> Iterator[Measure]:
    """How far each net is from float64, and in how many batches a picture's bits are those it has alone."""
    config = UNet2DModel.load_config(trial.directory)
    shape = (max(trial.batches), config["in_channels"], config["sample_size"], config["sample_size"])
    draw = np.random.default_rng(0)
    x, t = draw.standard_normal(shape, dtype=np.float32), draw.integers(0, 1000, shape[0])
    with torch.inference_mode():
        net = load(trial.directory, device, torch.float64, False)
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


def ceilings(device: torch.device) -> tuple[float, float]:
    """What this device reaches at best: bfloat16 matrix products in FLOP/s, copies in bytes/s (read and written)."""
    side, size = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 26)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    product = seconds_of(lambda: torch.mm(a, a), device)
    return 2 * side**3 / product, 2 * size / seconds_of(lambda: target.copy_(source), device)


def limits(trial: Trial, ours: Remote, curve: dict[int, float], device: torch.device) -> Iterator[Measure]:
    """How near we are to what the device can do, and on a GPU how many kernels a step is and what lies between two."""
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
