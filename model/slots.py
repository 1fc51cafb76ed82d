"""The batch that lives on the device, one slot per picture on its way. The host only seats and moves."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.noise import INITIAL, gaussian
from model.plan import COLUMNS, Plan

AHEAD_ELEMENTS = 32_768  # on a CPU a slot's noise is drawn for several steps at once, about this many numbers


@dataclass(frozen=True, slots=True)
class Parked:
    """What a slot holds of a picture besides its plan."""

    x: Tensor      # [C, H, W]
    x0: Tensor     # [C, H, W]
    given: Tensor  # [C, H, W]
    ahead: Tensor  # [A, C, H, W]


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

    @property
    def ahead_steps(self) -> int:
        """For how many steps noise is drawn at once; 0 where it is drawn inside the step."""
        return self.ahead.shape[1]

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copies to the device without waiting for it: from pinned memory, which is kept until it has been read."""
        if self.device.type == "cuda" and source.device.type == "cpu":
            source = source.pin_memory()
        target.copy_(source, non_blocking=True)

    def draw_initial(self, seeds: Sequence[int]) -> Tensor:
        """x_T of these seeds, drawn on the device. -> [n, C, H, W] float32"""
        keys = torch.empty(len(seeds), dtype=torch.int64, device=self.device)  # [n]
        self.upload(keys, torch.tensor(seeds, dtype=torch.int64))
        return gaussian(keys, torch.zeros_like(keys), self.shape, INITIAL)

    def seat(self, slot: int, seed: int, plan: Plan, x: Tensor) -> None:
        """A new picture in a slot. x: [C, H, W], its x_T, on any device"""
        steps = len(plan)
        self.upload(self.x[slot], x)
        self.x0[slot].zero_()
        self.given[slot].zero_()
        self.ahead[slot].zero_()
        self.upload(self.rows[slot, :steps], torch.from_numpy(plan.rows.astype("float32")))
        self.rows[slot, steps:].zero_()
        self.cursor[slot] = 0
        self.last[slot] = steps
        self.seed[slot] = seed

    def take(self, slot: int) -> "Parked":
        """The state of a picture that has to make room, to be put back later."""
        return Parked(*(tensor[slot].clone() for tensor in (self.x, self.x0, self.given, self.ahead)))

    def put_back(self, slot: int, seed: int, plan: Plan, step: int, parked: "Parked") -> None:
        """A picture that has had `step` updates goes on in any slot."""
        self.seat(slot, seed, plan, parked.x)
        for tensor, kept in ((self.x0, parked.x0), (self.given, parked.given), (self.ahead, parked.ahead)):
            tensor[slot].copy_(kept)
        self.cursor[slot] = step

    def clear(self, slot: int) -> None:
        """Nobody sits here: the cursor stands on the row of zeros, and nothing of the last tenant is left."""
        for tensor in (self.x, self.x0, self.given, self.ahead):
            tensor[slot].zero_()
        self.cursor[slot] = self.last[slot]

    def move(self, source: int, target: int) -> None:
        """The picture in `source` goes on in `target`."""
        for tensor in (self.x, self.x0, self.given, self.rows, self.cursor, self.last, self.seed, self.ahead):
            tensor[target].copy_(tensor[source])

    def draw_ahead(self, slot: int, seed: int, step: int) -> None:
        """Noise for this slot's steps from `step` on. The same numbers, whenever they are drawn."""
        count = self.ahead_steps
        self.ahead[slot].copy_(gaussian(torch.full((count,), seed), torch.arange(step, step + count), self.shape))

    def noise(self, batch: int) -> Tensor:
        """The noise of the next step for the first `batch` slots. -> [b, C, H, W] float32"""
        cursor = self.cursor[:batch]
        if self.ahead_steps:
            return self.ahead[torch.arange(batch), cursor % self.ahead_steps]
        return gaussian(self.seed[:batch], cursor, self.shape)


