"""What a converged solver makes of some seeds: the pictures that a short plan shall reach, and the way to them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.sampling.plan import levels, plan, resolve
from model.sampling.schedule import FloatArray, IntArray, Process
from model.tune.walk import Predict, begin, steps

LEVELS = 80  # of the teacher: beyond these, its pictures hardly change


@dataclass(slots=True)
class Teacher:
    """What is known of the pictures so far; `teach` adds a batch."""

    grid: IntArray  # [G] the levels that it visits
    rows: FloatArray  # [G, 16]
    grams: FloatArray  # [2, 2G + 1, 2G + 1] products of x at each level and at 0, then x0 at each level, summed over
    # seeds: for solvers that take x0 as it is, and for those that clamp it
    ends: Tensor  # [n, C, H, W] the pictures of the first n seeds
    clip_range: float = 1.0  # of a solver that clamps

    @classmethod
    def untaught(cls, process: Process, shape: tuple[int, int, int]) -> "Teacher":
        """A teacher that has seen no seed: DPM-Solver++(2M) with trailing levels."""
        count = min(LEVELS, process.schedule.T)
        choice = resolve(process, "dpmpp", count, order=2, spacing="trailing", clip=False)
        return cls(
            levels(process.schedule.T, choice)[:-1],
            plan(process, choice).rows,
            np.zeros((2, 2 * count + 1, 2 * count + 1)),
            torch.zeros(0, *shape),
            process.clip_range,
        )

    def teach(self, predict: Predict, x: Tensor) -> Iterator[None]:
        """Walks the next seeds. Yields after each step; nothing is kept until the last. x: [B, C, H, W] their noise"""
        xs, x0s = [x], list[Tensor]()
        for step in steps(predict, self.rows, begin(x)):
            xs.append(step.after)
            x0s.append(step.terms[0].clone())  # a view would keep the other terms, too
            yield
        seen = torch.stack([*xs, *x0s]).flatten(1)  # [2G + 1, B C H W]
        unclamped = (seen @ seen.T).double().cpu().numpy()
        seen[len(xs) :].clamp_(-self.clip_range, self.clip_range)
        self.grams = self.grams + np.stack([unclamped, (seen @ seen.T).double().cpu().numpy()])
        self.ends = torch.cat([self.ends, xs[-1].clamp(-1, 1).cpu()])
