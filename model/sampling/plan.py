"""Samplers as tables. Everything in which two requests differ is in one row of numbers per step:

    (k, p, q, c, m, h, n, e, s, w, u)

and one denoising step, for every sampler, step count, prediction and clipping choice, is

    out, f = net(x, k)                                    f: the extra channels of a learned-variance net, else 0
    x0  = clamp(p x + q out, -c, c)
    x'  = m x0 + h x0_before + n x + e out + s exp(w f) z + u given

A sampler is a pure function of a `Walk` that fills columns; rows are computed once, on the host, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from model.errors import PlanError
from model.sampling.schedule import FloatArray, NoiseSchedule, Process, Spacing, Variance

IntArray: TypeAlias = NDArray[np.int64]
Noise = Literal["philox", "torch"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
NOISES: tuple[Noise, ...] = get_args(Noise)

COLUMNS = "kpqcmhneswu"
K, P, Q, C, M, H, N, E, S, W, U = range(11)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The table that a sample walks down, one row per step."""

    rows: FloatArray  # [steps, 11]
    t: IntArray  # [steps + 1] the noise level before each step; the last is 0
    noise: Noise = "philox"  # where x_T and the noise of the steps come from
    steps: int = field(init=False)
    draws: bool = field(init=False)  # whether any step adds noise that `model.sampling.noise.gaussian` draws

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", len(self.rows))
        object.__setattr__(self, "draws", bool(self.rows[:, S].any()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample, without defaults. Built by `resolve`; a field that does not apply is None."""

    sampler: str
    steps: int
    spacing: Spacing
    clip: bool
    noise: Noise
    variance: Variance | None = None
    eta: float | None = None


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


class Walk:
    """The coefficients of samplers along chosen noise levels, from noise down to the picture.

    Letters are those of Su's article (kexue.fm/archives/9119); `_next` is the level after a step (0 after the last).
    All arrays are [steps].
    """

    def __init__(self, process: Process, t: IntArray) -> None:
        schedule: NoiseSchedule = process.schedule
        t_next = np.append(t[1:], 0)
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


def dpmpp_2m(walk: Walk, rows: FloatArray, choice: Sampling) -> None:
    """DPM-Solver++(2M), Lu et al. (2022), algorithm 2: first and last step of first order, the last to x0 itself."""
    rows[:, N] = walk.beta_bar_next / walk.beta_bar
    half_snr = np.log(walk.alpha_bar / walk.beta_bar)  # lambda
    step = np.append(np.diff(half_snr), np.inf)  # the last step goes to lambda = infinity
    full = -walk.alpha_bar_next * np.expm1(-step)
    slope = np.zeros(len(step))
    slope[1:-1] = step[1:-1] / (2 * step[:-2])  # 1 / (2 r)
    rows[:, M] = full * (1 + slope)
    rows[:, H] = -full * slope


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler's function, and those of the optional fields that it uses."""

    fill: Callable[[Walk, FloatArray, Sampling], None]
    fields: frozenset[str] = frozenset()


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, frozenset({"variance"})),
    "greedy": Sampler(greedy),
    "ddim": Sampler(ddim, frozenset({"eta"})),
    "dpmpp_2m": Sampler(dpmpp_2m),
}


def resolve(
    process: Process,
    sampler: str = "ddpm",
    steps: int | None = None,
    *,
    variance: Variance | None = None,
    eta: float | None = None,
    spacing: Spacing | None = None,
    clip: bool | None = None,
    noise: Noise = "philox",
) -> Sampling:
    """Completes a request's choices with the checkpoint's defaults. Raises PlanError naming the field."""
    if sampler not in SAMPLERS:
        raise PlanError("sampler", f"sampler must be one of {', '.join(SAMPLERS)}")
    fields, T = SAMPLERS[sampler].fields, process.schedule.T
    steps = process.default_steps if steps is None else steps
    if not 1 <= steps <= T:
        raise PlanError("steps", f"steps must lie in 1..{T}, got {steps}")
    for name, given in (("variance", variance), ("eta", eta)):
        if given is not None and name not in fields:
            owners = ", ".join(owner for owner, s in SAMPLERS.items() if name in s.fields)
            raise PlanError(name, f"{name} applies to {owners} only, not to {sampler}")
    if "variance" in fields:
        variance = _resolve_variance(process, steps, variance, noise)
    if "eta" in fields and not 0 <= (eta := 0.0 if eta is None else float(eta)) <= 1:
        raise PlanError("eta", f"eta must lie in 0..1, got {eta}")
    if spacing is not None and spacing not in SPACINGS:
        raise PlanError("spacing", f"spacing must be one of {', '.join(SPACINGS)}")
    if noise not in NOISES:
        raise PlanError("noise", f"noise must be one of {', '.join(NOISES)}")
    return Sampling(
        sampler=sampler,
        steps=steps,
        spacing=spacing or process.spacing,
        clip=process.clip if clip is None else clip,
        noise=noise,
        variance=variance,
        eta=eta,
    )


def _resolve_variance(process: Process, steps: int, variance: Variance | None, noise: Noise) -> Variance:
    """The given variance, or the process's, whose large one is only for the whole chain: few steps with it ruin a
    picture. Raises PlanError."""
    if variance is None:
        usual = process.variance if steps == process.schedule.T else "small"
        variance = "learned" if process.learned_variance else usual
    if variance == "learned" and not process.learned_variance:
        raise PlanError("variance", "variance must be small or large: this net has not learned one")
    if variance == "learned" and noise == "torch":
        raise PlanError("variance", "variance must be small or large with noise torch")
    return variance


def plan(process: Process, choice: Sampling) -> Plan:
    """The table for these choices, which come from `resolve`, so that such a plan exists."""
    t = timesteps(process.schedule.T, choice.steps, choice.spacing)
    walk, rows = Walk(process, t), np.zeros((choice.steps, len(COLUMNS)))
    rows[:, K] = t - 1
    rows[:, P], rows[:, Q] = walk.p, walk.q
    rows[:, C] = process.clip_range if choice.clip else np.inf
    SAMPLERS[choice.sampler].fill(walk, rows, choice)
    if choice.noise == "torch":
        rows[:, U], rows[:, S] = rows[:, S].copy(), 0.0
    rows.flags.writeable = False
    return Plan(rows, np.append(t, 0), choice.noise)
