"""The check behind the promise: in which batch sizes is a sample's result bit for bit the one of the full batch?"""

from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor

from model.digests import short_digest
from model.engine.slots import Slots
from model.sampling.noise import gaussian
from model.sampling.plan import SAMPLERS, plan, resolve
from model.sampling.schedule import Process
from model.sampling.table import COLUMNS, C, K, R

DRAWS = 3  # batches of each size that are compared


def noise_bytes(shape: tuple[int, int, int]) -> bytes:
    """Some of the noise that this machine draws for pictures of this shape."""
    seeds = torch.arange(4)
    return gaussian(seeds, 0 * seeds, shape).numpy().tobytes()


def plan_bytes(process: Process) -> bytes:
    """A short plan of each sampler, as the device computes with it: another version may fill in other numbers."""
    choices = (resolve(process, sampler, min(10, process.schedule.T)) for sampler in SAMPLERS)
    return b"".join(plan(process, choice).rows.astype(np.float32).tobytes() for choice in choices)


class _Trial:
    """Random samples, as many as there are slots, and one denoising step of any of them in slots 0, 1, ..."""

    def __init__(
        self, slots: Slots, T: int, labels: int, step: Callable[[int], None], generator: torch.Generator
    ) -> None:
        seeds = torch.arange(slots.capacity)
        self.slots, self.step = slots, step
        self.x = torch.randn(slots.x.shape, generator=generator).to(slots.device)  # [B, C, H, W]
        self.history = torch.randn(slots.history.shape, generator=generator).to(slots.device)  # [B, 3, C, H, W]
        self.row = torch.zeros(slots.capacity, len(COLUMNS), device=slots.device)  # [B, 16]
        self.row[:, :R] = torch.randn(slots.capacity, R, generator=generator)  # R is 0: each slot by itself
        self.row[:, K] = torch.randint(T, (slots.capacity,), generator=generator).to(slots.device)
        self.row[:, C] = 1.0
        self.label = torch.randint(max(1, labels), (slots.capacity,), generator=generator).to(slots.device)  # [B]
        self.ahead = gaussian(seeds, 0 * seeds, slots.shape) if slots.ahead_steps else None  # [B, C, H, W]

    def results(self, chosen: Tensor) -> Tensor:
        """The pictures of these samples after one step. chosen: [b] on the host -> [b, C, H, W]"""
        slots, count, chosen = self.slots, len(chosen), chosen.to(self.slots.device)
        slots.x[:count], slots.rows[:count, 0], slots.seed[:count] = self.x[chosen], self.row[chosen], chosen
        slots.x0[:count] = slots.cursor[:count] = 0
        slots.history[:count] = self.history[chosen]
        slots.last[:count] = 1
        slots.label[:count] = self.label[chosen]
        if self.ahead is not None:
            slots.ahead[:count] = self.ahead[chosen, None]
        self.step(count)
        return slots.x[:count].clone()

    def clear(self) -> None:
        """Frees all slots."""
        for slot in range(self.slots.capacity):
            self.slots.rows[slot].zero_()
            self.slots.clear(slot)


def find_exact(
    slots: Slots, T: int, buckets: list[int], step: Callable[[int], None], labels: int = 0
) -> Generator[None, None, tuple[list[int], str]]:
    """Tries every bucket with random samples, and yields after each step. All slots are free again at the end.

    step: makes one denoising step of the first slots, given their number; labels: how many the net knows
    -> the buckets in which each sample has the bits it has in the largest one, in any slot and beside any others; and
    the digest of those bits, which is the same at another start only if it computes alike
    """
    generator = torch.Generator().manual_seed(0)
    trial, exact = _Trial(slots, T, labels, step, generator), list[int]()
    expected = trial.results(torch.arange(slots.capacity))
    for bucket in buckets:
        agree = True
        # with repetition, so that even a full batch has other samples in it
        for chosen in [torch.randint(slots.capacity, (bucket,), generator=generator) for _ in range(DRAWS)]:
            agree = agree and torch.equal(trial.results(chosen), expected[chosen.to(slots.device)])
            yield
        if agree:
            exact.append(bucket)
    trial.clear()
    return exact, short_digest(expected.cpu().numpy().tobytes())
