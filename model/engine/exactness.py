"""The check behind the promise: in which batch sizes is a sample's result bit for bit the one of the full batch?"""

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from model.engine.slots import Slots
from model.fingerprint import fingerprint
from model.sampling.noise import gaussian
from model.sampling.plan import COLUMNS, C, K

DRAWS = 3  # batches of each size that are compared


def noise_bytes(shape: tuple[int, int, int]) -> bytes:
    """Some of the noise that this machine draws for pictures of this shape."""
    seeds = torch.arange(4)
    return gaussian(seeds, 0 * seeds, shape).numpy().tobytes()


def find_exact(
    slots: Slots, T: int, buckets: list[int], step: Callable[[int], None]
) -> Generator[None, None, tuple[list[int], str]]:
    """Tries every bucket with random samples, and yields after each step.

    step: one denoising step of the first slots, their number given
    -> the buckets in which a sample has the bits it has in the largest one, in any slot and beside any others, and the
    fingerprint of those bits, which is the same at another start only if it computes alike. All slots are free again.
    """
    everybody = torch.arange(slots.capacity)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(slots.x.shape, generator=generator).to(slots.device)  # [B, C, H, W]
    row = torch.randn(slots.capacity, len(COLUMNS), generator=generator).to(slots.device)  # [B, 11]
    row[:, K] = torch.randint(T, (slots.capacity,), generator=generator).to(slots.device)
    row[:, C] = 1.0
    ahead = gaussian(everybody, 0 * everybody, slots.shape) if slots.ahead_steps else None  # [B, C, H, W]

    def results(chosen: Tensor) -> Tensor:
        """One step of these samples in slots 0, 1, ... -> [b, C, H, W]"""
        count = len(chosen)
        slots.x[:count], slots.rows[:count, 0], slots.seed[:count] = x[chosen], row[chosen], chosen
        slots.x0[:count] = slots.cursor[:count] = 0
        slots.last[:count] = 1
        if ahead is not None:
            slots.ahead[:count] = ahead[chosen, None]
        step(count)
        return slots.x[:count].clone()

    expected, exact = results(everybody.to(slots.device)), []
    for bucket in buckets:
        drawn = [torch.randint(slots.capacity, (bucket,), generator=generator) for _ in range(DRAWS)]
        agree = True
        for chosen in drawn:  # with repetition, so that even a full batch has other samples in it
            on_device = chosen.to(slots.device)
            agree = agree and torch.equal(results(on_device), expected[on_device])
            yield
        if agree:
            exact.append(bucket)
    for slot in range(slots.capacity):
        slots.rows[slot].zero_()
        slots.clear(slot)
    return exact, fingerprint(expected.cpu().numpy().tobytes())
