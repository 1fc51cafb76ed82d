"""One step of every sampler against diffusers' formula in float64, and against diffusers as it is.

`sample_alone` walks a plan with a net that answers anything. Each step it took is then taken again, from the same x.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from model.sampling.noise import gaussian
from model.sampling.reference import sample_alone
from model.sampling.schedule import BY_NAME, Prediction, Process, Spacing
from model.sampling.table import Plan
from tests.grid import grid
from tests.model.worlds import PREDICTIONS, THEIR_SPACINGS, generator, planned

SHAPE = (2, 4, 4)


@cache
def alphas_squared(schedule: str) -> Tensor:
    """diffusers' alphas_cumprod, recomputed in float64. [1000]"""
    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = {
        "linear": np.linspace(1e-4, 0.02, 1000),
        "squaredcos_cap_v2": np.minimum(1 - f[1:] / f[:-1], 0.999),
    }[schedule]
    return torch.from_numpy(np.cumprod(1 - betas))


@dataclass(frozen=True)
class World:
    """One combination of what a checkpoint and a request can say."""

    schedule: str  # by diffusers' name
    prediction: Prediction
    spacing: Spacing
    clip: bool

    def __str__(self) -> str:
        return f"{self.schedule}-{self.prediction}-{self.spacing}-{'clipped' if self.clip else 'free'}"

    def process(self, learned: bool = False) -> Process:
        """The diffusion process of this world."""
        schedule = BY_NAME[self.schedule](1000, 1e-4, 0.02)
        return Process(schedule, self.prediction, learned_variance=learned, clip=self.clip, spacing=self.spacing)

    def options(self) -> dict[str, Any]:
        """The same for one of diffusers' schedulers."""
        named = {"beta_schedule": self.schedule, "prediction_type": self.prediction}
        return named | {"timestep_spacing": self.spacing}

    def alpha_squared(self, k: int) -> Tensor:
        """diffusers' alphas_cumprod[k], recomputed in float64; 1 behind the last step."""
        return alphas_squared(self.schedule)[k] if k >= 0 else torch.tensor(1.0, dtype=torch.float64)

    def read(self, k: int, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The x0 and the eps that this answer to x means, x0 clipped if this world clips."""
        a = self.alpha_squared(k)
        x0, eps = {
            "epsilon": ((x - (1 - a).sqrt() * out) / a.sqrt(), out),
            "v_prediction": (a.sqrt() * x - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * x),
            "sample": (out, (x - a.sqrt() * out) / (1 - a).sqrt()),
        }[self.prediction]
        return x0.clamp(-1, 1) if self.clip else x0, eps


WORLDS = [
    World(schedule, prediction, spacing, clip)
    for schedule, spacings in (("linear", THEIR_SPACINGS), ("squaredcos_cap_v2", THEIR_SPACINGS[2:]))
    for spacing in spacings
    for prediction in PREDICTIONS
    for clip in (True, False)
]
every_world = pytest.mark.parametrize("world", WORLDS, ids=str)
STEP_COUNTS = (1, 2, 13, 25)


@dataclass(frozen=True)
class Step:
    """One step as it was walked, batch of one, float32: from x at timestep k to x_next, which stands at k_next."""

    k: int
    k_next: int  # -1 behind the last
    x: Tensor
    out: Tensor  # with the extra channels of a learned variance, if there are any
    z: Tensor
    x_next: Tensor

    def double(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, out, z in float64."""
        return self.x.double(), self.out.double(), self.z.double()


def walk(process: Process, plan: Plan) -> list[Step]:
    """The steps of this plan with a net that answers noise, somewhat like the right answer if it is asked for eps."""
    source = generator(3)
    channels = 2 * SHAPE[0] if process.learned_variance else SHAPE[0]
    answers: list[Tensor] = []

    def net(x: Tensor, k: Tensor) -> Tensor:
        answer = torch.randn(1, channels, *SHAPE[1:], generator=source)
        if process.prediction == "epsilon":
            b = float(process.schedule.beta_bar[int(k) + 1])
            answer[:, : SHAPE[0]] = b * x + 0.3 * answer[:, : SHAPE[0]]
        answers.append(answer)
        return answer

    states = [x for x, _ in sample_alone(net, plan, seed=8, shape=SHAPE)]
    ks = [*(plan.t - 1).tolist()]
    z = [gaussian(torch.tensor([8]), torch.tensor([i]), SHAPE) for i in range(plan.steps)]
    return [Step(ks[i], ks[i + 1], states[i], answers[i], z[i], states[i + 1]) for i in range(plan.steps)]


def far(given: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the larger of 1 and the largest number expected.

    It passes 10 only where x0 is read unclipped out of pure noise, that is, divided by alpha_bar_T.
    """
    return float((given - expected).abs().max() / expected.abs().max().clamp(min=1))


def ddpm_formula(world: World, step: Step, variance: str) -> Tensor:
    """DDPMScheduler.step. No noise in the last step, whatever its timestep is."""
    x, out, z = step.double()
    out, learned = out[:, : SHAPE[0]], out[:, SHAPE[0] :]
    a, a_next = world.alpha_squared(step.k), world.alpha_squared(step.k_next)
    alpha = a / a_next
    x0, _ = world.read(step.k, x, out)
    mean = a_next.sqrt() * (1 - alpha) / (1 - a) * x0 + alpha.sqrt() * (1 - a_next) / (1 - a) * x
    if step.k_next < 0:
        return mean
    small, large = (1 - a_next) / (1 - a) * (1 - alpha), 1 - alpha
    if variance == "learned":
        share = (learned + 1) / 2
        return mean + torch.exp(0.5 * (share * large.log() + (1 - share) * small.log())) * z
    return mean + (large if variance == "large" else small).sqrt() * z


def ddim_formula(world: World, step: Step, eta: float) -> Tensor:
    """DDIMScheduler.step, but towards the level where the next step is, for any spacing."""
    x, out, z = step.double()
    a, a_next = world.alpha_squared(step.k), world.alpha_squared(step.k_next)
    x0, eps = world.read(step.k, x, out)
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
    return a_next.sqrt() * x0 + (1 - a_next - sigma**2).sqrt() * eps + sigma * z


def dpmpp_formula(world: World, before: Step | None, step: Step) -> Tensor:
    """DPMSolverMultistepScheduler.step: dpmsolver++, midpoint, second order but for the first and the last step."""
    x, out, _ = step.double()
    a, a_next = world.alpha_squared(step.k), world.alpha_squared(step.k_next)
    x0, _ = world.read(step.k, x, out)
    if step.k_next < 0:
        return x0
    h = half_log_snr(a_next) - half_log_snr(a)
    slope = torch.zeros_like(x0)
    if before is not None:
        r = (half_log_snr(a) - half_log_snr(world.alpha_squared(before.k))) / h
        slope = (x0 - world.read(before.k, before.x.double(), before.out.double())[0]) / r
    weight = a_next.sqrt() * (torch.exp(-h) - 1)
    return ((1 - a_next) / (1 - a)).sqrt() * x - weight * x0 - 0.5 * weight * slope


def half_log_snr(a: Tensor) -> Tensor:
    """DPM-Solver's lambda."""
    return 0.5 * (a.log() - (1 - a).log())


def greedy_formula(world: World, step: Step) -> Tensor:
    """Su's eq. 16, in the paper's eps. It knows no clipping."""
    x, out, _ = step.double()
    a, a_next = world.alpha_squared(step.k), world.alpha_squared(step.k_next)
    _, eps = world.read(step.k, x, out)
    return (x - (1 - a / a_next) / (1 - a).sqrt() * eps) / (a / a_next).sqrt()


@pytest.mark.parametrize(("world", "variance"), grid(WORLDS, ["small", "large", "learned"], one_in=3), ids=str)
def test_a_ddpm_step_is_diffusers_formula_and_its_scheduler(
    world: World, variance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = world.process(learned=variance == "learned")
    named = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    for steps in STEP_COUNTS:
        theirs: Any = DDPMScheduler(clip_sample=world.clip, variance_type=named, **world.options())
        theirs.set_timesteps(steps)
        if world.spacing == "linspace" and steps == 1:  # they start pure noise at the clean level, we do at T
            theirs.set_timesteps(timesteps=[999])
        for step in walk(process, planned(process, steps=steps, variance=variance)):
            assert far(step.x_next, ddpm_formula(world, step, variance)) < 1e-5
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=step.z, **__: z)
            if step.k_next < 0 and step.k > 0:
                # They add noise to the finished picture if its timestep is not 0, as it is with trailing steps: that
                # of the large variance or a learned one. Their small one is 1e-10 there.
                monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=step.z, **__: torch.zeros_like(z))
            assert far(step.x_next, theirs.step(step.out, step.k, step.x).prev_sample) < 2e-4


@pytest.mark.parametrize(("world", "eta"), grid(WORLDS, [0.0, 0.5, 1.0], one_in=3), ids=str)
def test_a_ddim_step_is_diffusers_formula_and_its_scheduler(world: World, eta: float) -> None:
    process = world.process()
    for steps in STEP_COUNTS:
        theirs: Any = DDIMScheduler(clip_sample=world.clip, **world.options())
        theirs.set_timesteps(steps)
        # Their next level is always T // steps below. That is where the next step is for leading ones, for trailing
        # ones if they divide T, and hardly ever for linspace.
        right = world.spacing == "leading" or (world.spacing == "trailing" and 1000 % steps == 0)
        for step in walk(process, planned(process, "ddim", steps, eta=eta)):
            assert far(step.x_next, ddim_formula(world, step, eta)) < 1e-5
            if right:
                taken = theirs.step(step.out, step.k, step.x, eta=eta, variance_noise=step.z).prev_sample
                assert far(step.x_next, taken) < 2e-4


@every_world
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, about numpy 2
def test_a_dpm_solver_step_is_diffusers_formula_and_its_scheduler(world: World) -> None:
    process = world.process()
    for steps in STEP_COUNTS:
        plan = planned(process, "dpmpp_2m", steps, clip=world.clip)
        # It clips only under the name of thresholding, which at a largest value of 1 is plain clipping.
        theirs: Any = DPMSolverMultistepScheduler(thresholding=world.clip, sample_max_value=1.0, **world.options())
        theirs.set_timesteps(timesteps=(plan.t[:-1] - 1).tolist())  # its own grid is another for leading and linspace
        before = None
        for step in walk(process, plan):
            assert far(step.x_next, dpmpp_formula(world, before, step)) < 1e-5
            assert far(step.x_next, theirs.step(step.out, step.k, step.x).prev_sample) < 2e-4
            before = step


@every_world
def test_a_greedy_step_is_the_formula_of_the_article(world: World) -> None:
    process = world.process()
    for steps in STEP_COUNTS:
        for step in walk(process, planned(process, "greedy", steps)):
            assert far(step.x_next, greedy_formula(world, step)) < 1e-5


def test_all_thousand_steps_are_those_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("linear", "epsilon", "leading", clip=True)
    process = world.process()
    theirs: Any = DDPMScheduler(variance_type="fixed_large", **world.options())
    for step in walk(process, planned(process, steps=1000, variance="large")):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=step.z, **__: z)
        assert far(step.x_next, ddpm_formula(world, step, "large")) < 1e-5
        assert far(step.x_next, theirs.step(step.out, step.k, step.x).prev_sample) < 2e-4
