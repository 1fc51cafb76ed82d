"""The noise levels that a plan visits, from T down to 1."""

from typing import get_args

import numpy as np

from model.sampling.schedule import IntArray, Spacing

SPACINGS: tuple[Spacing, ...] = get_args(Spacing)


def timesteps(T: int, steps: int, spacing: Spacing) -> IntArray:
    """`steps` distinct noise levels in 1..T, descending. -> [steps] int64

    leading: multiples of T // steps above 1, so the top of the chain may stay unvisited. linspace: evenly from T to 1.
    trailing: evenly from T, the last one T / steps above 0 (Lin et al. 2023, table 2; diffusers counts from 0).
    Halves are rounded as in diffusers' arithmetic: at 27 and 48 steps other formulas differ by one.
    quadratic: those of DDIM for CIFAR-10, squares of equal steps up to 0.8 T (Song et al. 2020, D.2); where they would
    repeat, every level from below.
    """
    if spacing == "leading":
        return 1 + (T // steps) * np.arange(steps, dtype=np.int64)[::-1]
    if spacing == "trailing":
        return np.round(np.arange(T, 0, -T / steps)[:steps]).astype(np.int64)
    if spacing == "quadratic":
        roots = np.linspace(0, np.sqrt(0.8 * T), steps) if steps > 1 else np.sqrt([0.8 * T])
        return 1 + np.maximum(roots**2, np.arange(steps)).astype(np.int64)[::-1]
    return 1 + np.round(np.linspace(0, T - 1, steps) if steps > 1 else np.array([T - 1])).astype(np.int64)[::-1]


def solver_timesteps(T: int, steps: int, spacing: Spacing) -> IntArray:
    """The same as diffusers' schedulers for DPM-Solver++, UniPC and DEIS choose them. -> [steps] int64

    leading and linspace: those of one step more, without the last, since a solver goes from there to the picture.
    All T steps visit every level.
    """
    if spacing in ("leading", "linspace") and steps < T:
        return timesteps(T, steps + 1, spacing)[:-1]
    return timesteps(T, steps, spacing)
