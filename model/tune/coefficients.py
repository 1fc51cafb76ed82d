"""The numbers of a plan's rows by nonlinear least squares on its own end pictures: Levenberg-Marquardt.

The net is a function that is only called, so this works with whatever runs it. The derivative by each number is a
difference: the walk goes on from the step that was changed. The end error counts clamped pictures, as they are seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.sampling.schedule import FloatArray
from model.tune.walk import TUNED, Predict, begin, end, steps

CHANGE = 0.01  # of a number, for its derivative; what it weighs is of the size of a picture
EASIER, HARDER = 0.2, 5.0  # factors of the damping after an update that helped, and one that did not


def free(count: int) -> list[tuple[int, int]]:
    """(row, term) of all numbers that change something in a plan of so many steps: y1 is empty in the first, y2 in the
    second, y3 in the third."""
    return [(row, term) for row in range(count) for term in range(len(TUNED)) if not row < term < 4]


@dataclass(slots=True, eq=False)
class Fit:
    """Rows that are being fitted, and how well they do."""

    rows: FloatArray  # [steps, 16]
    error: float  # mean square of the difference between the end pictures and the teacher's
    damping: float = 0.01
    updates: int = 0  # that were made
    ended: bool = False  # the last one gained too little to go on


def mean_square(predict: Predict, rows: FloatArray, x: Tensor, ends: Tensor, batch: int) -> float:
    """The end error of these rows: mean square over all pixels. x, ends: [N, C, H, W]"""
    pairs = zip(x.split(batch), ends.split(batch), strict=True)
    total = sum(float((end(predict, rows, begin(xs)) - to).double().square().sum()) for xs, to in pairs)
    return total / ends.numel()


def update(predict: Predict, fit: Fit, x: Tensor, ends: Tensor, batch: int, tries: int = 4) -> Iterator[None]:
    """Improves the rows by one update, or leaves them and raises the damping. Yields after each walk."""
    numbers = free(len(fit.rows))
    normal, gradient = np.zeros((len(numbers), len(numbers))), np.zeros(len(numbers))
    for xs, to in zip(x.split(batch), ends.split(batch), strict=True):
        made = list(steps(predict, fit.rows, begin(xs)))
        base = made[-1].after.clamp(-1, 1)
        columns = list[Tensor]()
        for row, term in numbers:
            state = made[row].state
            state[0] += CHANGE * made[row].terms[term]
            columns.append((end(predict, fit.rows[row + 1 :], state) - base).flatten() / CHANGE)
            yield
        jacobian = torch.stack(columns)  # [numbers, B C H W]
        normal += (jacobian @ jacobian.T).double().cpu().numpy()
        gradient += (jacobian @ (to - base).flatten()).double().cpu().numpy()
    if not normal.any():
        return  # all pictures are clamped, wherever the numbers go
    for _ in range(tries):
        damped = normal + np.diag(fit.damping * np.diag(normal) + 1e-9 * np.trace(normal))
        rows = fit.rows.copy()
        for (row, term), change in zip(numbers, np.linalg.solve(damped, gradient), strict=True):
            rows[row, TUNED[term]] += change
        error = mean_square(predict, rows, x, ends, batch)
        yield
        if error < fit.error:
            fit.rows, fit.error, fit.damping = rows, error, fit.damping * EASIER
            return
        fit.damping *= HARDER
