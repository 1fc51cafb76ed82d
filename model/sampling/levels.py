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
    """
    if spacing == "leading":
        return 1 + (T // steps) * np.arange(steps, dtype=np.int64)[::-1]
    if spacing == "trailing":
        return np.round(np.arange(T, 0, -T / steps)[:steps]).astype(np.int64)
    return 1 + np.round(np.linspace(0, T - 1, steps) if steps > 1 else np.array([T - 1])).astype(np.int64)[::-1]
