"""Samplers of one step, each a pure function of a `Walk` that fills columns of a plan.

`model.sampling.table` explains the columns; `model.sampling.multistep` has the samplers that read the history.
"""

from dataclasses import dataclass

import numpy as np

from model.sampling.schedule import FloatArray, IntArray, NoiseSchedule, Process, Spacing, Variance
from model.sampling.table import E, M, N, Noise, S, W


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample, without defaults. Built by `resolve`; a field that does not apply is None."""

    sampler: str
    steps: int
    spacing: Spacing | None  # None where the levels are given, or come from a plan
    clip: bool
    noise: Noise
    variance: Variance | None = None
    eta: float | None = None
    order: int | None = None  # of a multistep solver
    timesteps: tuple[int, ...] | None = None  # the levels, descending, where they are given
    plan: str | None = None  # the name of a plan in the model directory, from which all but the noise comes
    plan_digest: str | None = None  # of its file
    guidance: float | None = None  # of pictures with a label; 1 changes nothing
    guidance_interval: tuple[int, int] | None = None  # the highest and the lowest level with guidance; None: all

    @property
    def guided(self) -> bool:
        """Whether a picture takes two slots, and each of its steps counts twice."""
        return self.guidance not in (None, 1)

    @property
    def image_steps(self) -> int:
        """The work in a picture."""
        return self.steps * (2 if self.guided else 1)


class Walk:
    """The coefficients of samplers along chosen noise levels, from noise down to the picture.

    Letters are those of Su's article (kexue.fm/archives/9119); `_next` is the level after a step. All arrays are
    [steps].
    """

    def __init__(self, process: Process, levels: IntArray) -> None:
        """levels: [steps + 1] before each step, and at the end"""
        schedule: NoiseSchedule = process.schedule
        t, t_next = levels[:-1], levels[1:]
        self.alpha_bar, self.beta_bar = schedule.alpha_bar[t], schedule.beta_bar[t]
        self.alpha_bar_next, self.beta_bar_next = schedule.alpha_bar[t_next], schedule.beta_bar[t_next]
        self.alpha = self.alpha_bar / self.alpha_bar_next
        self.beta_squared = 1 - self.alpha**2
        # x0 = p x + q out, and eps = eps_x x + eps_out out, whatever the net predicts.
        a, b, one, zero = self.alpha_bar, self.beta_bar, np.ones(len(t)), np.zeros(len(t))
        self.p, self.q, self.eps_x, self.eps_out = {
            "epsilon": (1 / a, -b / a, zero, one),
            "v_prediction": (a, -b, b, a),
            "sample": (zero, one, 1 / b, -a / b),
        }[process.prediction]


def ddpm(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """Ho et al. (2020), eq. 7 and 11: the posterior of x_{t-1} given x_t and the predicted x0.

    The last step adds no noise with any spacing, where diffusers adds that of `fixed_large` to the finished picture.
    """
    small = walk.beta_bar_next / walk.beta_bar * np.sqrt(walk.beta_squared)  # sigma of one-point data
    large = np.sqrt(walk.beta_squared)  # sigma of white data: sigma_t = beta_t
    rows[:, M] = walk.alpha_bar_next * walk.beta_squared / walk.beta_bar**2
    rows[:, N] = walk.alpha * walk.beta_bar_next**2 / walk.beta_bar**2
    if choice.variance == "learned":  # Nichol & Dhariwal (2021), eq. 15: between the two, in the logarithm
        rows[:-1, S] = np.sqrt(small[:-1] * large[:-1])
        rows[:-1, W] = 0.5 * np.log(large[:-1] / small[:-1])
    else:
        rows[:-1, S] = (large if choice.variance == "large" else small)[:-1]


def greedy(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """Su's eq. 16: the mean of `ddpm`, without noise. It tends to the mean of the data: low diversity."""
    weight = -walk.beta_squared / (walk.alpha * walk.beta_bar)
    rows[:, N] = 1 / walk.alpha + weight * walk.eps_x
    rows[:, E] = weight * walk.eps_out


def ddim(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """Song et al. (2020), eq. 12 and 16. As in diffusers, eps is the net's own, not read back from a clipped x0."""
    assert choice.eta is not None
    sigma = choice.eta * walk.beta_bar_next / walk.beta_bar * np.sqrt(walk.beta_squared)
    towards = np.sqrt(walk.beta_bar_next**2 - sigma**2)
    rows[:, M] = walk.alpha_bar_next
    rows[:, N] = towards * walk.eps_x
    rows[:, E] = towards * walk.eps_out
    rows[:, S] = sigma
