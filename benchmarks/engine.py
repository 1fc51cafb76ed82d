"""Our engine beside diffusers' pipeline as its users run it (float32, eager), same weights, same device, in turns."""

import json
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from benchmarks.measure import Measure, interleaved, median_ratio
from model.card import read_card
from model.checkpoint import load_model
from model.engine import Engine
from model.events import Request
from model.plan import plan, resolve
from model.runner import Runner
from server.engine_process import choose_dtype, usual_slots

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def cifar10(directory: Path) -> Path:
    """A model directory with google/ddpm-cifar10-32's configuration and random weights."""
    torch.manual_seed(0)
    UNet2DModel(**CIFAR10).save_pretrained(directory)
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


def their_pipeline(directory: Path, device: torch.device, compiled: bool = False) -> DDPMPipeline:
    """diffusers' pipeline on the same weights: float32 and eager, or bfloat16, channels-last and compiled."""
    net = UNet2DModel.from_pretrained(directory)
    if compiled:
        net = net.to(device, torch.bfloat16).to(memory_format=torch.channels_last)
        net.compile(mode="reduce-overhead" if device.type == "cuda" else "default", fullgraph=True)
    pipeline = DDPMPipeline(net, DDPMScheduler.from_pretrained(directory)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(pipeline: DDPMPipeline, batch: int, steps: int) -> None:
    """Makes the same with diffusers."""
    with warnings.catch_warnings(action="ignore"):
        pipeline(batch_size=batch, num_inference_steps=steps, generator=torch.manual_seed(0), output_type="np")


def compare(
    name: str, directory: Path, device: torch.device, batch: int, steps: int, rounds: int, compiled: bool
) -> Iterator[Measure]:
    """Milliseconds per image-step of all contenders, and how many times faster we are."""
    engine, contenders = our_engine(directory, device, usual_slots(device)), {}
    for theirs in ("diffusers", "diffusers compiled")[: 1 + compiled]:
        pipeline = their_pipeline(directory, device, theirs != "diffusers")
        contenders[theirs] = partial(run_pipeline, pipeline, batch, steps)
    seconds = interleaved({"ours": partial(run_engine, engine, batch, steps), **contenders}, rounds)
    for contender, taken in seconds.items():
        each = [1000 * s / (batch * steps) for s in taken]
        median, spread = statistics.median(each), (min(each), max(each))
        yield Measure(f"{name} batch {batch}: {contender}", median, "ms/image-step", spread)
    for theirs in contenders:
        ratio, spread = median_ratio(seconds[theirs], seconds["ours"])
        yield Measure(f"{name} batch {batch}: ours against {theirs}", ratio, "times faster", spread)


def measures(device: torch.device, digits: Path, compiled: bool) -> Iterator[Measure]:
    """Everything this file measures."""
    with tempfile.TemporaryDirectory() as folder:
        random = cifar10(Path(folder))
        yield from compare("CIFAR-10 configuration", random, device, 1, 20, 5, compiled)
        yield from compare("CIFAR-10 configuration", random, device, 8, 5, 5, compiled)
    yield from compare("digits, 100 steps", digits, device, 1, 100, 7, compiled)
    yield from compare("digits, 100 steps", digits, device, 8, 100, 3, compiled)
