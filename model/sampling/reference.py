"""The slow, obvious sampler: one picture, one step at a time. The tests compare the engine with it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.sampling.noise import INITIAL, TorchNoise, gaussian
from model.sampling.schedule import Thresholding
from model.sampling.table import Plan

Net = Callable[[Tensor, Tensor], Tensor]  # (x [1, C, H, W], k [1] int64) -> [1, C or 2C, H, W]


def sample_alone(
    net: Net, plan: Plan, seed: int, shape: tuple[int, int, int], thresholding: Thresholding | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Builds one picture up from noise. Yields (x_t, x0) before the first step and after each: [1, C, H, W] float32"""
    key, source = torch.tensor([seed]), TorchNoise(seed, shape)
    x = source.draw()[None] if plan.noise == "torch" else gaussian(key, torch.zeros(1).long(), shape, INITIAL)
    x0 = y1 = y2 = y3 = torch.zeros_like(x)
    yield x, x0
    for step, row in enumerate(torch.tensor(plan.rows, dtype=torch.float32)):
        k, p, q, c, m, h, n, e, s, w, u, g, d, a, b = row
        out = net(x, k.long()[None])
        out, f = out.split(shape[0], dim=1) if out.shape[1] > shape[0] else (out, torch.zeros_like(x))
        z = gaussian(key, torch.tensor([step]), shape) if s else torch.zeros_like(x)
        given = source.draw()[None] if u else torch.zeros_like(x)
        x0 = p * x + q * out
        if thresholding is not None and c.isfinite():
            x0 = x0 / x0.abs().quantile(thresholding.ratio).clamp(1, thresholding.max)
        x0 = x0.clamp(-c, c)
        y = a * x0 + b * x
        x = m * x0 + (h * y1 + g * y2 + d * y3) + n * x + e * out + s * torch.exp(w * f) * z + u * given
        y1, y2, y3 = y, y1, y2
        yield x, x0
