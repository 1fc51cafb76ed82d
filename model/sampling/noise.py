"""Gaussian noise as a pure function of (seed, step, element), the same on every device; no generator state anywhere.

Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (element / 4, step, domain, 0). Box-Muller in float64, rounded
to float32. `TorchNoise` is the other source: the draws of `torch.Generator("cpu")`, for comparisons with diffusers.
"""

import math

import torch
from torch import Tensor

INITIAL, STEP = 0, 1  # domains: x_T, and the noise a step adds
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10. Words are int64 tensors holding 32 bits, of any shapes that broadcast. -> four words"""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product may pass 2^63; int64 wraps, and its upper half is right after masking.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gaussian(seed: Tensor, step: Tensor, shape: tuple[int, ...], domain: int = STEP) -> Tensor:
    """Standard normal noise for a batch. seed: [B] int64, step: [B] int64 -> [B, *shape] float32"""
    count = math.prod(shape)
    element = torch.arange((count + 3) // 4, device=seed.device)  # [count / 4]
    seed, step = seed[:, None], step[:, None]
    zero = torch.zeros_like(step)
    words = philox((element, step, zero + domain, zero), (seed & _MASK, (seed >> 32) & _MASK))
    u = [(word.double() + 0.5) * 2.0**-32 for word in words]  # in (0, 1)
    radius = [torch.sqrt(-2 * torch.log(u[i])) for i in (0, 2)]
    angle = [2 * math.pi * u[i] for i in (1, 3)]
    z = [part for r, a in zip(radius, angle, strict=True) for part in (r * torch.cos(a), r * torch.sin(a))]
    return torch.stack(z, dim=-1).flatten(1)[:, :count].float().view(-1, *shape)


class TorchNoise:
    """The draws of diffusers' pipelines for one picture from `torch.Generator("cpu").manual_seed(seed)`."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._shape = (1, *shape)

    def draw(self) -> Tensor:
        """The next draw: x_T first, then one per step that adds noise. -> [C, H, W] float32"""
        return torch.randn(self._shape, generator=self._generator)[0]
