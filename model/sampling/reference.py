"""The slow, obvious sampler: one step at a time, the same for all pictures. The tests compare the engine with it."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.sampling.noise import INITIAL, TorchNoise, gaussian
from model.sampling.schedule import Thresholding
from model.sampling.table import Plan

Net = Callable[[Tensor, Tensor], Tensor]  # (x [n, C, H, W], k [n] int64) -> [n, C or 2C, H, W]


def sample_alone(
    net: Net,
    plan: Plan,
    seed: int,
    shape: tuple[int, int, int],
    thresholding: Thresholding | None = None,
    unlabelled: Net | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Builds one picture up from noise. Yields (x_t, x0) before the first step and after each: [1, C, H, W] float32

    unlabelled: the net with the null label, for guidance
    """
    return sample_together(net, plan, [seed], shape, thresholding, unlabelled)


def sample_together(
    net: Net,
    plan: Plan,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    thresholding: Thresholding | None = None,
    unlabelled: Net | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for several seeds: [n, C, H, W] each."""
    keys, sources = torch.tensor(seeds), [TorchNoise(seed, shape) for seed in seeds]

    def given() -> Tensor:
        return torch.stack([source.draw() for source in sources])

    x = given() if plan.noise == "torch" else gaussian(keys, torch.zeros_like(keys), shape, INITIAL)
    x0 = y1 = y2 = y3 = torch.zeros_like(x)
    yield x, x0
    for step, row in enumerate(torch.tensor(plan.rows, dtype=torch.float32)):
        k, p, q, c, m, h, n, e, s, w, u, g, d, a, b, r = row
        levels = k.long().expand(len(seeds))
        out = net(x, levels)
        out, f = out.split(shape[0], dim=1) if out.shape[1] > shape[0] else (out, torch.zeros_like(x))
        if r and unlabelled is not None:
            out = out + r * (out - unlabelled(x, levels)[:, : shape[0]])
        z = gaussian(keys, torch.full_like(keys, step), shape) if s else torch.zeros_like(x)
        x0 = p * x + q * out
        if thresholding is not None and c.isfinite():
            size = x0.abs().flatten(1).quantile(thresholding.ratio, dim=1).clamp(1, thresholding.max)
            x0 = x0 / size.view(-1, 1, 1, 1)
        x0 = x0.clamp(-c, c)
        y = a * x0 + b * x
        outside = u * given() if u else torch.zeros_like(x)
        x = m * x0 + (h * y1 + g * y2 + d * y3) + n * x + e * out + s * torch.exp(w * f) * z + outside
        y1, y2, y3 = y, y1, y2
        yield x, x0
