"""The batch that lives on the device, one slot per picture on its way. The host only seats and moves."""

import torch
from torch import Tensor

from model.noise import INITIAL, TorchNoise, gaussian
from model.plan import COLUMNS, Plan

AHEAD_ELEMENTS = 32_768  # on a CPU a slot's noise is drawn for several steps at once, about this many numbers


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

    def seat(self, slot: int, seed: int, plan: Plan, source: TorchNoise | None) -> None:
        """A new picture in a slot, at x_T. `source` is where its noise comes from if not from its seed."""
        steps, key = len(plan), torch.tensor([seed])
        x = gaussian(key, torch.zeros_like(key), self.shape, INITIAL)[0] if source is None else source.draw()
        self.x[slot].copy_(x)
        self.x0[slot].zero_()
        self.given[slot].zero_()
        self.ahead[slot].zero_()
        self.rows[slot, :steps].copy_(torch.from_numpy(plan.rows.astype("float32")))
        self.rows[slot, steps:].zero_()
        self.cursor[slot] = 0
        self.last[slot] = steps
        self.seed[slot] = seed

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


