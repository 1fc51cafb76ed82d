"""Multistep samplers: a step also reads the history of those before it. `model.sampling.table` explains the columns.

All are DDIM's step, exact where x0 and eps do not change, plus weights of the current x0 (or eps) and of up to three in
the history, which follow how it changes in lambda = log(alpha_bar / beta_bar), half the logarithm of the SNR.
"""

from math import factorial

import numpy as np

from model.sampling.samplers import Sampling, Walk, ddpm
from model.sampling.schedule import FloatArray, IntArray
from model.sampling.table import A, B, D, G, H, M, N

ADAMS_BASHFORTH = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24  # by order
FEW_STEPS = 15  # with fewer, DPM-Solver's and DEIS's authors end with steps of lower order


def ipndm(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """iPNDM, Zhang & Chen (2022), section 3.3: PLMS of Liu et al. (2022), eq. 12, whose first steps are of lower order.

    The weights are those of equal steps, whatever the levels are.
    """
    assert choice.order is not None
    toward_eps = walk.beta_bar_next - walk.alpha_bar_next * walk.beta_bar / walk.alpha_bar
    weights = ADAMS_BASHFORTH[np.minimum(np.arange(choice.steps), choice.order - 1)]
    weights[:, 0] -= 1  # which DDIM's step has
    _ddim(walk, rows)
    _add_eps(walk, rows, toward_eps[:, None] * weights)


def deis(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """DEIS, Zhang & Chen (2022): eps as a polynomial in lambda (diffusers' "logrho"), integrated exactly."""
    order, lam, h = _orders(walk, choice), *_lambda(walk)
    weights = np.zeros((choice.steps, 4))
    for p in range(2, order.max() + 1):
        at = np.flatnonzero(order == p)
        of_past = -walk.beta_bar_next[at, None] * _integrated(_past(lam, at, p), h[at], h[at])
        weights[at, 1:p], weights[at, 0] = of_past, -of_past.sum(axis=1)
    _ddim(walk, rows)
    _add_eps(walk, rows, weights)


def dpmpp(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """DPM-Solver++, multistep, Lu et al. (2022), algorithm 2 and, for order 3, their code; the last step goes to x0.

    The last term of order 3 is half of what Taylor's would be, there as here, so that the error falls as with order 2.
    """
    _ddim(walk, rows)
    _dpmpp(walk, rows, choice, 1)


def dpmpp_sde(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """SDE-DPM-Solver++, Lu et al. (2022), section 6; order 1 is `ddpm` with the small variance.

    Order 3 is k-diffusion's (`dpmpp_3m_sde`); diffusers' has the wrong sign in its last term.
    """
    ddpm(walk, rows, choice)  # sampling's variance is None here, which stands for the small one
    _dpmpp(walk, rows, choice, 2)


def _dpmpp(walk: Walk, rows: FloatArray, choice: Sampling, speed: int) -> None:
    """Adds the terms of second and third order, where x0 has weight exp(-speed u) at a distance u from the end."""
    order, lam, h = _orders(walk, choice), *_lambda(walk)
    weights = np.zeros((choice.steps, 4))
    at = np.flatnonzero(order == 2)
    first = h[at] / (lam[at] - lam[at - 1])  # h times the slope of x0, as a multiple of the difference
    change = 0.5 * _phi(1, -speed * h[at]) * first
    weights[at, 0], weights[at, 1] = change, -change
    at = np.flatnonzero(order == 3)
    near, far, both = lam[at] - lam[at - 1], lam[at - 1] - lam[at - 2], lam[at] - lam[at - 2]
    slope = np.stack([1 / near, -1 / near, 0 * near], 1) * h[at, None]
    bend = (slope - np.stack([0 * far, 1 / far, -1 / far], 1) * h[at, None]) / both[:, None]
    weights[at, :3] = _phi(2, -speed * h[at])[:, None] * (slope + near[:, None] * bend)
    weights[at, :3] += (_phi(3, -speed * h[at]) * h[at])[:, None] * bend
    inner = order > 1
    weights[inner] *= (walk.alpha_bar_next * speed * h)[inner, None]
    _add_x0(rows, weights)


def unipc(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """UniPC with B2(h), Zhao et al. (2023), algorithms 5 to 8; its last steps are of lower order for any step count.

    The corrector adds x0's to the state in which the net has been asked. Put into the next predictor, that is one row.
    """
    order, lam, h = _orders(walk, choice, always=True), *_lambda(walk)
    # Weights beyond DDIM's step: those of the predictor of this step, and of the corrector of the one before.
    predictor, corrector = np.zeros((2, choice.steps, 4))
    for p in range(1, order.max() + 1):
        at = np.flatnonzero(order[:-1] == p)
        nodes, step = _past(lam, at, p), h[at]
        if p > 1:
            half = -0.5 * step * _phi(1, -step) / nodes[:, 0]
            of_past = -step[:, None] * half[:, None] if p == 2 else _integrated(nodes, step, -step)
            predictor[at, 1:p], predictor[at, 0] = of_past, -of_past.sum(axis=1)
        corrected = 0.5 * (step * _phi(1, -step))[:, None]
        if p > 1:
            corrected = _integrated(np.column_stack([step, nodes]), step, -step)
        corrector[at + 1, 0], corrector[at + 1, 2 : p + 1] = corrected[:, 0], corrected[:, 1:]
        corrector[at + 1, 1] = -corrected.sum(axis=1)
    corrector[1:, 1:] -= predictor[:-1, :-1]
    _ddim(walk, rows)
    _add_x0(rows, walk.alpha_bar_next[:, None] * predictor + (rows[:, N] * walk.alpha_bar)[:, None] * corrector)


def _orders(walk: Walk, choice: Sampling, always: bool = False) -> IntArray:
    """The order of each step: no more than there are steps so far, and at the end, if steps are few or `always`, than
    there are steps left; that of a step to x0 is 1. -> [steps]"""
    assert choice.order is not None
    order = np.minimum(choice.order, np.arange(1, choice.steps + 1))
    if always or choice.steps < FEW_STEPS:
        order = np.minimum(order, order[::-1])
    return np.where(walk.beta_bar_next > 0, order, 1)


def _lambda(walk: Walk) -> tuple[FloatArray, FloatArray]:
    """lambda at each level, and how far it is to the next; to x0, infinitely far, 0 stands here. [steps] each"""
    decay = walk.alpha * walk.beta_bar_next / walk.beta_bar  # exp(-h)
    return np.log(walk.alpha_bar / walk.beta_bar), -np.log(np.where(decay > 0, decay, 1.0))


def _past(lam: FloatArray, at: IntArray, order: int) -> FloatArray:
    """Where the history of these steps lies, in lambda from the current level. -> [len(at), order - 1], negative"""
    return np.stack([lam[at - j] - lam[at] for j in range(1, order)], axis=1) if order > 1 else np.zeros((len(at), 0))


def _integrated(nodes: FloatArray, h: FloatArray, z: FloatArray) -> FloatArray:
    """Weights of y at the nodes, beyond its value at 0, in the integral over u of exp(z (1 - u / h)) y(u) from 0 to h.

    y is the polynomial through 0 and the nodes. nodes: [k, n], h: [k], z: [k] -> [k, n]
    """
    scale = np.abs(nodes).max(axis=1)
    powers = range(1, nodes.shape[1] + 1)
    moments = np.stack([factorial(i) * _phi(i + 1, z) * (h / scale) ** i for i in powers], axis=1)
    vandermonde = np.stack([(nodes / scale[:, None]) ** i for i in powers], axis=1)  # [k, powers, nodes]
    solved: FloatArray = np.linalg.solve(vandermonde, moments[..., None])[..., 0]
    return h[:, None] * solved


def _phi(k: int, z: FloatArray) -> FloatArray:
    """phi_k(z), the integral of exp((1 - u) z) u^(k-1) / (k-1)! from 0 to 1: (e^z - 1) / z for k = 1."""
    small = np.abs(z) < 1  # where the recursion below would lose digits
    near, away = np.where(small, z, 0.0), np.where(small, 1.0, z)
    series = np.zeros(len(z))
    for j in reversed(range(18)):
        series = series * near + 1 / factorial(j + k)
    recursive = np.expm1(away) / away
    for j in range(1, k):
        recursive = (recursive - 1 / factorial(j)) / away
    return np.where(small, series, recursive)


def _ddim(walk: Walk, rows: FloatArray) -> None:
    """DDIM's step, in which eps is that of the clamped x0."""
    rows[:, N] = walk.beta_bar_next / walk.beta_bar
    rows[:, M] = walk.alpha_bar_next - walk.alpha_bar * rows[:, N]


def _add_x0(rows: FloatArray, weights: FloatArray) -> None:
    """Adds weights of x0 and of a history of x0. weights: [steps, 4]"""
    rows[:, A] = 1
    rows[:, [M, H, G, D]] += weights


def _add_eps(walk: Walk, rows: FloatArray, weights: FloatArray) -> None:
    """Adds weights of eps = (x - alpha_bar x0) / beta_bar and of a history of eps. weights: [steps, 4]"""
    rows[:, A], rows[:, B] = -walk.alpha_bar / walk.beta_bar, 1 / walk.beta_bar
    rows[:, M] += rows[:, A] * weights[:, 0]
    rows[:, N] += rows[:, B] * weights[:, 0]
    rows[:, [H, G, D]] += weights[:, 1:]
