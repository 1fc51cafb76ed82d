"""Multistep samplers: a step also reads the history of those before it. `model.sampling.table` explains the columns."""

import numpy as np

from model.sampling.samplers import Sampling, Walk
from model.sampling.schedule import FloatArray
from model.sampling.table import A, H, M, N


def dpmpp_2m(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """DPM-Solver++(2M), Lu et al. (2022), algorithm 2: first and last step of first order, the last to x0 itself."""
    rows[:, N] = walk.beta_bar_next / walk.beta_bar
    half_snr = np.log(walk.alpha_bar / walk.beta_bar)  # lambda
    step = np.append(np.diff(half_snr), np.inf)  # the last step goes to lambda = infinity
    full = -walk.alpha_bar_next * np.expm1(-step)
    slope = np.zeros(len(step))
    slope[1:-1] = step[1:-1] / (2 * step[:-2])  # 1 / (2 r)
    rows[:, A] = 1  # the history is of x0
    rows[:, M] = full * (1 + slope)
    rows[:, H] = -full * slope
