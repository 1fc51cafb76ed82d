"""Levels for few steps, by dynamic programming over a fine grid of levels that a teacher has walked.

The cost of a step is the solver's local error: its result from the teacher's x and x0, minus the teacher's x at the
next level. All of these are linear in what the teacher saw, so their Gram matrix gives every cost without the net.
"""

import numpy as np

from model.sampling.schedule import FloatArray, IntArray, Process


def best_levels(process: Process, grid: IntArray, gram: FloatArray, steps: int, power: float) -> IntArray:
    """`steps` levels of the grid, beginning with its first, whose steps to t = 0 have the least sum of local errors.

    gram: [2G + 1, 2G + 1] products of the teacher's x at the grid's levels, its x at 0, and its x0 at the grid's levels
    power: of each error's norm relative to that of x, in the sum. Raises ValueError if the grid has fewer levels.
    """
    size = len(grid)
    if steps > size:
        raise ValueError(f"there are {size} levels to choose {steps} from")
    if steps == 1:
        return grid[:1]
    cost = local_errors(process, grid, gram) ** power
    # total[i, j]: the least sum of errors on the way to j, whose last step is from i. The first step has no history.
    total, before = np.full((size, size + 1), np.inf), list[IntArray]()
    total[0] = cost[0, 0]
    for _ in range(steps - 1):
        through = total[:, :size, None] + cost  # [h, i, j]: a step from i to j behind one from h to i
        before.append(through.argmin(axis=0))
        total = through.min(axis=0)
    level, target = int(total[:, size].argmin()), size
    chosen = [level]
    for came_from in reversed(before):
        level, target = int(came_from[level, target]), level
        chosen.append(level)
    return grid[chosen[::-1]]


def local_errors(process: Process, grid: IntArray, gram: FloatArray) -> FloatArray:
    """The relative error of a step of second order from level i to j behind one from h. -> [G, G, G + 1], [h, i, j]

    h = i stands for no history, hence a step of first order, as the step to t = 0 is. Infinite unless h <= i < j.
    """
    size, errors = len(grid), np.full((len(grid), len(grid), len(grid) + 1), np.inf)
    schedule, t = process.schedule, np.append(grid, 0)
    alpha_bar, beta_bar = schedule.alpha_bar[t], schedule.beta_bar[t]
    lam = np.log(alpha_bar[:-1] / beta_bar[:-1])
    for i in range(size):
        for j in range(i + 1, size + 1):
            n = beta_bar[j] / beta_bar[i]
            m = alpha_bar[j] - alpha_bar[i] * n
            slope = np.zeros(i + 1)
            if j < size:
                slope[:i] = 0.5 * m * (lam[j] - lam[i]) / (lam[i] - lam[:i])
            base = np.array([n, m, -1.0])
            at = np.array([i, size + 1 + i, j])
            first = base @ gram[np.ix_(at, at)] @ base
            past = size + 1 + np.arange(i + 1)
            towards = gram[np.ix_(past, at)] @ base  # with x0 of h
            now = gram[size + 1 + i, at] @ base
            cross = now - towards
            square = gram[past[-1], past[-1]] - 2 * gram[past[-1], past] + gram[past, past]
            errors[: i + 1, i, j] = np.sqrt(np.maximum(first + 2 * slope * cross + slope**2 * square, 0) / gram[j, j])
    return errors
