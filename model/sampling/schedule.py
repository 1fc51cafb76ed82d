"""Noise schedules as frozen float64 tables, in the notation of Su Jianlin's article (kexue.fm/archives/9119).

Taking a picture apart, t = 0 (clean) ... T (noise):

    x_t = alpha_t x_{t-1} + beta_t eps_t                 alpha_t² + beta_t² = 1
    x_t = alpha_bar_t x_0 + beta_bar_t eps               alpha_bar_t = alpha_1 ... alpha_t

Ho et al. (2020) and diffusers write beta_t for what is beta_t² here, and alpha_bar_t for alpha_bar_t²: what a
configuration file calls `betas` are our `beta²`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Variance = Literal["small", "large", "learned"]
Spacing = Literal["leading", "linspace", "trailing", "quadratic"]


@dataclass(frozen=True, slots=True, eq=False)
class NoiseSchedule:
    """The amplitudes of the picture and of the noise at each t."""

    T: int  # steps from the clean picture to noise
    alpha_bar: FloatArray  # [T + 1] amplitude of the picture, alpha_bar[0] = 1
    beta_bar: FloatArray  # [T + 1] amplitude of the noise, beta_bar[0] = 0

    @classmethod
    def of(cls, beta_squared: FloatArray | Sequence[float]) -> "NoiseSchedule":
        """The schedule with these step variances. beta_squared: [T], each in (0, 1); else ValueError"""
        variances = np.asarray(beta_squared, dtype=np.float64)
        if variances.ndim != 1 or len(variances) == 0 or not (np.all(variances > 0) and np.all(variances < 1)):
            raise ValueError("the variances of a noise schedule must be a list of numbers between 0 and 1")
        squared = np.concatenate([[1.0], np.cumprod(1.0 - variances)])
        alpha_bar, beta_bar = np.sqrt(squared), np.sqrt(1.0 - squared)
        alpha_bar.flags.writeable = beta_bar.flags.writeable = False
        return cls(len(variances), alpha_bar, beta_bar)


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Variances from beta_start to beta_end in equal steps (Ho et al. 2020, section 4)."""
    return NoiseSchedule.of(np.linspace(beta_start, beta_end, T))


def su_2022(T: int = 1000) -> NoiseSchedule:
    """alpha_t = sqrt(1 - 0.02 t / T), Su's eq. 18 (kexue.fm/archives/9119): `linear` from 0.02 / T to 0.02."""
    return linear(T, 0.02 / T, 0.02)


def scaled_linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Standard deviations in equal steps (Rombach et al. 2022, as diffusers computes it)."""
    return NoiseSchedule.of(np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)


def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """The schedule of Nichol & Dhariwal (2021), eq. 17; variances are capped at max_beta."""
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return NoiseSchedule.of(np.minimum(1 - f[1:] / f[:-1], max_beta))


def sigmoid(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Variances along a sigmoid from -6 to 6 (GeoDiff, Xu et al. 2022, as diffusers computes it)."""
    return NoiseSchedule.of(beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, T))))


# diffusers' names for the schedules, as `scheduler_config.json` writes them: (T, beta_start, beta_end) -> schedule.
BY_NAME: dict[str, Callable[[int, float, float], NoiseSchedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": lambda T, beta_start, beta_end: cosine(T),
    "sigmoid": sigmoid,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPlan:
    """A plan in a model directory: a solver, its levels, and perhaps columns of its own. A field that is None or empty
    is left to the solver, or to the process."""

    digest: str  # the first 16 digits of the file's SHA-256
    sampler: str
    timesteps: tuple[int, ...]  # descending
    order: int | None = None
    eta: float | None = None
    variance: Variance | None = None
    clip: bool | None = None
    columns: str = ""  # of the table, which `rows` have in place of the solver's
    rows: tuple[tuple[float, ...], ...] = ()  # [steps][columns]
    source: str = ""  # where it comes from
    measured: Mapping[str, Any] = field(default_factory=dict)  # what its author has measured of it, as JSON


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    """The diffusion process of a net's training, and its authors' sampling choices: `scheduler_config.json`."""

    schedule: NoiseSchedule
    prediction: Prediction = "epsilon"  # the net's output: the noise, v = alpha_bar eps - beta_bar x0, or x0
    _: KW_ONLY
    learned_variance: bool = False  # whether a second half of output channels says how much noise to add
    variance: Variance = "small"  # the authors' choice with T steps
    spacing: Spacing = "leading"
    clip: bool = True  # whether x0 is clamped to [-clip_range, clip_range] in every step
    clip_range: float = 1.0
    default_steps: int = 1000
    plans: Mapping[str, SavedPlan] = field(default_factory=dict)  # of the model directory, by name
    refused_plans: Mapping[str, str] = field(default_factory=dict)  # by name: why it cannot be used
