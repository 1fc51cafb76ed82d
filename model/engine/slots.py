"""The batch on the device, one slot per picture in progress. The host only seats, moves and clears.

On a GPU each of these is one launch of a kernel (`model.kernels.slots`); the same in plain torch is here. Slots are
written only on the stream of the steps, and the host never waits for it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.nets.layers import uses_triton
from model.sampling.noise import INITIAL, gaussian
from model.sampling.table import COLUMNS, HISTORY, Plan

AHEAD_ELEMENTS = 32_768  # on a CPU a slot's noise is drawn for several steps at once, about this many numbers


@dataclass(frozen=True, slots=True)
class Seating:
    """A picture to be written to a slot."""

    slot: int
    seed: int
    plan: Plan
    x: Tensor | None = None  # [C, H, W] its x_T, on any device; None for the noise of its seed
    label: int = 0  # of a conditional net


@dataclass(frozen=True, slots=True)
class SavedState:
    """The state of a preempted picture, without its plan."""

    pictures: Tensor  # [3 + HISTORY, C, H, W] x, x0, given, history
    ahead: Tensor     # [A, C, H, W]


class PlanCache:
    """The rows of recently seated plans, on the device: requests of one kind share their plan."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.rows = torch.empty(size, len(COLUMNS), device=device)  # [size, 16], filled from the top
        self._starts: dict[Plan, int] = {}  # each a plan's first row; together they are all that has been filled
        self._used = 0

    def starts(self, plans: Sequence[Plan]) -> list[int]:
        """The index of each plan's first row in `rows`. The plans must all fit at once.

        If there is no room for the missing ones, all others are dropped; work that is queued on the device still finds
        their rows in place, since the stream overwrites them only later.
        """
        missing = [plan for plan in dict.fromkeys(plans) if plan not in self._starts]
        if self._used + sum(plan.steps for plan in missing) > len(self.rows):
            self._starts, self._used, missing = {}, 0, list(dict.fromkeys(plans))
        if missing:
            rows = np.concatenate([plan.rows for plan in missing], dtype=np.float32, casting="same_kind")
            upload(self.rows[self._used : self._used + len(rows)], torch.from_numpy(rows))
        for plan in missing:
            self._starts[plan], self._used = self._used, self._used + plan.steps
        return [self._starts[plan] for plan in plans]


def upload(target: Tensor, source: Tensor) -> None:
    """Copies to the device without waiting for it: from pinned memory, which torch keeps until it has been read."""
    if target.device.type == "cuda" and source.device.type == "cpu":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


def send(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """These numbers on the device, copied as by `upload`. -> int64"""
    pinned = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class Slots:
    """What a step reads and writes. The cursor of a free slot is on a row of zeros, which changes nothing."""

    def __init__(self, capacity: int, shape: tuple[int, int, int], max_steps: int, device: torch.device) -> None:
        self.capacity, self.shape, self.device = capacity, shape, device
        self.x      = torch.zeros(capacity, *shape, device=device)                             # [B, C, H, W] x_t
        self.x0     = torch.zeros(capacity, *shape, device=device)                             # [B, C, H, W] predicted
        self.given  = torch.zeros(capacity, *shape, device=device)                             # [B, C, H, W] noise
        self.history = torch.zeros(capacity, HISTORY, *shape, device=device)                   # [B, 3, C, H, W]
        self.rows   = torch.zeros(capacity, max_steps + 1, len(COLUMNS), device=device)        # [B, S + 1, 16] plans
        self.cursor = torch.zeros(capacity, dtype=torch.int64, device=device)                  # [B] the next row
        self.last   = torch.zeros(capacity, dtype=torch.int64, device=device)                  # [B] the row of zeros
        self.seed   = torch.zeros(capacity, dtype=torch.int64, device=device)                  # [B]
        self.label  = torch.zeros(capacity, dtype=torch.int64, device=device)                  # [B]
        # How many slots further the net's results with and without the label are: 0 unless the picture is guided.
        self.labelled, self.unlabelled = torch.zeros(2, capacity, dtype=torch.int64, device=device)  # [B] each
        elements = shape[0] * shape[1] * shape[2]
        steps = max(1, min(32, AHEAD_ELEMENTS // elements)) if device.type == "cpu" else 0
        self.ahead  = torch.zeros(capacity, steps, *shape, device=device)                      # [B, A, C, H, W] noise
        self.order  = torch.arange(capacity, device=device)                                    # [B] 0, 1, ...
        self.plans  = PlanCache(capacity * max_steps, device)
        # The same memory as arrays of the library that computes: numpy on a CPU, where a call takes a third of torch's.
        self.library: Any = np if device.type == "cpu" else torch
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        self.arrays = SimpleNamespace(**{name: self.array(tensor) for name, tensor in tensors.items()})

    def array(self, tensor: Tensor) -> Any:
        """A tensor as an array of `library`, in the same memory."""
        return tensor.numpy() if self.device.type == "cpu" else tensor

    def tensor(self, array: Any) -> Tensor:
        """An array of `library` as a tensor, in the same memory."""
        tensor: Tensor = torch.from_numpy(array) if self.device.type == "cpu" else array
        return tensor

    def index(self, numbers: Any) -> Tensor:
        """An array of whole numbers in float32, one for each slot, as the index of a tensor. -> [b] int64"""
        return self.tensor(numbers).reshape(-1).long()

    @property
    def ahead_steps(self) -> int:
        """The number of steps whose noise is drawn at once; 0 where it is drawn inside the step."""
        return self.ahead.shape[1]

    @property
    def by_kernels(self) -> bool:
        """Whether Triton's kernels seat, move and clear."""
        return not self.ahead_steps and uses_triton(self.x)

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self.x, self.x0, self.given, self.history, self.rows

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        return self.cursor, self.last, self.seed, self.label, self.labelled, self.unlabelled

    def draw_initial(self, seeds: Sequence[int]) -> Tensor:
        """x_T of these seeds, drawn on the device. -> [n, C, H, W] float32"""
        keys = send(seeds, self.device)  # [n]
        return gaussian(keys, torch.zeros_like(keys), self.shape, INITIAL)

    def seat_all(self, seatings: Sequence[Seating]) -> None:
        """Writes new pictures to as many slots at once, each with the x_T given or with the noise of its seed."""
        if seatings and self.by_kernels:
            given = [new.x for new in seatings if new.x is not None]
            return self._seat_by_kernel(seatings, 0, self._on_device(given) if given else None)
        seeds = [new.seed for new in seatings if new.x is None]
        drawn = iter(self.draw_initial(seeds)) if seeds else iter([])
        for new in seatings:
            self._seat(new, next(drawn) if new.x is None else new.x)

    def seat(self, slot: int, seed: int, plan: Plan, x: Tensor) -> None:
        """Writes a new picture to a slot. x: [C, H, W], its x_T, on any device"""
        self.seat_all([Seating(slot, seed, plan, x)])

    def _seat(self, new: Seating, x: Tensor) -> int:
        slot, steps = new.slot, new.plan.steps
        upload(self.x[slot], x)
        self.x0[slot].zero_()
        self.given[slot].zero_()
        self.history[slot].zero_()
        self.ahead[slot].zero_()
        upload(self.rows[slot, :steps], torch.from_numpy(new.plan.rows.astype("float32")))
        self.rows[slot, steps:].zero_()
        self.cursor[slot] = 0
        self.last[slot] = steps
        self.seed[slot] = new.seed
        self.label[slot] = new.label
        self.labelled[slot] = self.unlabelled[slot] = 0
        return slot

    def _on_device(self, pictures: list[Tensor]) -> Tensor:
        together = torch.stack(pictures)[:, None]  # [m, 1, C, H, W]
        out = torch.empty(together.shape, device=self.device)
        upload(out, together)
        return out

    def _seat_by_kernel(self, seatings: Sequence[Seating], step: int, pictures: Tensor | None) -> None:
        from model.kernels import slots as kernels

        starts, sources = self.plans.starts([new.plan for new in seatings]), itertools.count()
        orders = [
            (new.slot, new.seed, new.plan.steps, start, step, -1 if new.x is None else next(sources), new.label)
            for new, start in zip(seatings, starts, strict=True)
        ]
        kernels.seat(send(orders, self.device), pictures, self.plans.rows, self._state, self._columns)

    def save(self, slot: int) -> SavedState:
        """A copy of the state of a picture that is preempted, for `resume`."""
        pictures = torch.stack([self.x[slot], self.x0[slot], self.given[slot], *self.history[slot]])
        return SavedState(pictures, self.ahead[slot].clone())

    def resume(self, new: Seating, step: int, saved: SavedState) -> None:
        """Writes a preempted picture that has had `step` updates to any slot."""
        if self.by_kernels:
            return self._seat_by_kernel([replace(new, x=saved.pictures[0])], step, saved.pictures[None])
        slot = self._seat(new, saved.pictures[0])
        self.x0[slot].copy_(saved.pictures[1])
        self.given[slot].copy_(saved.pictures[2])
        self.history[slot].copy_(saved.pictures[3:])
        self.ahead[slot].copy_(saved.ahead)
        self.cursor[slot] = step

    def join(self, labelled: int, unlabelled: int) -> None:
        """Makes two slots with the same picture read both their results, of which the first is that with the label."""
        apart = unlabelled - labelled
        self.unlabelled[labelled], self.labelled[unlabelled] = apart, -apart

    def vacate(self, slot: int, successor: int | None) -> None:
        """Clears a slot; with a `successor`, that slot's picture moves here and its slot is cleared instead."""
        if successor is None:
            return self.clear(slot)
        if self.by_kernels:
            return self._vacate_by_kernel(successor, slot, clears=True)
        self.move(successor, slot)
        self.clear(successor)

    def clear(self, slot: int) -> None:
        """Frees a slot: its cursor stands on the row of zeros, and nothing of its picture is left."""
        if self.by_kernels:
            return self._vacate_by_kernel(slot, None, clears=True)
        for tensor in (self.x, self.x0, self.given, self.history, self.ahead, self.labelled, self.unlabelled):
            tensor[slot].zero_()
        self.cursor[slot] = self.last[slot]

    def move(self, source: int, target: int) -> None:
        """Copies the picture in `source`, its plan and its cursor to `target`."""
        if self.by_kernels:
            return self._vacate_by_kernel(source, target, clears=False)
        for tensor in (*self._state, *self._columns, self.ahead):
            tensor[target].copy_(tensor[source])

    def _vacate_by_kernel(self, source: int, target: int | None, clears: bool) -> None:
        from model.kernels import slots as kernels

        kernels.vacate(self._state, self._columns, source, target, clears)

    def draw_ahead(self, slots: Sequence[int], seed: int, step: int) -> None:
        """Draws the noise of a picture's next steps, from `step` on: the same numbers whenever it is called."""
        count = self.ahead_steps
        drawn = gaussian(torch.full((count,), seed), torch.arange(step, step + count), self.shape)
        for slot in slots:
            self.ahead[slot].copy_(drawn)

    def noise(self, batch: int) -> Any:
        """The noise of the next step for the first `batch` slots. -> [b, C, H, W] float32, as an array"""
        if self.ahead_steps:
            return self.arrays.ahead[self.arrays.order[:batch], self.arrays.cursor[:batch] % self.ahead_steps]
        return self.array(gaussian(self.seed[:batch], self.cursor[:batch], self.shape))
