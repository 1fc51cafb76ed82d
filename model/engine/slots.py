"""The batch that lives on the device, one slot per picture on its way. The host only seats and moves.

On a GPU the host's work is one launch of a kernel (`model.kernels.slots`) whenever a sample is seated or released; here
it is said in plain torch what these do. No slot is written to but on the stream of the steps, and nothing waits for it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.nets.layers import uses_triton
from model.sampling.noise import INITIAL, gaussian
from model.sampling.plan import COLUMNS, Plan

AHEAD_ELEMENTS = 32_768  # on a CPU a slot's noise is drawn for several steps at once, about this many numbers


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A picture that is to sit down."""

    slot: int
    seed: int
    plan: Plan
    x: Tensor | None = None  # [C, H, W], its x_T, on any device; else the noise of its seed


@dataclass(frozen=True, slots=True)
class Parked:
    """What a slot holds of a picture besides its plan."""

    pictures: Tensor  # [3, C, H, W] x, x0, given
    ahead: Tensor     # [A, C, H, W]


class Tables:
    """The rows of plans that were seated lately, kept on the device: requests of one kind share their plan."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.rows = torch.empty(size, len(COLUMNS), device=device)  # [size, 11], filled from the top
        self._starts: dict[Plan, int] = {}  # each a plan's first row; together they are all that has been filled
        self._used = 0

    def starts(self, plans: Sequence[Plan]) -> list[int]:
        """Where the rows of each of these begin. They fit in all at once; when there is no more room for those that
        are missing, all others are forgotten. The device still finds the old rows where it was told before."""
        missing = [plan for plan in dict.fromkeys(plans) if plan not in self._starts]
        if self._used + sum(map(len, missing)) > len(self.rows):
            self._starts, self._used, missing = {}, 0, list(dict.fromkeys(plans))
        if missing:
            rows = np.concatenate([plan.rows for plan in missing], dtype=np.float32, casting="same_kind")
            upload(self.rows[self._used : self._used + len(rows)], torch.from_numpy(rows))
        for plan in missing:
            self._starts[plan], self._used = self._used, self._used + len(plan)
        return [self._starts[plan] for plan in plans]


def upload(target: Tensor, source: Tensor) -> None:
    """Copies to the device without waiting for it: from pinned memory, which is kept until it has been read."""
    if target.device.type == "cuda" and source.device.type == "cpu":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


def send(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """These numbers on the device, in the same way. -> int64"""
    pinned = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class Slots:
    """What a step reads and writes, slot by slot. A free slot stands on a row of zeros, which changes nothing."""

    def __init__(self, capacity: int, shape: tuple[int, int, int], max_steps: int, device: torch.device) -> None:
        self.capacity, self.shape, self.device = capacity, shape, device
        self.x      = torch.zeros(capacity, *shape, device=device)                             # [B, C, H, W] x_t
        self.x0     = torch.zeros(capacity, *shape, device=device)                             # [B, C, H, W] predicted
        self.given  = torch.zeros(capacity, *shape, device=device)                             # [B, C, H, W] noise
        self.rows   = torch.zeros(capacity, max_steps + 1, len(COLUMNS), device=device)        # [B, S + 1, 11] plans
        self.cursor = torch.zeros(capacity, dtype=torch.int64, device=device)                  # [B] the next row
        self.last   = torch.zeros(capacity, dtype=torch.int64, device=device)                  # [B] the row of zeros
        self.seed   = torch.zeros(capacity, dtype=torch.int64, device=device)                  # [B]
        elements = shape[0] * shape[1] * shape[2]
        steps = max(1, min(32, AHEAD_ELEMENTS // elements)) if device.type == "cpu" else 0
        self.ahead  = torch.zeros(capacity, steps, *shape, device=device)                      # [B, A, C, H, W] noise
        self.order  = torch.arange(capacity, device=device)                                    # [B] 0, 1, ...
        self.tables = Tables(capacity * max_steps, device)
        # The same memory as arrays, with what computes with them: numpy on a CPU, where a call costs it a third.
        self.library: Any = np if device.type == "cpu" else torch
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        self.arrays = SimpleNamespace(**{name: self.array(tensor) for name, tensor in tensors.items()})

    def array(self, tensor: Tensor) -> Any:
        """A tensor as what `library` computes with, in the same memory."""
        return tensor.numpy() if self.device.type == "cpu" else tensor

    def index(self, numbers: Any) -> Tensor:
        """A whole number for each slot, in an array of float32, as what a tensor is indexed by. -> [b] int64"""
        return (torch.from_numpy(numbers) if self.device.type == "cpu" else numbers).reshape(-1).long()

    @property
    def ahead_steps(self) -> int:
        """For how many steps noise is drawn at once; 0 where it is drawn inside the step."""
        return self.ahead.shape[1]

    @property
    def by_kernels(self) -> bool:
        """Whether it is Triton's kernels that seat and move."""
        return not self.ahead_steps and uses_triton(self.x[0])

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self.x, self.x0, self.given, self.rows

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        return self.cursor, self.last, self.seed

    def draw_initial(self, seeds: Sequence[int]) -> Tensor:
        """x_T of these seeds, drawn on the device. -> [n, C, H, W] float32"""
        keys = send(seeds, self.device)  # [n]
        return gaussian(keys, torch.zeros_like(keys), self.shape, INITIAL)

    def seat_all(self, newcomers: Sequence[Newcomer]) -> None:
        """New pictures in as many slots, all at once, each with the x_T it brings or that of its seed."""
        if newcomers and self.by_kernels:
            brought = [new.x for new in newcomers if new.x is not None]
            return self._seat_by_kernel(newcomers, 0, self._on_device(brought) if brought else None)
        seeds = [new.seed for new in newcomers if new.x is None]
        drawn = iter(self.draw_initial(seeds)) if seeds else iter([])
        for new in newcomers:
            self._seat(new, next(drawn) if new.x is None else new.x)

    def seat(self, slot: int, seed: int, plan: Plan, x: Tensor) -> None:
        """A new picture in a slot. x: [C, H, W], its x_T, on any device"""
        self.seat_all([Newcomer(slot, seed, plan, x)])

    def _seat(self, new: Newcomer, x: Tensor) -> None:
        slot, steps = new.slot, len(new.plan)
        upload(self.x[slot], x)
        self.x0[slot].zero_()
        self.given[slot].zero_()
        self.ahead[slot].zero_()
        upload(self.rows[slot, :steps], torch.from_numpy(new.plan.rows.astype("float32")))
        self.rows[slot, steps:].zero_()
        self.cursor[slot] = 0
        self.last[slot] = steps
        self.seed[slot] = new.seed

    def _on_device(self, pictures: list[Tensor]) -> Tensor:
        together = torch.stack(pictures)[:, None]  # [m, 1, C, H, W]
        out = torch.empty(together.shape, device=self.device)
        upload(out, together)
        return out

    def _seat_by_kernel(self, newcomers: Sequence[Newcomer], step: int, pictures: Tensor | None) -> None:
        from model.kernels import slots as kernels

        starts, sources = self.tables.starts([new.plan for new in newcomers]), itertools.count()
        orders = [
            (new.slot, new.seed, len(new.plan), start, step, -1 if new.x is None else next(sources))
            for new, start in zip(newcomers, starts, strict=True)
        ]
        kernels.seat(send(orders, self.device), pictures, self.tables.rows, self._state, self._columns)

    def take(self, slot: int) -> Parked:
        """The state of a picture that has to make room, to be put back later."""
        return Parked(torch.stack([self.x[slot], self.x0[slot], self.given[slot]]), self.ahead[slot].clone())

    def put_back(self, slot: int, seed: int, plan: Plan, step: int, parked: Parked) -> None:
        """A picture that has had `step` updates goes on in any slot."""
        newcomer = Newcomer(slot, seed, plan, parked.pictures[0])
        if self.by_kernels:
            return self._seat_by_kernel([newcomer], step, parked.pictures[None])
        self._seat(newcomer, parked.pictures[0])
        self.x0[slot].copy_(parked.pictures[1])
        self.given[slot].copy_(parked.pictures[2])
        self.ahead[slot].copy_(parked.ahead)
        self.cursor[slot] = step

    def vacate(self, slot: int, successor: int | None) -> None:
        """Nothing is left of the picture in this slot; the one in `successor`, if there is one, goes on here."""
        if successor is None:
            return self.clear(slot)
        if self.by_kernels:
            return self._vacate_by_kernel(successor, slot, clears=True)
        self.move(successor, slot)
        self.clear(successor)

    def clear(self, slot: int) -> None:
        """Nobody sits here: the cursor stands on the row of zeros, and nothing of the last tenant is left."""
        if self.by_kernels:
            return self._vacate_by_kernel(slot, None, clears=True)
        for tensor in (self.x, self.x0, self.given, self.ahead):
            tensor[slot].zero_()
        self.cursor[slot] = self.last[slot]

    def move(self, source: int, target: int) -> None:
        """The picture in `source` goes on in `target`."""
        if self.by_kernels:
            return self._vacate_by_kernel(source, target, clears=False)
        for tensor in (*self._state, *self._columns, self.ahead):
            tensor[target].copy_(tensor[source])

    def _vacate_by_kernel(self, source: int, target: int | None, clears: bool) -> None:
        from model.kernels import slots as kernels

        kernels.vacate(self._state, self._columns, source, target, clears)

    def draw_ahead(self, slot: int, seed: int, step: int) -> None:
        """Noise for this slot's steps from `step` on. The same numbers, whenever they are drawn."""
        count = self.ahead_steps
        self.ahead[slot].copy_(gaussian(torch.full((count,), seed), torch.arange(step, step + count), self.shape))

    def noise(self, batch: int) -> Any:
        """The noise of the next step for the first `batch` slots. -> [b, C, H, W] float32, as an array"""
        if self.ahead_steps:
            return self.arrays.ahead[self.arrays.order[:batch], self.arrays.cursor[:batch] % self.ahead_steps]
        return self.array(gaussian(self.seed[:batch], self.cursor[:batch], self.shape))
