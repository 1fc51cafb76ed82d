"""How far half precision leads a picture away from float32, with the same noise: ours, and diffusers' on its own.

    python -m benchmarks.precision [--gpu] [--seeds 64] [--steps 1000]

diffusers keeps the picture itself in the net's precision, as its pipelines do; we keep it in float32. PSNR of pictures
in [-1, 1] against our float32; `pooled` is that of the mean squared error over all pictures.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from numpy.typing import NDArray

from benchmarks.measure import Measure, report
from benchmarks.models import grow_up
from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Finished, Request
from model.engine.runner import prepared
from model.sampling.noise import INITIAL, gaussian
from model.sampling.plan import plan, resolve
from server.worker.cpus import cores

DIGITS = Path(__file__).parent / "digits"
BATCH = 16
Pictures = NDArray[np.float32]  # [N, C, H, W] in [-1, 1]


def ours(directory: Path, device: torch.device, dtype: torch.dtype, seeds: range, steps: int) -> Pictures:
    """Pictures by our engine."""
    torch.set_num_threads(cores())  # the net takes as many; `grow_up` leaves fewer
    model = load_model(read_card(directory), device, dtype)
    grow_up(model, BATCH)
    engine = Engine(prepared(model, BATCH))
    process = engine.runner.model.card.process
    table, made = plan(process, resolve(process, "ddpm", steps)), dict[int, NDArray[np.floating]]()
    for seed in seeds:
        engine.submit(Request(seed, seed, table, wants_floats=True))
    while engine.busy:
        for event in engine.step():
            assert isinstance(event, Finished) and isinstance(event.id, int) and event.floats is not None, event
            made[event.id] = event.floats
    return np.stack([made[seed] for seed in seeds]).astype(np.float32)


@torch.inference_mode()
def theirs(directory: Path, device: torch.device, dtype: torch.dtype, seeds: range, steps: int) -> Pictures:
    """Pictures by diffusers' net and scheduler, handed our noise."""
    torch.set_num_threads(cores())
    net = UNet2DModel.from_pretrained(directory, low_cpu_mem_usage=False).eval().to(device, dtype)
    net = net.to(memory_format=torch.channels_last)
    scheduler = DDPMScheduler.from_pretrained(directory)
    scheduler.set_timesteps(steps)
    shape = (net.config.in_channels, net.config.sample_size, net.config.sample_size)
    made = []
    for first in range(seeds.start, seeds.stop, BATCH):
        keys = torch.arange(first, min(first + BATCH, seeds.stop), device=device)
        x = gaussian(keys, torch.zeros_like(keys), shape, INITIAL).to(dtype)
        for step, t in enumerate(scheduler.timesteps):
            z = gaussian(keys, torch.full_like(keys, step), shape).to(dtype)
            with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z):
                x = scheduler.step(net(x, t).sample, t, x).prev_sample
        made.append(x.float().clamp(-1, 1).cpu())
    return np.asarray(torch.cat(made).numpy())


def distance(name: str, made: Pictures, expected: Pictures) -> Iterator[Measure]:
    """Median and pooled PSNR in decibels; a picture that is the same counts as 120."""
    errors = np.maximum(((made.astype(np.float64) - expected) ** 2).mean(axis=(1, 2, 3)), 4e-12)
    each = sorted(float(10 * np.log10(4 / error)) for error in errors)
    yield Measure(f"{name}: PSNR against float32, median", statistics.median(each), "dB", (each[0], each[-1]))
    yield Measure(f"{name}: PSNR against float32, pooled", float(10 * np.log10(4 / errors.mean())), "dB")


def measures(device: torch.device, digits: Path, seeds: range, steps: int) -> Iterator[Measure]:
    """Everything this file measures."""
    expected = ours(digits, device, torch.float32, seeds, steps)
    what = f"digits, {len(seeds)} seeds, {steps} steps"
    yield from distance(f"{what}: ours in bfloat16", ours(digits, device, torch.bfloat16, seeds, steps), expected)
    half = theirs(digits, device, torch.bfloat16, seeds, steps)
    yield from distance(f"{what}: diffusers in bfloat16", half, expected)
    yield from distance(f"{what}: diffusers", theirs(digits, device, torch.float32, seeds, steps), expected)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on the first GPU (default: on the CPU)")
    parser.add_argument("--seeds", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/precision.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cuda" if args.gpu else "cpu")
    report(measures(device, DIGITS, range(args.seeds), args.steps), args.out)


if __name__ == "__main__":
    main()
