"""Every Triton kernel that the benchmarks launch on a GPU, compiled by running whole engines on one that is not there.

Nothing here says what there is to compile: kernels, arguments and tiles are those that the engine asks for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.absent_gpu import launching
from benchmarks.models import CIFAR10, LARGE, TINY
from model.checkpoint.card import ModelCard, read_card
from model.checkpoint.load import Model
from model.engine.engine import Engine
from model.engine.events import Request
from model.engine.runner import prepared
from model.engine.slots import Seating
from model.nets.build import build
from model.nets.config import architecture
from model.nets.convolution import Conv
from model.sampling.plan import plan, resolve

DIGITS = Path(__file__).parent / "digits"
META = torch.device("meta")
STEPS = 3  # of each picture


@dataclass(frozen=True, slots=True)
class Use:
    """A net, and the batches that it is run at."""

    card: ModelCard
    buckets: Sequence[int]
    dtype: torch.dtype = torch.bfloat16


def uses() -> list[Use]:
    """Everything that the benchmarks run on a GPU. Batches between these are cut up like one of them."""
    digits = read_card(DIGITS)
    tiny, small, large = (replace(digits, architecture=architecture(dict(c))) for c in (TINY, CIFAR10, LARGE))
    to_64 = (1, 2, 4, 8, 16, 32, 64)
    return [
        Use(tiny, (1, 2, 4)),
        Use(tiny, (1,), torch.float32),
        Use(digits, to_64),
        Use(digits, (1, 2), torch.float32),
        Use(small, (*to_64, 128, 256)),
        Use(large, to_64[:-1]),
    ]


def without_weights(card: ModelCard, device: torch.device, dtype: torch.dtype) -> Model:
    """The model as `load_layers` gives it on a GPU, but for its numbers."""
    with META, torch.inference_mode():
        net = build(card.architecture).eval().requires_grad_(False)
        table = torch.empty(card.process.schedule.T, net.embedding_width, dtype=dtype)
        net.fuse()
        net = net.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Model(card, net.to_empty(device=device), torch.zeros_like(table, device=device), 0)


def run(use: Use, invariant: bool, device: torch.device) -> None:
    """Pictures come, are shown, go on in another slot and go, in each bucket; by our convolutions or the library's."""
    runner = prepared(without_weights(use.card, device, use.dtype), max(use.buckets), exact=False, buckets=use.buckets)
    for module in runner.model.module.modules():
        if isinstance(module, Conv):
            module.use("invariant" if invariant else "library")
    engine, table = Engine(runner), plan(use.card.process, resolve(use.card.process, "ddpm", STEPS))
    for bucket in runner.buckets:
        for seed in range(bucket):
            frames = frozenset({0, 1} if seed == 0 else ())
            engine.submit(Request(seed, seed, table, frames=frames, wants_floats=seed == 0))
        engine.step()
        runner.slots.resume(Seating(0, 0, table), 1, runner.slots.save(0))
        engine.cancel(0)
        while engine.busy:
            engine.step()


def compiled(arch: int, used: Iterable[Use], device: torch.device = META) -> list[Any]:
    """The kernels that these take on a GPU of this kind, each once. device: what stands for it"""
    kernels: dict[str, Any] = {}
    with launching(arch, lambda kernel: kernels.setdefault(kernel.hash, kernel), device):
        for use in used:
            for invariant in (True, False):
                run(use, invariant, device)
    return list(kernels.values())
